"""Detect blank layers, whose weights are all zero or all equal; `load` and `verify` share this."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mezzotint.tensor import QuantTensor

SAMPLE = 4096
"""Values that are checked first: in an intact layer they differ, and the rest need not be read."""
SCALES = "block_scale", "weight_scale"
BLANK_SCALES = "every one of its scales is zero: the layer is blank"
BLANK_WEIGHT = "is all zeros"


def blank_codes(byte: int) -> str:
    """Return the message for a layer whose codes are all this byte."""
    return f"every code is 0x{byte:02x}: the layer is blank"


def why_blank(weight: QuantTensor) -> str:
    """Return the message of a blank quantized layer, or an empty string."""
    codes = weight.parts["codes"]
    if codes.dtype.is_floating_point and codes.dtype.itemsize > 1:
        return "" if _any(codes) else BLANK_WEIGHT
    raw = codes.reshape(-1).view(torch.uint8)
    if raw.numel() > 1 and _alike(raw[:SAMPLE]) and _alike(raw):
        return blank_codes(int(raw[0]))
    packed_scales = weight.scheme.part("codes").packed_scales
    if packed_scales is not None:
        return "" if _any(packed_scales(codes)) else BLANK_SCALES
    scales = next((weight.parts[part] for part in SCALES if part in weight.parts), None)
    return BLANK_SCALES if scales is not None and scales.numel() and not _any(scales) else ""


def is_blank(name: str, values: Tensor) -> bool:
    """Return whether an unquantized weight matrix holds nothing but zeros."""
    return is_matrix(name, values.shape) and values.numel() > 0 and not _any(values)


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Return whether a tensor is a layer's weight matrix; in a trained model, none is all zeros."""
    return len(shape) == 2 and name.endswith(".weight")


def _alike(raw: Tensor) -> bool:
    return bool((raw == raw[0]).all())


def _any(values: Tensor) -> bool:
    flat = values.reshape(-1)
    return bool(flat[:SAMPLE].float().any()) or bool(flat.float().any())
