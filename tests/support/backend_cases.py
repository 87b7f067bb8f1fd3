"""Layers that every backend runs."""

import torch
from torch import Tensor

from mezzotint.kernels import (
    BF16_ACTIVATIONS,
    QUANTIZED_ACTIVATIONS,
)
from mezzotint.nn import QuantLinear
from mezzotint.schemes import NVFP4, SVDQUANT_NVFP4
from mezzotint.tensor import PLAIN, QuantTensor, concat_rows
from support import four_bit_weights as four_bits

OUT, IN, ROWS = 256, 384, 37


def joined(out: int, in_: int) -> QuantTensor:
    """Two NVFP4 matrices on the same input, whose scales are kept by row."""
    one, two = four_bits.nvfp4(out // 2, in_), four_bits.nvfp4(out // 2, in_)
    return concat_rows(
        [one, two.with_parts({**two.parts, "global_scale": two.parts["global_scale"] * 3}, PLAIN)]
    )


def with_channels(out: int, in_: int) -> QuantTensor:
    """Nunchaku's NVFP4 of fused q, k and v: a scale for each row, and one for the matrix."""
    weight = four_bits.svdquant(SVDQUANT_NVFP4, out, in_)
    scale = (four_bits.random(out, seed=5).abs() + 0.5).bfloat16()
    return weight.with_parts({**weight.parts, "channel_scale": scale}, PLAIN)


def smoothed_exactly(weight: QuantTensor) -> QuantTensor:
    """Round the smoothing to powers of two.

    Smoothing an input is then exact in BF16 as in float32, and gives the same codes.
    """
    names = {"smooth", "pre_quant_scale"} & set(weight.parts)
    powers = {name: torch.exp2(torch.log2(weight.parts[name].float()).round()) for name in names}
    return weight.with_parts(
        {**weight.parts, **{n: p.to(weight.parts[n].dtype) for n, p in powers.items()}}, PLAIN
    )


def all_forms(out: int, in_: int) -> dict[str, QuantTensor]:
    others = {"nvfp4, joined": joined(out, in_), "svdquant_nvfp4, by row": with_channels(out, in_)}
    return {
        name: smoothed_exactly(weight)
        for name, weight in (four_bits.all_of(out, in_) | others).items()
    }


FORMS = all_forms(OUT, IN)


FP4_FORMS = [name for name in FORMS if "int4" not in name]


RUNS = [
    *(("torch_nvfp4", name) for name in FP4_FORMS),
    *(("comfy_kitchen", name) for name in FP4_FORMS),
    *(("flashinfer", name) for name in FP4_FORMS),
    *(("humming", name) for name in FP4_FORMS if not name.startswith("svdquant")),
    ("nunchaku_int4", "svdquant_int4"),
    ("nunchaku_nvfp4", "svdquant_nvfp4"),
    ("nunchaku_nvfp4", "svdquant_nvfp4, by row"),
    *(("dequantize", name) for name in FORMS if not name.startswith("svdquant")),
    *(("weight_only", name) for name in FORMS),
]


BF16_INPUT = ("dequantize", "humming", "weight_only")


QUANTIZES_AS_NVFP4 = ("comfy_kitchen", "flashinfer")


def sample(rows: int = ROWS, in_: int = IN) -> Tensor:
    """Return an input within the range of the static scales after smoothing: BF16 [1, rows, in]."""
    return (four_bits.random(1, rows, in_, seed=9).clamp(-4, 4) / 3).bfloat16()


def as_standard_nvfp4(weight: QuantTensor) -> QuantTensor:
    """Convert SVDQuant NVFP4 to NVFP4 with an input scale of 1, instead of Nunchaku's scales."""
    one = torch.ones_like(weight.parts["global_scale"])
    parts = dict(weight.parts) | {"input_scale": one}
    parts["global_scale"] = parts["global_scale"] * parts.pop("channel_scale", one).float()
    return QuantTensor(NVFP4, PLAIN, weight.shape, parts)


def expected(backend: str, weight: QuantTensor, x: Tensor) -> Tensor:
    """Return the output of `reference` in float32, with inputs quantized as in the backend."""
    if backend in QUANTIZES_AS_NVFP4 and weight.scheme is SVDQUANT_NVFP4:
        weight = as_standard_nvfp4(weight)
    activations = BF16_ACTIVATIONS if backend in BF16_INPUT else QUANTIZED_ACTIVATIONS
    return QuantLinear(weight, torch.float32, activations, backend_name="reference")(x.float())
