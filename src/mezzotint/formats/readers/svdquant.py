"""Tensors of Nunchaku's files and of row-major SVDQuant files, which have the same names.

N = out, K = in, R = rank. The dtype of wscales shows the scheme: bf16 is INT4, e4m3 is NVFP4.

v2 (Qwen-Image, Z-Image)  v1 (FLUX.1)   part            shape and dtype
X.qweight                 X.qweight     codes           [N, K/2] int8
X.wscales                 X.wscales     block_scale     [K/64, N] bf16 or [K/16, N] e4m3
X.wcscales                X.wcscales    channel_scale   [N] bf16, NVFP4 only
X.wtscale                 X.wtscale     global_scale    [1] bf16, NVFP4 only
X.bias                    X.bias        bias            [N]
X.smooth_factor           X.smooth      smooth          [K]
X.proj_down               X.lora_down   proj_down       [K, R]
X.proj_up                 X.lora_up     proj_up         [N, R]

AWQ W4A16 layers have other tensors:

X.qweight                 X.qweight     codes           [N/4, K/2] int32
X.wscales                 X.wscales     block_scale     [K/64 padded, N] bf16
X.wzeros                  X.wzeros      block_zero      [K/64 padded, N] bf16
X.bias                    X.bias        bias            [N]
"""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch

from mezzotint.containers import TensorInfo
from mezzotint.errors import ShapeMismatch
from mezzotint.formats.contents import StoredLinear
from mezzotint.formats.header import Header
from mezzotint.schemes import AWQ_W4A16, SVDQUANT_INT4, SVDQUANT_NVFP4, Scheme
from mezzotint.tensor import Layout, QuantTensor

QWEIGHT, WSCALES = ".qweight", ".wscales"
V2: Mapping[str, str] = {
    "codes": QWEIGHT,
    "block_scale": WSCALES,
    "block_zero": ".wzeros",
    "global_scale": ".wtscale",
    "channel_scale": ".wcscales",
    "bias": ".bias",
    "smooth": ".smooth_factor",
    "proj_down": ".proj_down",
    "proj_up": ".proj_up",
}
V1: Mapping[str, str] = {
    **V2,
    "smooth": ".smooth",
    "proj_down": ".lora_down",
    "proj_up": ".lora_up",
}
"""{part: suffix of its tensor's name}"""
PROJ_UP_SUFFIXES = (V1["proj_up"], V2["proj_up"])
UNUSED = {".smooth_orig", ".smooth_factor_orig"}
UNUSED_REASON = "smoothing before a part of it was folded into other layers; inference ignores it"

NUNCHAKU_LAYOUT = {
    SVDQUANT_INT4.name: Layout("fragments", "fragments", "fragments", "fragments"),
    SVDQUANT_NVFP4.name: Layout("fragments", "micro_fragments", "fragments", "fragments"),
    AWQ_W4A16.name: Layout("awq_words", "awq_groups"),
}
"""{scheme: layout of its parts in Nunchaku's files}"""

GELU_SHIFT = 0.171875
"""Added to the outputs of a GELU, so that the next layer's inputs are not negative.

The minimum of GELU is -0.16998. Source: DeepCompressor, Nunchaku
"""
SHIFTED_LAYER = re.compile(
    r"(.+\.)?(single_)?transformer_blocks\.\d+\."
    r"(mlp_fc2|mlp_context_fc2|ff\.net\.2|ff_context\.net\.2|img_mlp\.net\.2|txt_mlp\.net\.2)"
)
"""INT4 layers that follow a GELU, in FLUX.1 and Qwen-Image; Z-Image's follow a SwiGLU instead."""


def quantized_modules(header: Header) -> dict[str, TensorInfo]:
    """Return {module: its qweight}.

    A layer may lack its wscales, which loading reports, but if all do, the result is empty.
    """
    found = {
        key.removesuffix(QWEIGHT): info
        for key, info in header.tensors.items()
        if key.endswith(QWEIGHT) and info.dtype in (torch.int8, torch.int32)
    }
    return found if any(module + WSCALES in header.tensors for module in found) else {}


def scheme_of(header: Header, module: str) -> Scheme:
    """Return the scheme that the dtypes of a layer's codes and scales show."""
    if header.tensors[module + QWEIGHT].dtype == torch.int32:
        return AWQ_W4A16
    scales = header.tensors.get(module + WSCALES)
    return (
        SVDQUANT_NVFP4
        if scales is not None and scales.dtype == torch.float8_e4m3fn
        else SVDQUANT_INT4
    )


def stored_linear(header: Header, module: str, layout: Layout) -> StoredLinear:
    """Return the layer as the file stores it, with keys of required parts that are absent, too."""
    scheme = scheme_of(header, module)
    rows, half = (*header.tensors[module + QWEIGHT].shape, 0, 0)[:2]
    if scheme is AWQ_W4A16:
        return _modulation(header, module, (rows * 4, half * 2))
    shifted = scheme is SVDQUANT_INT4 and SHIFTED_LAYER.fullmatch(module) is not None
    return StoredLinear(
        module=module,
        scheme=scheme,
        layout=layout,
        shape=(rows, half * 2),
        keys=_keys(header, module, scheme),
        implied_values={"shift": GELU_SHIFT} if shifted else {},
    )


def unused_tensors(header: Header) -> dict[str, str]:
    """Return {key: reason} of the tensors that are ignored."""
    suffixes = tuple(UNUSED)
    return {key: UNUSED_REASON for key in header.tensors if key.endswith(suffixes)}


def ranks(header: Header) -> str:
    """Describe the ranks of the low-rank branches, by the shapes of the tensors."""
    found = {
        info.shape[-1]
        for key, info in header.tensors.items()
        if info.shape and key.endswith(PROJ_UP_SUFFIXES)
    }
    return (
        f"rank {' and '.join(map(str, sorted(found)))} by their proj_up"
        if found
        else "no low-rank branch"
    )


def is_v1(header: Header, module: str) -> bool:
    """Return whether a layer's tensors have the names of Nunchaku's first releases."""
    return any(module + V1[part] in header.tensors for part in ("smooth", "proj_down", "proj_up"))


def _keys(header: Header, module: str, scheme: Scheme) -> dict[str, str]:
    names = V1 if is_v1(header, module) else V2
    parts = [*scheme.parts, "smooth", "proj_down", "proj_up"]
    known = [part for part in ("global_scale", "channel_scale", "bias") if part in scheme.optional]
    parts += [part for part in known if module + names[part] in header.tensors]
    if scheme is SVDQUANT_NVFP4 and not {"global_scale", "channel_scale"} & set(parts):
        parts.append("global_scale")
    return {part: module + names[part] for part in parts}


def _modulation(header: Header, module: str, shape: tuple[int, int]) -> StoredLinear:
    keys = {part: module + V2[part] for part in AWQ_W4A16.parts}
    if module + V2["bias"] in header.tensors:
        keys["bias"] = module + V2["bias"]
    if shape not in [(splits * shape[1], shape[1]) for splits in SPLITS]:
        raise ShapeMismatch(
            f"{header.path}: {module} is an AWQ layer of {shape[0]} x {shape[1]}, expected a "
            f"modulation layer with {' or '.join(map(str, SPLITS))} times as many output as input "
            "features"
        )
    layout = NUNCHAKU_LAYOUT[AWQ_W4A16.name]
    return StoredLinear(module, AWQ_W4A16, layout, shape, keys, postprocess=unfold_modulation)


SPLITS = (6, 3)
"""Vectors that a modulation layer returns: shift, scale and gate, once or for attention and MLP."""


def unfold_modulation(tensor: QuantTensor) -> QuantTensor:
    """Return a modulation layer with rows in the model's order and without the 1 in its bias.

    The layer returns S vectors of D features. Nunchaku stores row s * D + d as row d * S + s. It
    adds 1 to the bias of the scales, vectors 1 and S - 2, which kernels then multiply by directly.
    The bias becomes float32, because its difference from 1 need not be a bf16 number.
    """
    splits = tensor.shape[0] // tensor.shape[1]
    order = torch.arange(tensor.shape[0]).view(-1, splits).t().flatten()
    return _shift_scales(tensor.select_rows(order), -1.0, torch.float32)


def fold_modulation(tensor: QuantTensor) -> QuantTensor:
    """Inverse of `unfold_modulation`; the bias gets the dtype of the scales, as in Nunchaku."""
    splits = tensor.shape[0] // tensor.shape[1]
    folded = _shift_scales(tensor, 1.0, tensor.parts["block_scale"].dtype)
    return folded.select_rows(torch.arange(tensor.shape[0]).view(splits, -1).t().flatten())


def _shift_scales(tensor: QuantTensor, by: float, dtype: torch.dtype) -> QuantTensor:
    """Add `by` to the bias of the scales of a modulation layer with rows in the model's order."""
    if "bias" not in tensor.parts:
        return tensor
    splits = tensor.shape[0] // tensor.shape[1]
    bias = tensor.parts["bias"].float().view(splits, -1).clone()
    bias[[*{1, splits - 2}]] += by
    return replace(tensor, parts={**tensor.parts, "bias": bias.flatten().to(dtype)})
