"""What Nunchaku's files and row-major SVDQuant files have in common: tensor names, and what was folded into layers.

v2 (Qwen-Image, Z-Image)  v1 (FLUX.1)   shape and dtype; N = out, K = in, R = rank
X.qweight                 X.qweight     [N, K/2] int8                        codes
X.wscales                 X.wscales     [K/64, N] bf16 or [K/16, N] e4m3     block_scale: its dtype tells the scheme
X.wcscales, X.wtscale     the same      [N], [1] bf16, NVFP4 only            channel_scale, global_scale
X.bias                    X.bias        [N]                                  bias
X.smooth_factor           X.smooth      [K]                                  smooth
X.proj_down, X.proj_up    X.lora_down   [K, R], [N, R]                       proj_down, proj_up

AWQ W4A16 layers: X.qweight int32 [N/4, K/2], X.wscales and X.wzeros bf16 [K/64 padded, N], X.bias [N].
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
UNUSED_REASON = (
    "smoothing as it was found, before any of it went into another layer; nothing multiplies by it"
)

NUNCHAKU_LAYOUT = {
    SVDQUANT_INT4.name: Layout("fragments", "fragments", "fragments", "fragments"),
    SVDQUANT_NVFP4.name: Layout("fragments", "micro_fragments", "fragments", "fragments"),
    AWQ_W4A16.name: Layout("awq_words", "awq_groups"),
}
"""{scheme: how Nunchaku stores it}"""

GELU_SHIFT = 0.171875
"""Added to what leaves a GELU so that no input of the next layer is negative. Source: DeepCompressor, Nunchaku"""
SHIFTED_LAYER = re.compile(
    r"(.+\.)?(single_)?transformer_blocks\.\d+\."
    r"(mlp_fc2|mlp_context_fc2|ff\.net\.2|ff_context\.net\.2|img_mlp\.net\.2|txt_mlp\.net\.2)"
)
"""INT4 layers that follow a GELU: FLUX.1's and Qwen-Image's. Z-Image's follow a SwiGLU and are not shifted."""


def quantized_modules(header: Header) -> dict[str, TensorInfo]:
    """{module: its qweight} of every layer with a qweight and wscales, or one that lacks its wscales among others."""
    found = {
        key.removesuffix(QWEIGHT): info
        for key, info in header.tensors.items()
        if key.endswith(QWEIGHT) and info.dtype in (torch.int8, torch.int32)
    }
    return found if any(module + WSCALES in header.tensors for module in found) else {}


def scheme_of(header: Header, module: str) -> Scheme:
    """The scheme that the dtypes of a layer's codes and scales show."""
    if header.tensors[module + QWEIGHT].dtype == torch.int32:
        return AWQ_W4A16
    scales = header.tensors.get(module + WSCALES)
    return (
        SVDQUANT_NVFP4
        if scales is not None and scales.dtype == torch.float8_e4m3fn
        else SVDQUANT_INT4
    )


def stored_linear(header: Header, module: str, layout: Layout) -> StoredLinear:
    """The layer as the file holds it; keys that the scheme calls for are named whether they are there or not."""
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
    """{key: why it is ignored}"""
    suffixes = tuple(UNUSED)
    return {key: UNUSED_REASON for key in header.tensors if key.endswith(suffixes)}


def ranks(header: Header) -> str:
    """The ranks of the low-rank branches, in words, from the tensors' own shapes."""
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
    """Whether a layer's tensors have the older names."""
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
            f"{header.path}: {module} is an AWQ layer of {shape[0]} x {shape[1]}, expected a modulation layer "
            f"with {' or '.join(map(str, SPLITS))} times as many output as input features"
        )
    layout = NUNCHAKU_LAYOUT[AWQ_W4A16.name]
    return StoredLinear(module, AWQ_W4A16, layout, shape, keys, postprocess=unfold_modulation)


SPLITS = (6, 3)
"""How many vectors a modulation layer gives: shift, scale and gate for attention, and again for the MLP."""


def unfold_modulation(tensor: QuantTensor) -> QuantTensor:
    """A modulation layer with rows in the model's order and without the 1 that Nunchaku adds to its scales.

    Nunchaku keeps row s of D as row d * S + s, and has 1 in the bias of the scales, which are split 1 and split S - 2.
    The bias is float32 afterwards, because its difference from 1 need not be a bf16 number.
    """
    splits = tensor.shape[0] // tensor.shape[1]
    order = torch.arange(tensor.shape[0]).view(-1, splits).t().flatten()
    return _shift_scales(tensor.select_rows(order), -1.0, torch.float32)


def fold_modulation(tensor: QuantTensor) -> QuantTensor:
    """Inverse of `unfold_modulation`; the bias is rounded to the dtype of the scales, as Nunchaku has it."""
    splits = tensor.shape[0] // tensor.shape[1]
    folded = _shift_scales(tensor, 1.0, tensor.parts["block_scale"].dtype)
    return folded.select_rows(torch.arange(tensor.shape[0]).view(splits, -1).t().flatten())


def _shift_scales(tensor: QuantTensor, by: float, dtype: torch.dtype) -> QuantTensor:
    """The modulation layer, rows in the model's order, with `by` added to the bias of its scales."""
    if "bias" not in tensor.parts:
        return tensor
    splits = tensor.shape[0] // tensor.shape[1]
    bias = tensor.parts["bias"].float().view(splits, -1).clone()
    bias[[*{1, splits - 2}]] += by
    return replace(tensor, parts={**tensor.parts, "bias": bias.flatten().to(dtype)})
