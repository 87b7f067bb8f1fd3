"""Fakes of the libraries that backends call, on the CPU, with the documented behavior.

A fake has the recorded signature of the real function (tests/data/signatures.json,
tests/data/record_signatures.py), so that a call with wrong arguments is an error here too. NVFP4
is decoded with comfy-kitchen's reference code. Nunchaku's layouts are decoded with the index maps
that its golden file verifies.
"""

import functools
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy_kitchen
import pytest
import torch
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType

from mezzotint.kernels.optional_library import OptionalLibrary
from mezzotint.layouts import nunchaku
from mezzotint.schemes import NVFP4, SVDQUANT_INT4, SVDQUANT_NVFP4
from mezzotint.schemes.minifloats import unpack_e2m1

RECORD = json.loads((Path(__file__).parents[1] / "data/signatures.json").read_text())
ONE = torch.ones(())


def _recorded(text: str) -> inspect.Signature:
    namespace: dict[str, Any] = {}
    exec(f"def recorded({text}): ...", namespace)  # noqa: S102
    return inspect.signature(namespace["recorded"])


SIGNATURES = {"torch.nn.functional.scaled_mm": inspect.signature(torch.nn.functional.scaled_mm)} | {
    path: _recorded(text)
    for library in RECORD.values()
    for path, text in library["functions"].items()
}


def install(monkeypatch: pytest.MonkeyPatch, functions: dict[str, Callable[..., Any]]) -> list[str]:
    """Make {path: fake} importable, and all libraries installed; return the called paths."""
    monkeypatch.setattr(OptionalLibrary, "unavailable_reason", lambda _: None)
    calls: list[str] = []
    for path, function in functions.items():
        package, _, name = path.rpartition(".")
        monkeypatch.setattr(
            _module(monkeypatch, package), name, _bound(path, function, calls), raising=False
        )
    return calls


def _module(monkeypatch: pytest.MonkeyPatch, path: str) -> ModuleType:
    parent, _, name = path.rpartition(".")
    if path not in sys.modules:
        monkeypatch.setitem(sys.modules, path, ModuleType(path))
        if parent:
            monkeypatch.setattr(
                _module(monkeypatch, parent), name, sys.modules[path], raising=False
            )
    return sys.modules[path]


def _bound(path: str, function: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    if isinstance(function, type):
        return function

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        calls.append(path)
        return function(**SIGNATURES[path].bind(*arguments, **named).arguments)

    return call


def decoded(codes: Tensor, tiles: Tensor) -> Tensor:
    """The values of NVFP4 bytes with scales in tiles, float32 [rows, columns], by comfy-kitchen."""
    scale = tiles.view(torch.float8_e4m3fn).contiguous()
    values: Tensor = comfy_kitchen.dequantize_nvfp4(
        codes.contiguous(), ONE, scale, torch.float32, hi_first=False
    )
    return values


def scaled_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: list[Tensor],
    scale_recipe_a: list[ScalingType],
    scale_b: list[Tensor],
    scale_recipe_b: list[ScalingType],
    swizzle_a: list[SwizzleType],
    swizzle_b: list[SwizzleType],
    bias: Tensor | None = None,
    output_dtype: torch.dtype = torch.bfloat16,
    use_fast_accum: bool = False,
) -> Tensor:
    """PyTorch's NVFP4 product; the checks are those of ATen's _scaled_nvfp4_nvfp4."""
    rows, half = mat_a.shape
    assert mat_b.shape[0] == half
    assert mat_b.stride(0) == 1, "the second matrix is column-major"
    for recipe, swizzle in ((scale_recipe_a, swizzle_a), (scale_recipe_b, swizzle_b)):
        assert recipe == [ScalingType.BlockWise1x16, ScalingType.TensorWise]
        assert swizzle == [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
    tiles = []
    for (tile, unit), count in ((scale_a, rows), (scale_b, mat_b.shape[1])):
        shape = -(-count // 128) * 128, -(-half // 8 // 4) * 4
        assert tile.numel() == shape[0] * shape[1]
        assert (unit.numel(), unit.dtype) == (1, torch.float32)
        tiles.append(tile.view(shape))
    a = decoded(mat_a.view(torch.uint8), tiles[0])
    b = decoded(mat_b.t().view(torch.uint8), tiles[1])
    y = a @ b.T * (scale_a[1] * scale_b[1])
    return (y if bias is None else y + bias.float()).to(output_dtype)


def flashinfer_quantize(a: Tensor, a_global_sf: Tensor) -> tuple[Tensor, Tensor]:
    assert a.dtype == torch.bfloat16
    codes, tiles = comfy_kitchen.quantize_nvfp4(a, 1 / a_global_sf.reshape(()), hi_first=False)
    return codes, tiles.view(torch.uint8)


def flashinfer_mm(
    a: Tensor,
    b: Tensor,
    a_descale: Tensor,
    b_descale: Tensor,
    alpha: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    assert b.t().is_contiguous()
    assert (alpha.numel(), alpha.dtype) == (1, torch.float32)
    return (decoded(a, a_descale) @ decoded(b.t(), b_descale.t()).T * alpha).to(out_dtype)


def flashinfer_svdquant(
    x: Tensor,
    weight_fp4: Tensor,
    weight_sf: Tensor,
    alpha: Tensor,
    pre_quant_scale: Tensor,
    l2t_smoothed: Tensor,
    l1_scaled: Tensor,
    global_scale: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """alpha * (Q(x * pre_quant_scale) R^T + (x l2t) l1^T) + bias"""
    for tensor in (x, pre_quant_scale, l2t_smoothed, l1_scaled, *(() if bias is None else (bias,))):
        assert (tensor.dtype, tensor.is_contiguous()) == (torch.bfloat16, True)
    assert l1_scaled.shape[1] % 32 == 0
    assert (weight_fp4.dtype, weight_sf.dtype) == (torch.uint8, torch.uint8)
    codes, tiles = flashinfer_quantize(
        (x.float() * pre_quant_scale.float()).bfloat16(), global_scale
    )
    y = (
        decoded(codes, tiles) @ decoded(weight_fp4, weight_sf).T
        + (x @ l2t_smoothed).float() @ l1_scaled.float().T
    )
    return (alpha * y + (0 if bias is None else bias.float())).bfloat16()


class HummingSchema:
    """ModelOpt's NVFP4, in Humming's words."""

    def to_humming_schema(self, param_dtype: torch.dtype) -> str:
        return f"nvfp4, {param_dtype}"


class HummingConfig(dict[str, Any]):
    def to_str(self) -> str:
        return json.dumps(self)


def humming_config(
    shape_n: int, shape_k: int, weight_schema: str, torch_dtype: torch.dtype, device: torch.device
) -> HummingConfig:
    assert weight_schema == f"nvfp4, {torch_dtype}"
    return HummingConfig(shape_n=shape_n, shape_k=shape_k, device=str(device))


def humming_transform(config: HummingConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Check what Humming's schema for NVFP4 checks; its byte order is private, and not emulated."""
    rows, columns = config["shape_n"], config["shape_k"]
    seen = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    assert seen == {
        "weight": ((rows, columns // 8), torch.int32),
        "weight_scale": ((rows, columns // 16), torch.float8_e4m3fn),
        "weight_scale_2": ((1,), torch.float32),
    }
    return dict(tensors)


@torch.library.custom_op("stand_ins::humming_gemm", mutates_args=())
def humming_gemm(
    layer_config: str,
    inputs: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_scale_2: Tensor,
    locks: Tensor,
) -> Tensor:
    """An operator, as Humming's product is one where it is traced."""
    config = json.loads(layer_config)
    assert (inputs.dtype, inputs.shape[1]) == (torch.bfloat16, config["shape_k"])
    assert (locks.dtype, locks.numel(), int(locks.abs().sum())) == (torch.int32, 2048, 0)
    scale = weight_scale.float().repeat_interleave(16, dim=1) * weight_scale_2
    return (inputs.float() @ (unpack_e2m1(weight.view(torch.uint8)) * scale).T).bfloat16()


@humming_gemm.register_fake
def _(layer_config: str, inputs: Tensor, weight: Tensor, *_: Tensor) -> Tensor:
    return inputs.new_empty(inputs.shape[0], weight.shape[0])


def nunchaku_quantize(
    input: Tensor, lora_down: Tensor, smooth: Tensor, fp4: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Pad rows to a multiple of 256, and return dequantized inputs instead of packed ones."""
    rows = torch.zeros(-(-len(input) // 256) * 256, input.shape[1])
    rows[: len(input)] = input.float()
    divisor = nunchaku.from_vector_fragments(smooth.unsqueeze(0)).squeeze(1).float()
    scheme = SVDQUANT_NVFP4 if fp4 else SVDQUANT_INT4
    assert scheme.quantize_activation is not None
    quantized = scheme.quantize_activation(rows / divisor, {})
    return quantized, torch.ones(1), rows @ nunchaku.from_down_fragments(lora_down).float().T


def nunchaku_gemm(
    act: Tensor,
    wgt: Tensor,
    out: Tensor,
    ascales: Tensor,
    wscales: Tensor,
    lora_act_in: Tensor,
    lora_up: Tensor,
    bias: Tensor | None,
    fp4: bool,
    wcscales: Tensor | None,
) -> None:
    """Write psum * wcscales + bias + lora_act lora_up^T to `out`, which has the input's rows."""
    assert wgt.dtype == torch.int8
    parts = {"codes": nunchaku.from_code_fragments(wgt), "global_scale": ONE}
    unpack = nunchaku.from_micro_fragments if fp4 else nunchaku.from_vector_fragments
    parts["block_scale"] = unpack(wscales)
    y = act @ (NVFP4 if fp4 else SVDQUANT_INT4).decode(parts).T
    for vector, apply in ((wcscales, torch.mul), (bias, torch.add)):
        if vector is not None:
            assert vector.dtype == torch.bfloat16
            y = apply(y, nunchaku.from_vector_fragments(vector.unsqueeze(0)).squeeze(1).float())
    y = y + lora_act_in @ nunchaku.from_up_fragments(lora_up).float().T
    out.copy_(y[: len(out)])


LIBRARIES: dict[str, dict[str, Callable[..., Any]]] = {
    "torch_nvfp4": {"torch.nn.functional.scaled_mm": scaled_mm},
    "comfy_kitchen": {"torch.nn.functional.scaled_mm": scaled_mm},
    "flashinfer": {
        "flashinfer.nvfp4_quantize": flashinfer_quantize,
        "flashinfer.mm_fp4": flashinfer_mm,
        "flashinfer.svdquant_linear": flashinfer_svdquant,
    },
    "humming": {
        "humming.schema.modelopt.ModeloptNvfp4WeightSchema": HummingSchema,
        "humming.transform.prepare_layer_config": humming_config,
        "humming.transform.transform_humming_tensors": humming_transform,
        "humming.ops.humming_gemm": humming_gemm,
    },
    "nunchaku": {
        "nunchaku.ops.quantize.svdq_quantize_w4a4_act_fuse_lora_cuda": nunchaku_quantize,
        "nunchaku.ops.gemm.svdq_gemm_w4a4_cuda": nunchaku_gemm,
    },
}
"""{library: {function that a backend imports: fake}}; comfy-kitchen runs its own code."""
