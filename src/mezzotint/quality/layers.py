"""Errors of one layer against the reference's: its weight, its input scale and its output."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.checkpoint import Checkpoint
from mezzotint.generation.pipeline_index import TRANSFORMER
from mezzotint.kernels import QUANTIZED_ACTIVATIONS
from mezzotint.nn import QuantLinear, SplitLinear, make_linear, use_backend
from mezzotint.quality.candidate import ModelSpec
from mezzotint.quality.input_scales import InputRange, input_range
from mezzotint.quality.recording import InputSample
from mezzotint.quality.signatures import WrongTensor
from mezzotint.tensor import QuantTensor, dequantize_pieces, relative_error

PLAIN = "plain"
Z_RATIO, MIN_GROUP_SIZE = 1.5, 4
"""A layer is an outlier only above this multiple of its group's median, in a group of this size."""


@dataclass(frozen=True)
class StepErrors:
    """The output errors of one layer in one step. Errors are relative, |a - b| / |b|.

    "BF16 output" is the output of the reference model's unquantized weight.

    input            effect of the static input scale; None without one, or if it is not used
    kernel_error     output of the selected backend against the `reference` backend
    backend_error    output of the selected backend against the BF16 output
    output_error     output of the `reference` backend against the BF16 output
    z                robust z score of output_error in the layer's group, or in its scheme if the
                     group is small
    """

    step: int
    input: InputRange | None
    kernel_error: float
    backend_error: float
    output_error: float
    z: float = 0.0


@dataclass(frozen=True)
class LayerErrors:
    """One quantized layer of the candidate, or an unquantized tensor with the scheme "plain".

    backend                      names of the backends that run the layer
    weight_error, weight_cosine  against the reference's weight
    weight_z                     robust z score of weight_error among the layers of the scheme
    """

    module: str
    scheme: str
    backend: str
    weight_error: float
    weight_cosine: float
    steps: tuple[StepErrors, ...] = ()
    weight_z: float = 0.0

    @property
    def group(self) -> str:
        """Return the layer's role: its name without block numbers."""
        return role_of(self.module)


def role_of(module: str) -> str:
    """Return a glob for the layers with the same role: the layer's name without block numbers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", module)


@dataclass(frozen=True)
class TransformerPair:
    """One transformer of both models, and a glob that selects its layers."""

    component: str
    reference: Checkpoint
    candidate: Checkpoint
    pattern: str

    @property
    def quantized(self) -> list[str]:
        """Return the names of the selected quantized layers."""
        return [name for name in self.candidate.modules if fnmatchcase(name, self.pattern)]

    @property
    def names(self) -> list[str]:
        """Return the selected quantized layers, their biases, and the unquantized tensors."""
        plain = [
            name
            for name in self.candidate.plain
            if fnmatchcase(name.rpartition(".")[0], self.pattern)
        ]
        biases = [f"{name}.bias" for name in self.quantized if self._keeps_bias(name)]
        return [*self.quantized, *biases, *plain]

    def _keeps_bias(self, name: str) -> bool:
        """Return whether a quantized layer's stored bias equals the model's."""
        has_bias = "bias" in self.candidate.linear_shapes(name)
        return has_bias and self.candidate.scheme(name).keeps_bias

    def report_name(self, name: str) -> str:
        """Return a layer's name in the report. A second transformer's component is a prefix."""
        module = name.removesuffix(".weight")
        return module if self.component == TRANSFORMER else f"{self.component}.{module}"

    def reference_tensor(self, name: str) -> Tensor | None:
        """Return the reference's tensor in float32, dequantized if needed; None if absent."""
        if name in self.reference.plain:
            return self.reference.tensor(name).float()
        module, _, leaf = name.rpartition(".")
        if module not in self.reference.linears:
            return None
        return self.reference.weight(module) if leaf == "weight" else self.reference.bias(module)

    def wrong_tensor(self, name: str, limit: float, device: torch.device) -> WrongTensor:
        """Return the input of the signatures, which explain the error of a weight."""
        pieces = self._pieces(name, device)
        weight = dequantize_pieces(pieces) if pieces else self._tensor(name).to(device)
        expected = self.reference_tensor(f"{name}.weight" if pieces else name)
        assert expected is not None  # noqa: S101

        def sibling(module: str) -> Tensor | None:
            leaf = "bias" if name.endswith(".bias") else "weight"
            tensor = self.reference_tensor(f"{module}.{leaf}")
            return None if tensor is None else tensor.to(device)

        return WrongTensor(
            name.removesuffix(".weight"), weight, expected.to(device), pieces, sibling, limit
        )

    def _tensor(self, name: str) -> Tensor:
        """Return the candidate's unquantized tensor, or a quantized layer's bias, in float32."""
        if name in self.candidate.plain:
            return self.candidate.tensor(name).float()
        bias = self.candidate.bias(name.removesuffix(".bias"))
        assert bias is not None  # noqa: S101
        return bias

    def _pieces(self, name: str, device: torch.device) -> list[QuantTensor]:
        """Return the pieces of a quantized layer, or an empty list for an unquantized tensor."""
        return (
            [piece.to(device) for piece in self.candidate.read(name)]
            if name in self.candidate.linears
            else []
        )


def measure(
    pair: TransformerPair,
    name: str,
    samples: Sequence[InputSample],
    candidate: ModelSpec,
    device: torch.device,
) -> LayerErrors:
    """Compare one layer of the candidate with the reference's, on recorded inputs."""
    tensor = pair.wrong_tensor(name, 0.0, device)
    pieces, weight, expected = tensor.pieces, tensor.weight, tensor.expected
    errors = (
        relative_error(weight, expected),
        float(F.cosine_similarity(weight.flatten(), expected.flatten(), dim=0)),
    )
    if not pieces:
        return LayerErrors(pair.report_name(name), PLAIN, "", *errors)
    bias = pair.reference_tensor(f"{name}.bias")
    comparison = _LayerComparison(pieces, expected, bias, candidate, device)
    steps = tuple(comparison.errors(sample) for sample in samples)
    scheme, backend = pieces[0].scheme.name, comparison.backend
    return LayerErrors(pair.report_name(name), scheme, backend, *errors, steps)


@dataclass
class _LayerComparison:
    """A candidate's layer as the loader builds it, with the reference's weight and bias."""

    pieces: Sequence[QuantTensor]
    weight: Tensor
    bias: Tensor | None
    candidate: ModelSpec
    device: torch.device
    layer: QuantLinear | SplitLinear = field(init=False)

    def __post_init__(self) -> None:
        self.layer = make_linear(
            self.pieces, activations=self.candidate.activations, backend_name=self.candidate.backend
        )
        self.bias = None if self.bias is None else self.bias.to(self.device)

    @property
    def backend(self) -> str:
        return ", ".join(
            sorted({sublayer.selection.backend.name for sublayer in self.layer.sublayers})
        )

    @torch.no_grad()
    def errors(self, sample: InputSample) -> StepErrors:
        x = sample.rows.to(self.device)
        backend_output, bf16_output = self.layer(x), F.linear(x.float(), self.weight, self.bias)
        with use_backend(self.layer, "reference"):
            reference_output = self.layer(x)
        quantizes = self.candidate.activations == QUANTIZED_ACTIVATIONS
        return StepErrors(
            step=sample.step,
            input=input_range(self.pieces, sample) if quantizes else None,
            kernel_error=relative_error(backend_output, reference_output),
            backend_error=relative_error(backend_output, bf16_output),
            output_error=relative_error(reference_output, bf16_output),
        )


def with_z(layers: Sequence[LayerErrors]) -> list[LayerErrors]:
    """Return the layers with their z scores."""
    quantized = [layer for layer in layers if layer.scheme != PLAIN]
    return [_with_z(layer, quantized) if layer.scheme != PLAIN else layer for layer in layers]


def _with_z(layer: LayerErrors, layers: Sequence[LayerErrors]) -> LayerErrors:
    same_scheme = [other for other in layers if other.scheme == layer.scheme]
    same_role = [other for other in same_scheme if other.group == layer.group]
    # Output errors depend on the inputs, which are similar only within a role.
    group = same_role if len(same_role) >= MIN_GROUP_SIZE else same_scheme
    steps = []
    for step in layer.steps:
        errors = [s.output_error for other in group for s in other.steps if s.step == step.step]
        steps.append(replace(step, z=z_score(step.output_error, errors)))
    weight_z = z_score(layer.weight_error, [other.weight_error for other in same_scheme])
    return replace(layer, weight_z=weight_z, steps=tuple(steps))


def z_score(value: float, group: Sequence[float]) -> float:
    """Return a robust z score: (value - median) / (1.4826 * MAD).

    Return 0 in a small group, and for values below Z_RATIO times the median: errors of one scheme
    often differ by a few percent, so that the MAD is tiny and meaningless.
    """
    center = median(group)
    if len(group) < MIN_GROUP_SIZE or value < Z_RATIO * center:
        return 0.0
    deviation = 1.4826 * median(abs(other - center) for other in group)
    return (value - center) / max(deviation, 0.01 * center, 1e-12)
