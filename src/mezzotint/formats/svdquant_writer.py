"""Plain SVDQuant weights to the tensors of a Nunchaku or row-major file: one stored linear at a time.

Names of stored linears, and which of the model's linears each holds, come from `families.nunchaku_names`; `fuse` makes
one weight of those, and one of the two functions gives its tensors.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mezzotint import layouts
from mezzotint.errors import Unsupported
from mezzotint.formats.svdquant import GELU_SHIFT, NUNCHAKU_LAYOUT, SHIFTED, SPLITS, V1, V2, fold_modulation
from mezzotint.formats.svdquant_order import ROW_LAYOUT, ROWS
from mezzotint.layouts.arrangements import grown, pad
from mezzotint.layouts.nunchaku import WARP
from mezzotint.schemes import AWQ_W4A16, SVDQUANT_INT4, SVDQUANT_NVFP4, Scheme
from mezzotint.tensor import PLAIN, QuantTensor, join_rows

CONVERSION = {"tool": "mezzotint", "layout": ROWS, "vectors": ROWS}
"""What a row-major file says of itself in the metadata entry `conversion`, as JSON."""
MODEL_CLASS = {
    "FluxTransformer2DModel": "NunchakuFluxTransformer2dModel",
    "QwenImageTransformer2DModel": "NunchakuQwenImageTransformer2DModel",
    "ZImageTransformer2DModel": "NunchakuZImageTransformer2DModel",
}
"""{diffusers' class: Nunchaku's, as its files spell it}"""
ONES = ("block_scale", "bias", "channel_scale")
"""Parts whose padding is 1; that of the others is 0."""


def fuse(tensors: Sequence[QuantTensor]) -> QuantTensor:
    """One weight of several that multiply the same input, each padded to whole fragments of rows; plain parts.

    Raises   ShapeMismatch where they differ in what the fused weight has only once (smooth, proj_down)
    """
    return tensors[0] if len(tensors) == 1 else join_rows([_padded_rows(tensor) for tensor in tensors])


def nunchaku_tensors(module: str, tensor: QuantTensor, v1: bool) -> dict[str, Tensor]:
    """The stored tensors {name: value} of one linear of a Nunchaku file.

    module   name of the stored linear
    tensor   plain, rows in the model's order; what Nunchaku fuses is fused already
    v1       FLUX.1's older names; the others are for Qwen-Image and Z-Image
    Raises   Unsupported where Nunchaku has no place for the weight
    """
    if tensor.scheme.name not in NUNCHAKU_LAYOUT:
        raise Unsupported(f"{module} is {tensor.scheme.title}: Nunchaku holds SVDQuant and AWQ W4A16")
    if tensor.scheme is AWQ_W4A16:
        return _named(module, layouts.convert(_modulation(module, tensor), NUNCHAKU_LAYOUT[AWQ_W4A16.name]), V2)
    _check_branch(module, tensor)
    shift = SHIFTED.fullmatch(module) is not None and tensor.scheme is SVDQUANT_INT4
    if _shift_of(tensor) != (GELU_SHIFT if shift else None):
        raise Unsupported(
            f"{module} has shift {_shift_of(tensor)}, and Nunchaku computes it with {GELU_SHIFT if shift else None}"
        )
    names = V1 if v1 else V2
    stored = _named(module, layouts.convert(_kept(tensor), NUNCHAKU_LAYOUT[tensor.scheme.name]), names)
    smooth = module + names["smooth"]
    return stored | {f"{smooth}_orig": stored[smooth].clone()}


def row_major_tensors(module: str, tensor: QuantTensor) -> dict[str, Tensor]:
    """The stored tensors {name: value} of one linear of a row-major file, whose `conversion` must be `CONVERSION`.

    Raises   Unsupported for a scheme or a shifted input, which the format's reader has no way to compute
    """
    if tensor.scheme.name not in NUNCHAKU_LAYOUT or tensor.scheme is AWQ_W4A16:
        raise Unsupported(f"{module} is {tensor.scheme.title}: row-major files hold SVDQuant", "convert it to BF16.")
    if "shift" in tensor.parts:
        raise Unsupported(
            f"{module} follows a GELU and expects its input shifted by {_shift_of(tensor)}; row-major SVDQuant cannot"
        )
    _check_branch(module, tensor)
    return _named(module, layouts.convert(_with_both_scales(tensor), ROW_LAYOUT["plain"]), V2)


def nunchaku_metadata(config: Mapping[str, Any], scheme: Scheme, rank: int, modules: Iterable[str]) -> dict[str, str]:
    """The metadata of a merged Nunchaku file, without the optional comfy_config.

    config    of the diffusers model, with its _class_name
    scheme    of the file's W4A4 layers; `rank` of their low-rank branches
    modules   names of the stored linears
    Raises    Unsupported for a model that Nunchaku does not have
    """
    model = str(config.get("_class_name"))
    if model not in MODEL_CLASS:
        raise Unsupported(f"Nunchaku has no {model}", f"it has {', '.join(MODEL_CLASS)}.")
    fp4 = scheme is SVDQUANT_NVFP4
    side = {"dtype": "fp4_e2m1_all" if fp4 else "int4", "group_size": scheme.group}
    note = {
        "method": "svdquant",
        "weight": side | {"scale_dtype": [None, "fp8_e4m3_nan"] if fp4 else None},
        "activation": side | {"scale_dtype": "fp8_e4m3_nan" if fp4 else None},
        "rank": rank,
    }
    if model == "ZImageTransformer2DModel":
        note["skip_refiners"] = not any("_refiner." in module for module in modules)
    return {
        "config": json.dumps(config, indent=2),
        "model_class": MODEL_CLASS[model],
        "quantization_config": json.dumps(note),
    }


def row_major_config(scheme: Scheme, rank: int) -> dict[str, Any]:
    """The quantization_config in config.json beside a row-major file."""
    return {
        "quant_method": "svdquant",
        "rank": rank,
        "precision": "nvfp4" if scheme is SVDQUANT_NVFP4 else "int4",
        "act_unsigned": False,
        "modules_to_not_convert": [],
    }


def _named(module: str, tensor: QuantTensor, names: Mapping[str, str]) -> dict[str, Tensor]:
    return {module + names[part]: value for part, value in tensor.parts.items()}


def _check_branch(module: str, tensor: QuantTensor) -> None:
    needed = {"smooth", "proj_down", "proj_up"}
    if not needed <= tensor.parts.keys():
        absent = ", ".join(sorted(needed - tensor.parts.keys()))
        raise Unsupported(f"{module} has no {absent}, which every layer of an SVDQuant file needs")
    extra = tensor.parts.keys() - V2.keys() - {"shift"}
    if extra:
        raise Unsupported(f"{module} has {', '.join(sorted(extra))}, for which SVDQuant files have no tensor")


def _modulation(module: str, tensor: QuantTensor) -> QuantTensor:
    if tensor.shape[0] not in [splits * tensor.shape[1] for splits in SPLITS]:
        raise Unsupported(f"{module} is AWQ of {tensor.shape[0]} x {tensor.shape[1]}, and no modulation layer")
    return fold_modulation(tensor)


def _padded_rows(tensor: QuantTensor) -> QuantTensor:
    (rows,) = grown(tensor.shape[:1], (WARP,))
    parts = {
        name: pad(part, (WARP, *(1,) * (part.ndim - 1)), float(name in ONES))
        if tensor.scheme.part(name).rows and part.shape[:1] == tensor.shape[:1]
        else part
        for name, part in tensor.parts.items()
    }
    return QuantTensor(tensor.scheme, PLAIN, (rows, tensor.shape[1]), parts)


def _kept(tensor: QuantTensor) -> QuantTensor:
    """Without the shift, which Nunchaku does not write, and without an outer scale of 1 beside another."""
    kept = {name: part for name, part in tensor.parts.items() if name != "shift"}
    for name, other in (("channel_scale", "global_scale"), ("global_scale", "channel_scale")):
        if name in kept and other in kept and bool((kept[name] == 1).all()):
            del kept[name]
    return tensor.with_parts(kept, PLAIN)


def _with_both_scales(tensor: QuantTensor) -> QuantTensor:
    """With both outer scales of NVFP4, an absent one being 1: readers of row-major files expect them."""
    if tensor.scheme is not SVDQUANT_NVFP4:
        return tensor
    dtype = tensor.parts["smooth"].dtype
    ones = {"channel_scale": torch.ones(tensor.shape[0], dtype=dtype), "global_scale": torch.ones(1, dtype=dtype)}
    return tensor.with_parts({**ones, **tensor.parts}, PLAIN)


def _shift_of(tensor: QuantTensor) -> float | None:
    shift = tensor.parts.get("shift")
    return None if shift is None else float(shift.to(torch.float32))
