"""The numbers of one layer of a candidate against the reference's: its weight, its input scale, its product."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.checkpoint import Checkpoint
from mezzotint.kernels import AS_STORED
from mezzotint.nn import QuantLinear, SplitLinear, linear_of, use_backend
from mezzotint.pipelines import TRANSFORMER
from mezzotint.quality.candidate import Candidate
from mezzotint.quality.input_scales import InputRange, input_range
from mezzotint.quality.recording import Sample
from mezzotint.quality.signatures import Suspicion, relative_error
from mezzotint.tensor import QuantTensor, real_weight

PLAIN = "plain"
Z_RATIO, FEWEST = 1.5, 4
"""A layer stands out only by this many times its group's median, and in a group of so many."""

KEEP_BIAS = ("fp8", "nvfp4", "int8", "mxfp8")
"""SVDQuant's and AWQ's biases take in a shift of the input or the 1 of a modulation, and are rounded with that."""


@dataclass(frozen=True)
class StepErrors:
    """One layer's product in one step; errors are relative, |a - b| / |b|.

    input            what its static input scale makes of the input; None where it has none, or it is not used
    kernel_error     the chosen backend against `reference`
    backend_error    the chosen backend against the reference model's weight
    output_error     `reference` against the reference model's weight
    z                of output_error, among the layers of the same group, or of the scheme if those are few
    """

    step: int
    input: InputRange | None
    kernel_error: float
    backend_error: float
    output_error: float
    z: float = 0.0


@dataclass(frozen=True)
class Layer:
    """One quantized layer of the candidate, or an unquantized tensor: then `scheme` is "plain".

    backend                      names of the backends that multiply by it
    weight_error, weight_cosine  against the reference's weight
    weight_z                     of weight_error, among the layers of the same scheme
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
        """The layer's role: its name without the numbers of blocks."""
        return role_of(self.module)


def role_of(module: str) -> str:
    """A layer's name without the numbers of blocks: a pattern that matches the layers of its role."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", module)


@dataclass(frozen=True)
class Side:
    """One transformer of both models, and the layers of it to look at."""

    component: str
    reference: Checkpoint
    candidate: Checkpoint
    pattern: str

    @property
    def quantized(self) -> list[str]:
        return [name for name in self.candidate.modules if fnmatchcase(name, self.pattern)]

    @property
    def names(self) -> list[str]:
        """The quantized layers and their biases, and the unquantized tensors (X.weight, X.bias)."""
        plain = [name for name in self.candidate.plain if fnmatchcase(name.rpartition(".")[0], self.pattern)]
        biases = [f"{name}.bias" for name in self.quantized if self._keeps_bias(name)]
        return [*self.quantized, *biases, *plain]

    def _keeps_bias(self, name: str) -> bool:
        """Whether a quantized layer's bias is stored as the model has it."""
        return self.candidate.scheme(name).name in KEEP_BIAS and "bias" in self.candidate.linear_shapes(name)

    def module(self, name: str) -> str:
        """What the report calls a layer; those of a second transformer begin with their component."""
        own = name.removesuffix(".weight")
        return own if self.component == TRANSFORMER else f"{self.component}.{own}"

    def expected(self, name: str) -> Tensor | None:
        """The reference's tensor, float32; of a quantized layer, what its file stands for. None where it has none."""
        if name in self.reference.plain:
            return self.reference.tensor(name).float()
        module, _, leaf = name.rpartition(".")
        if module not in self.reference.linears:
            return None
        return self.reference.weight(module) if leaf == "weight" else self.reference.bias(module)

    def suspicion(self, name: str, limit: float, device: torch.device) -> Suspicion:
        """What the signatures need to explain the error of a weight."""
        pieces = self._pieces(name, device)
        weight = real_weight(pieces) if pieces else self._tensor(name).to(device)
        expected = self.expected(f"{name}.weight" if pieces else name)
        assert expected is not None  # noqa: S101

        def sibling(module: str) -> Tensor | None:
            other = self.expected(f"{module}.{'bias' if name.endswith('.bias') else 'weight'}")
            return None if other is None else other.to(device)

        return Suspicion(name.removesuffix(".weight"), weight, expected.to(device), pieces, sibling, limit)

    def _tensor(self, name: str) -> Tensor:
        """An unquantized tensor of the candidate, or the bias of a quantized layer, float32."""
        if name in self.candidate.plain:
            return self.candidate.tensor(name).float()
        bias = self.candidate.bias(name.removesuffix(".bias"))
        assert bias is not None  # noqa: S101
        return bias

    def _pieces(self, name: str, device: torch.device) -> list[QuantTensor]:
        """A quantized layer's, none of an unquantized tensor."""
        return [piece.to(device) for piece in self.candidate.read(name)] if name in self.candidate.linears else []


def measure(side: Side, name: str, samples: Sequence[Sample], candidate: Candidate, device: torch.device) -> Layer:
    """Read one layer of the candidate and of the reference, and hold them against each other on the samples."""
    suspicion = side.suspicion(name, 0.0, device)
    pieces, weight, expected = suspicion.pieces, suspicion.weight, suspicion.expected
    errors = relative_error(weight, expected), float(F.cosine_similarity(weight.flatten(), expected.flatten(), dim=0))
    if not pieces:
        return Layer(side.module(name), PLAIN, "", *errors)
    product = _Product(pieces, expected, side.expected(f"{name}.bias"), candidate, device)
    steps = tuple(product.errors(sample) for sample in samples)
    return Layer(side.module(name), pieces[0].scheme.name, product.backend, *errors, steps)


@dataclass
class _Product:
    """A candidate's layer as the loader makes it, beside the reference's weight and bias."""

    pieces: Sequence[QuantTensor]
    weight: Tensor
    bias: Tensor | None
    candidate: Candidate
    device: torch.device
    layer: QuantLinear | SplitLinear = field(init=False)

    def __post_init__(self) -> None:
        self.layer = linear_of(self.pieces, activations=self.candidate.activations, only=self.candidate.backend)
        self.bias = None if self.bias is None else self.bias.to(self.device)

    @property
    def backend(self) -> str:
        return ", ".join(sorted({product.selection.backend.name for product in self.layer.products}))

    @torch.no_grad()
    def errors(self, sample: Sample) -> StepErrors:
        x = sample.rows.to(self.device)
        chosen, exact = self.layer(x), F.linear(x.float(), self.weight, self.bias)
        with use_backend("reference"):
            truth = self.layer(x)
        return StepErrors(
            step=sample.step,
            input=input_range(self.pieces, sample) if self.candidate.activations == AS_STORED else None,
            kernel_error=relative_error(chosen, truth),
            backend_error=relative_error(chosen, exact),
            output_error=relative_error(truth, exact),
        )


def with_z(layers: Sequence[Layer]) -> list[Layer]:
    """The same layers with their z scores; of a group that is too small, among all layers of the scheme."""
    quantized = [layer for layer in layers if layer.scheme != PLAIN]
    return [_with_z(layer, quantized) if layer.scheme != PLAIN else layer for layer in layers]


def _with_z(layer: Layer, layers: Sequence[Layer]) -> Layer:
    same = [other for other in layers if other.scheme == layer.scheme]
    role = [other for other in same if other.group == layer.group]
    kin = role if len(role) >= FEWEST else same
    steps = []
    for own in layer.steps:
        errors = [step.output_error for other in kin for step in other.steps if step.step == own.step]
        steps.append(replace(own, z=z_score(own.output_error, errors)))
    weight_z = z_score(layer.weight_error, [other.weight_error for other in same])
    return replace(layer, weight_z=weight_z, steps=tuple(steps))


def z_score(value: float, group: Sequence[float]) -> float:
    """Robust z score, 1.4826 * MAD for the deviation; 0 in a small group, or near its median whatever the deviation."""
    middle = median(group)
    if len(group) < FEWEST or value < Z_RATIO * middle:
        return 0.0
    spread = 1.4826 * median(abs(other - middle) for other in group)
    return (value - middle) / max(spread, 0.01 * middle, 1e-12)
