"""Build a transformer with the shapes of a published model and random weights.

The time of a GEMM does not depend on the values, as long as they are not all zeros.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mezzotint.bench.random_parts import WEIGHT_STD, has_random_parts, random_parts
from mezzotint.bench.shapes import published_model
from mezzotint.errors import require_known
from mezzotint.families import Family, Sampling, family_by_transformer
from mezzotint.families.building import block_linears, build_meta_model, outline_model
from mezzotint.fast.passes.attention import ATTENTION_BACKENDS
from mezzotint.formats.readers.svdquant import GELU_SHIFT, SHIFTED_LAYER
from mezzotint.loading.residency import AS_STORED_BITS, RESIDENCY_MODES, to_residency
from mezzotint.nn import QuantLinear, SplitLinear, make_linear, quant_linears
from mezzotint.schemes import AWQ_W4A16, FP8, INT4_ROWS, INT8, NVFP4, W4A8, Scheme, schemes
from mezzotint.schemes.rotation import regular_hadamard
from mezzotint.tensor import PLAIN, QuantTensor

BASELINE = "bf16"
RANK = 32
"""Rank of SVDQuant's low-rank branch in the published checkpoints."""
POSITION_AXES = 4

SCHEMES: Mapping[str, Scheme] = {
    scheme.name.replace("svdquant_", "svdquant-"): scheme
    for scheme in schemes().values()
    if has_random_parts(scheme)
}
"""{value of --scheme besides bf16: scheme}. SVDQuant cases measure AWQ W4A16 too."""
ROTATED: Mapping[str, Scheme] = {
    f"{scheme.name}-convrot": scheme for scheme in (INT8, INT4_ROWS, W4A8)
}
"""{value of --scheme: scheme}, for ComfyUI's files whose inputs are rotated."""
ROTATION_GROUP = 256
CALIBRATED = (FP8, NVFP4)
"""Schemes whose published files have static scales of their inputs."""


@dataclass(frozen=True)
class BenchCase:
    """What to measure.

    model       key of PUBLISHED_MODELS
    scheme      "bf16", or a key of SCHEMES or ROTATED
    sampling    settings, of which the size and the number of steps matter
    batch       images per call
    attention   key of ATTENTION_BACKENDS, or None for the fastest BF16 one
    resident    "stored", or "fp8" to convert 4-bit weights to FP8 when they are loaded
    Raises      BadRequest for an unknown name
    """

    model: str
    scheme: str
    sampling: Sampling
    batch: int = 1
    attention: str | None = None
    resident: str = AS_STORED_BITS

    def __post_init__(self) -> None:
        published_model(self.model)
        for kind, name, known in (
            ("scheme", self.scheme, (BASELINE, *SCHEMES, *ROTATED)),
            ("attention backend", self.attention, ATTENTION_BACKENDS),
            ("residency mode", self.resident, RESIDENCY_MODES),
        ):
            if name is not None:
                require_known(kind, name, known)

    @property
    def svdquant(self) -> bool:
        return self.scheme.startswith("svdquant")


def build(case: BenchCase, device: torch.device) -> nn.Module:
    """Return the transformer at its real size on `device`, in BF16 and the scheme of the case.

    All linears of the repeated blocks are quantized. SVDQuant layers are those of a Nunchaku file.
    Linears that it stores as one layer share smooth and proj_down. A linear that it stores in two
    pieces is a SplitLinear. Modulation layers are AWQ W4A16. In a family without Nunchaku files,
    linears on the same input share smooth and proj_down.
    """
    published = published_model(case.model)
    model = build_meta_model(published.transformer, published.config)
    family = family_by_transformer(published.transformer, case.model)
    pieces = {} if case.scheme == BASELINE else _pieces(model, case, family)
    layers = _Layers(case, family, device)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name in pieces:
            model.set_submodule(name, layers.make(module, name, pieces[name]))
        else:
            _fill(module, device)
    return model.to(device).eval()


@dataclass(frozen=True)
class _Piece:
    """A linear, or some of its input features, as one matrix.

    stored    name of the stored layer; pieces of one stored layer read the same input
    columns   number of input features
    """

    stored: str
    columns: int


def _pieces(model: nn.Module, case: BenchCase, family: Family) -> dict[str, list[_Piece]]:
    """Return {linear to quantize: its pieces in the order of its input features}."""
    names = block_linears(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if not (case.svdquant and family.nunchaku.blocks):
        return {
            name: [_Piece(_input_of(name, family), shapes[f"{name}.weight"][1])] for name in names
        }
    pieces: dict[str, list[_Piece]] = {}
    quantized = filter(family.nunchaku.quantizes, names)
    for stored, members in family.nunchaku.stored_layers(quantized).items():
        for name, number in members:
            columns = family.nunchaku.piece_columns(name, shapes)[number]
            pieces.setdefault(name, []).append(_Piece(stored, columns))
    return pieces


def _input_of(name: str, family: Family) -> str:
    """Return one name for all layers that read the same input, according to Family.fusable."""
    for group in family.fusable:
        for member in group:
            if name.endswith(f".{member}"):
                return name.removesuffix(member) + group[0]
    return name


def _fill(module: nn.Module, device: torch.device) -> None:
    """Fill a module with random weights. Weights of norms are ones, as at the start of training."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.ndim == 1 and name == "weight":
            value = torch.ones(parameter.shape, device=device, dtype=torch.bfloat16)
        else:
            value = torch.randn(parameter.shape, device=device, dtype=torch.bfloat16) * WEIGHT_STD
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))


@dataclass(frozen=True)
class _Layers:
    """The quantized layers of a case, with random weights.

    shared   {stored layer: its smooth and proj_down}
    """

    case: BenchCase
    family: Family
    device: torch.device
    shared: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def make(self, linear: nn.Linear, name: str, pieces: list[_Piece]) -> QuantLinear | SplitLinear:
        tensors = [self._matrix(linear, name, piece) for piece in pieces]
        tensors = [to_residency(tensor, self.case.resident) for tensor in tensors]
        return make_linear(tensors, torch.bfloat16)

    def _matrix(self, linear: nn.Linear, name: str, piece: _Piece) -> QuantTensor:
        awq = self.case.svdquant and name.endswith(self.family.modulation_layers)
        wanted = self.case.scheme
        scheme = AWQ_W4A16 if awq else ROTATED.get(wanted) or SCHEMES[wanted]
        shape = linear.out_features, piece.columns
        parts = random_parts(scheme, shape, self.device)
        if wanted in ROTATED:
            parts["rotation"] = regular_hadamard(ROTATION_GROUP).to(self.device)
        if self.case.svdquant and not awq:
            parts = self._svdquant(parts, shape, piece.stored)
        if linear.bias is not None:
            parts["bias"] = self._random_bf16(shape[0])
        return QuantTensor(scheme, PLAIN, shape, parts, dynamic_input=True)

    def _svdquant(
        self, parts: dict[str, Tensor], shape: tuple[int, int], stored: str
    ) -> dict[str, Tensor]:
        """Return encoded parts and SVDQuant's others. Weight scales are per row."""
        rows, columns = shape
        if stored not in self.shared:
            smooth = torch.rand(columns, dtype=torch.bfloat16, device=self.device) + 0.5
            self.shared[stored] = {"proj_down": self._random_bf16(RANK, columns), "smooth": smooth}
        if "global_scale" in parts:
            parts["channel_scale"] = parts.pop("global_scale").bfloat16().repeat(rows)
        elif SHIFTED_LAYER.fullmatch(stored):  # INT4 has no weight scale
            parts["shift"] = torch.tensor(GELU_SHIFT, device=self.device)
        return parts | self.shared[stored] | {"proj_up": self._random_bf16(rows, RANK)}

    def _random_bf16(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=self.device) * WEIGHT_STD


def calibrate(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Give layers of CALIBRATED schemes a static input scale, from the inputs of one call."""
    amax: dict[str, Tensor] = {}
    layers = {
        name: layer
        for name, layer in quant_linears(model).items()
        if isinstance(layer, QuantLinear)
    }
    hooks = [
        layer.register_forward_pre_hook(_Recorder(amax, name)) for name, layer in layers.items()
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        if layer.scheme in CALIBRATED and name in amax:
            model.set_submodule(name, _with_input_scale(layer, amax[name]))


@dataclass
class _Recorder:
    amax: dict[str, Tensor]
    name: str

    def __call__(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.amax[self.name] = inputs[0].abs().amax().float()


def _with_input_scale(layer: QuantLinear, amax: Tensor) -> QuantLinear:
    weight = layer.quant_weight
    assert layer.scheme.input_max is not None  # noqa: S101
    parts = {
        **weight.parts,
        "input_scale": (amax / layer.scheme.input_max).clamp(min=torch.finfo(torch.float32).tiny),
    }
    if layer.bias is not None:
        parts["bias"] = layer.bias.detach()
    return QuantLinear(QuantTensor(weight.scheme, PLAIN, weight.shape, parts), layer.compute_dtype)


def example(case: BenchCase, device: torch.device) -> dict[str, Any]:
    """Return random arguments of one call.

    Latents and text are BF16, positions and time steps float32.
    """
    published = published_model(case.model)
    config = outline_model(published.transformer, published.config).config
    assert isinstance(config, Mapping)  # noqa: S101
    torch.manual_seed(0)
    family = family_by_transformer(published.transformer, case.model)
    inputs = family.example_inputs(config, case.sampling, case.batch)
    leaves, tree = pytree.tree_flatten(inputs | {"return_dict": False})
    arguments: dict[str, Any] = pytree.tree_unflatten(
        [_to_device(leaf, device) for leaf in leaves], tree
    )
    return arguments


@dataclass(frozen=True)
class FixedSchedule:
    """Time steps of a generation, as a scheduler has them. The first is that of `example`."""

    timesteps: Tensor

    @classmethod
    def of(cls, case: BenchCase) -> "FixedSchedule":
        return cls(torch.linspace(500, 1, case.sampling.steps))


def _to_device(leaf: Any, device: torch.device) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    is_bf16 = leaf.ndim > 1 and leaf.shape[-1] > POSITION_AXES
    return leaf.to(device, torch.bfloat16 if is_bf16 else torch.float32)
