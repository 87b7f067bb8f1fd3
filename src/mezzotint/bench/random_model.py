"""A transformer of a published model's shapes with random weights, its blocks' linears in a scheme.

The time of a product does not depend on what is multiplied, as long as it is not all zeros.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mezzotint.bench.shapes import shape_of
from mezzotint.errors import BadRequest
from mezzotint.families import Family, Sampling, family_with
from mezzotint.kernels.expand import as_fp8
from mezzotint.nn import QuantLinear, quant_linears
from mezzotint.pipelines import meta_model
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
                raise BadRequest(f"no {what} is called {name!r}", f"there are: {', '.join(known)}.")


def build(case: Case, device: torch.device) -> nn.Module:
    """The transformer at its real size on `device`, in BF16 but for what the case's scheme quantizes.

    Quantized are all linears of the repeated blocks; with SVDQuant, those that see one row a picture are AWQ W4A16.
    """
    shape = shape_of(case.model)
    model = meta_model(shape.transformer, shape.config)
    family = family_with(shape.transformer, case.model)
    quantized = set() if case.scheme == BF16 else block_linears(model)
    shared: dict[Any, dict[str, Tensor]] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name in quantized:
            model.set_submodule(name, _quantized(module, name, case, family, device, shared))
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


def _fill(module: nn.Module, device: torch.device) -> None:
    """Random weights; norms' are ones, as at the start of training."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.ndim == 1 and name == "weight":
            value = torch.ones(parameter.shape, device=device, dtype=torch.bfloat16)
        else:
            value = torch.randn(parameter.shape, device=device, dtype=torch.bfloat16) * WEIGHT_STD
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _quantized(
    module: nn.Linear, name: str, case: Case, family: Family, device: torch.device, shared: dict[Any, dict[str, Tensor]]
) -> QuantLinear:
    weight = torch.randn(module.out_features, module.in_features, device=device) * WEIGHT_STD
    if case.scheme.startswith("svdquant") and name.endswith(family.modulation):
        tensor = _tensor(AWQ_W4A16, weight, encode_awq(weight))
    else:
        scheme, encode = ENCODERS[case.scheme]
        parts = encode(weight)
        if case.scheme.startswith("svdquant"):
            key = _input_of(name, family)
            if key not in shared:
                shared[key] = _of_input(weight)
            up = torch.randn(len(weight), RANK, dtype=torch.bfloat16, device=device) * WEIGHT_STD
            parts |= {"proj_up": up, **shared[key]}
        tensor = _tensor(scheme, weight, parts)
        if case.resident == "fp8" and case.scheme != "fp8":
            tensor = as_fp8(tensor)
    bias = {}
    if module.bias is not None:
        bias["bias"] = torch.randn(module.out_features, device=device, dtype=torch.bfloat16) * WEIGHT_STD
    return QuantLinear(tensor.with_parts({**tensor.parts, **bias}, PLAIN), torch.bfloat16)


def _tensor(scheme: Scheme, weight: Tensor, parts: dict[str, Tensor]) -> QuantTensor:
    return QuantTensor(scheme, PLAIN, (weight.shape[0], weight.shape[1]), parts, dynamic_input=True)


def _of_input(weight: Tensor) -> dict[str, Tensor]:
    """What SVDQuant's layers on the same input have in common."""
    in_ = weight.shape[1]
    return {
        "proj_down": torch.randn(RANK, in_, dtype=torch.bfloat16, device=weight.device) * WEIGHT_STD,
        "smooth": torch.rand(in_, dtype=torch.bfloat16, device=weight.device) + 0.5,
    }


def _input_of(name: str, family: Family) -> Any:
    """Equal for layers that `Family.together` says read the same input, else the layer's own name."""
    for group in family.together:
        for member in group:
            if name.endswith(f".{member}"):
                return name.removesuffix(member), group
    return name


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
