"""A transformer of a published model's shapes with random weights, its blocks' linears in a scheme.

The time of a product does not depend on what is multiplied, as long as it is not all zeros.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mezzotint.bench.shapes import shape_of
from mezzotint.errors import BadRequest, there_are
from mezzotint.families import Family, Sampling, family_with
from mezzotint.families.building import meta_model
from mezzotint.families.nunchaku_names import TABLES, in_nunchaku, piece_columns, stored_layers
from mezzotint.formats.svdquant import GELU_SHIFT, SHIFTED
from mezzotint.kernels.expand import SCHEMES as EXPANDED
from mezzotint.kernels.expand import as_fp8
from mezzotint.nn import QuantLinear, SplitLinear, linear_of, quant_linears
from mezzotint.residency import RESIDENT, STORED
from mezzotint.schemes import AWQ_W4A16, FP8, NVFP4, SVDQUANT_INT4, SVDQUANT_NVFP4, Scheme
from mezzotint.schemes.awq import encode_awq
from mezzotint.schemes.fp8 import encode_fp8
from mezzotint.schemes.nvfp4 import encode_nvfp4
from mezzotint.schemes.rounding import E2M1_MAX, E4M3_MAX
from mezzotint.schemes.svdquant_int4 import encode_svdquant_int4
from mezzotint.speed.attention import ATTENTIONS
from mezzotint.tensor import PLAIN, QuantTensor

BF16 = "bf16"
RANK = 32
"""Of SVDQuant's low-rank branch, as in the published checkpoints."""
WEIGHT_STD = 0.02
POSITION_AXES = 4

ENCODERS: dict[str, tuple[Scheme, Callable[[Tensor], dict[str, Tensor]]]] = {
    "fp8": (FP8, encode_fp8),
    "nvfp4": (NVFP4, encode_nvfp4),
    "svdquant-int4": (SVDQUANT_INT4, encode_svdquant_int4),
    "svdquant-nvfp4": (SVDQUANT_NVFP4, encode_nvfp4),
}
"""What `--scheme` may be besides bf16."""


@dataclass(frozen=True)
class Case:
    """What to measure.

    model       a name of `SHAPES`
    scheme      bf16, or a name of `ENCODERS`
    attention   a name of `mezzotint.speed.attention.ATTENTIONS`; None for the fastest that changes no numbers
    resident    "stored", or "fp8": 4-bit weights are turned into FP8 when they are loaded
    Raises      BadRequest for a name that is none
    """

    model: str
    scheme: str
    sampling: Sampling
    batch: int = 1
    attention: str | None = None
    resident: str = STORED

    def __post_init__(self) -> None:
        shape_of(self.model)
        for what, name, known in (
            ("scheme", self.scheme, (BF16, *ENCODERS)),
            ("attention", self.attention, tuple(ATTENTIONS)),
            ("residency", self.resident, RESIDENT),
        ):
            if name is not None and name not in known:
                raise BadRequest(f"no {what} is called {name!r}", there_are(name, known))

    @property
    def svdquant(self) -> bool:
        return self.scheme.startswith("svdquant")


def build(case: Case, device: torch.device) -> nn.Module:
    """The transformer at its real size on `device`, in BF16 but for what the case's scheme quantizes.

    Quantized are all linears of the repeated blocks. SVDQuant's are those of a Nunchaku file, as such a file has them:
    linears that it stores as one layer share smooth and proj_down, one that it stores in two is a SplitLinear, and
    those that see one row a picture are AWQ W4A16. Of a family that has no such files, linears on the same input share.
    """
    shape = shape_of(case.model)
    model = meta_model(shape.transformer, shape.config)
    family = family_with(shape.transformer, case.model)
    pieces = {} if case.scheme == BF16 else _pieces(model, case, family)
    layers = _Layers(case, family, device)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name in pieces:
            model.set_submodule(name, layers.make(module, name, pieces[name]))
        else:
            _fill(module, device)
    return model.to(device).eval()


def block_linears(model: nn.Module) -> set[str]:
    """Names of the linears in the blocks that the model's class repeats."""
    repeated = tuple(getattr(model, "_repeated_blocks", ()))
    return {
        f"{prefix}.{name}"
        for prefix, block in model.named_modules()
        if type(block).__name__ in repeated
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
    }


@dataclass(frozen=True)
class _Piece:
    """A linear, or some of its input features, as one matrix; those `stored` in one layer read the same input."""

    stored: str
    columns: int


def _pieces(model: nn.Module, case: Case, family: Family) -> dict[str, list[_Piece]]:
    """{linear to quantize: its pieces, side by side along its input features}"""
    names = block_linears(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if not (case.svdquant and family.name in TABLES):
        return {name: [_Piece(_input_of(name, family), shapes[f"{name}.weight"][1])] for name in names}
    pieces: dict[str, list[_Piece]] = {}
    for stored, held in stored_layers(family.name, (name for name in names if in_nunchaku(family.name, name))).items():
        for name, number in held:
            columns = piece_columns(family.name, name, shapes)[number]
            pieces.setdefault(name, []).append(_Piece(stored, columns))
    return pieces


def _input_of(name: str, family: Family) -> str:
    """The same for layers that `Family.together` says read the same input."""
    for group in family.together:
        for member in group:
            if name.endswith(f".{member}"):
                return name.removesuffix(member) + group[0]
    return name


def _fill(module: nn.Module, device: torch.device) -> None:
    """Random weights; norms' are ones, as at the start of training."""
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

    case: Case
    family: Family
    device: torch.device
    shared: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def make(self, linear: nn.Linear, name: str, pieces: list[_Piece]) -> QuantLinear | SplitLinear:
        tensors = [self._matrix(linear, name, piece) for piece in pieces]
        if self.case.resident == "fp8":
            tensors = [as_fp8(tensor) if tensor.scheme in EXPANDED else tensor for tensor in tensors]
        return linear_of(tensors, torch.bfloat16)

    def _matrix(self, linear: nn.Linear, name: str, piece: _Piece) -> QuantTensor:
        awq = self.case.svdquant and name.endswith(self.family.modulation)
        scheme, encode = (AWQ_W4A16, encode_awq) if awq else ENCODERS[self.case.scheme]
        weight = torch.randn(linear.out_features, piece.columns, device=self.device) * WEIGHT_STD
        parts = encode(weight)
        if self.case.svdquant and not awq:
            parts = self._svdquant(parts, weight, piece.stored)
        if linear.bias is not None:
            parts["bias"] = self._halves(len(weight))
        return QuantTensor(scheme, PLAIN, (len(weight), piece.columns), parts, dynamic_input=True)

    def _svdquant(self, parts: dict[str, Tensor], weight: Tensor, stored: str) -> dict[str, Tensor]:
        """Encoded weights with what is around them; the scale of the matrix is each row's, as where q, k, v are one."""
        rows, columns = weight.shape
        if stored not in self.shared:
            smooth = torch.rand(columns, dtype=torch.bfloat16, device=self.device) + 0.5
            self.shared[stored] = {"proj_down": self._halves(RANK, columns), "smooth": smooth}
        if "global_scale" in parts:
            parts["channel_scale"] = parts.pop("global_scale").bfloat16().repeat(rows)
        elif SHIFTED.fullmatch(stored):  # INT4, which has no scale of the matrix
            parts["shift"] = torch.tensor(GELU_SHIFT, device=self.device)
        return parts | self.shared[stored] | {"proj_up": self._halves(rows, RANK)}

    def _halves(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=self.device) * WEIGHT_STD


def calibrate(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Give every layer whose scheme can have one a static input scale, of the largest inputs in one call."""
    amax: dict[str, Tensor] = {}
    layers = {name: layer for name, layer in quant_linears(model).items() if isinstance(layer, QuantLinear)}
    hooks = [layer.register_forward_pre_hook(_Recorder(amax, name)) for name, layer in layers.items()]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        if layer.scheme.static_input is not None and name in amax:
            model.set_submodule(name, _with_input_scale(layer, amax[name]))


@dataclass
class _Recorder:
    amax: dict[str, Tensor]
    name: str

    def __call__(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.amax[self.name] = inputs[0].abs().amax().float()


def _with_input_scale(layer: QuantLinear, amax: Tensor) -> QuantLinear:
    weight = layer.weight_tensor
    largest = E4M3_MAX * E2M1_MAX if layer.scheme is NVFP4 else E4M3_MAX
    parts = {**weight.parts, "input_scale": (amax / largest).clamp(min=torch.finfo(torch.float32).tiny)}
    if layer.bias is not None:
        parts["bias"] = layer.bias.detach()
    return QuantLinear(QuantTensor(weight.scheme, PLAIN, weight.shape, parts), layer.compute_dtype)


def example(case: Case, device: torch.device) -> dict[str, Any]:
    """Random arguments of one call; latents and text in BF16, positions and time steps in float32."""
    shape = shape_of(case.model)
    config = meta_model(shape.transformer, shape.config).config
    assert isinstance(config, Mapping)  # noqa: S101
    torch.manual_seed(0)
    given = family_with(shape.transformer, case.model).example(config, case.sampling, case.batch)
    leaves, tree = pytree.tree_flatten(given | {"return_dict": False})
    arguments: dict[str, Any] = pytree.tree_unflatten([_placed(leaf, device) for leaf in leaves], tree)
    return arguments


@dataclass(frozen=True)
class Steps:
    """A painting's time steps, as a scheduler gives them; the first one is an example's."""

    timesteps: Tensor

    @classmethod
    def of(cls, case: Case) -> "Steps":
        return cls(torch.linspace(500, 1, case.sampling.steps))


def _placed(leaf: Any, device: torch.device) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    wide = leaf.ndim > 1 and leaf.shape[-1] > POSITION_AXES
    return leaf.to(device, torch.bfloat16 if wide else torch.float32)
