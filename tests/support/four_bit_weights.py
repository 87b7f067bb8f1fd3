"""4-bit layers with random weights, in the form in which each scheme is published."""

import torch
from torch import Tensor

from mezzotint.schemes import NVFP4, SVDQUANT_INT4, SVDQUANT_NVFP4, Scheme
from mezzotint.schemes.nvfp4 import encode_nvfp4
from mezzotint.schemes.svdquant_int4 import encode_svdquant_int4
from mezzotint.tensor import PLAIN, QuantTensor

RANK = 16


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nvfp4(out: int, in_: int, static: bool = True) -> QuantTensor:
    """ModelOpt's, with a bias; its input scale, if it has one, is of inputs up to 4."""
    parts = encode_nvfp4(random(out, in_, seed=0)) | {"bias": random(out, seed=1)}
    parts |= {"input_scale": torch.tensor(4 / (6 * 448))} if static else {}
    return QuantTensor(NVFP4, PLAIN, (out, in_), parts, dynamic_input=not static)


def nvfp4_awq(out: int, in_: int) -> QuantTensor:
    """Return ModelOpt's NVFP4_SVD: smoothing, a static scale of its output, a low-rank branch."""
    weight = nvfp4(out, in_)
    parts = {
        "pre_quant_scale": random(in_, seed=2).abs() + 0.5,
        "lora_down": (random(RANK, in_, seed=3) * 0.1).bfloat16(),
        "lora_up": (random(out, RANK, seed=4) * 0.1).bfloat16(),
    }
    return weight.with_parts({**weight.parts, **parts}, PLAIN)


def svdquant(scheme: Scheme, out: int, in_: int) -> QuantTensor:
    """Nunchaku's: smoothing, and a low-rank branch on the layer's own input."""
    encode = encode_svdquant_int4 if scheme is SVDQUANT_INT4 else encode_nvfp4
    parts = encode(random(out, in_, seed=0)) | {
        "bias": random(out, seed=1),
        "smooth": (random(in_, seed=2).abs() + 0.5).bfloat16(),
        "proj_down": (random(RANK, in_, seed=3) * 0.1).bfloat16(),
        "proj_up": (random(out, RANK, seed=4) * 0.1).bfloat16(),
    }
    return QuantTensor(scheme, PLAIN, (out, in_), parts, dynamic_input=True)


def shifted(out: int, in_: int) -> QuantTensor:
    """Nunchaku's INT4 after a GELU, whose input is shifted to be positive."""
    weight = svdquant(SVDQUANT_INT4, out, in_)
    return weight.with_parts({**weight.parts, "shift": torch.tensor(0.171875)}, PLAIN)


def all_of(out: int, in_: int) -> dict[str, QuantTensor]:
    return {
        "nvfp4, static": nvfp4(out, in_),
        "nvfp4, dynamic": nvfp4(out, in_, static=False),
        "nvfp4_svd": nvfp4_awq(out, in_),
        "svdquant_int4": svdquant(SVDQUANT_INT4, out, in_),
        "svdquant_int4, shifted": shifted(out, in_),
        "svdquant_nvfp4": svdquant(SVDQUANT_NVFP4, out, in_),
    }
