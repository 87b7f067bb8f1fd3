"""Parts of a quantized weight with random codes, for schemes with and without an encoder."""

import torch
from torch import Tensor

from mezzotint.schemes import CODEBOOK4, INT4_ROWS, INT4_ROWS_A8, INT_GROUPS, W4A8, Scheme
from mezzotint.schemes.gguf_blocks import SCALE_BYTES, from_floats, to_blocks

WEIGHT_STD = 0.02
GROUP = 64
"""Input features that share a scale, where a scheme leaves it to the file."""
SAMPLE_ROWS = 16
LEVEL_SCALE = 14.0
"""Block scale of W4A8, which turns 4-bit codes into 8-bit integers."""
LAST_SCALE = {
    **{scheme.name: "block_scale" for scheme in (CODEBOOK4, *INT_GROUPS.values())},
    **{scheme.name: "weight_scale" for scheme in (INT4_ROWS, INT4_ROWS_A8)},
    W4A8.name: "channel_scale",
}
"""{name of a scheme without an encoder: the part that multiplies last}"""


def has_random_parts(scheme: Scheme) -> bool:
    """Return whether `random_parts` can make layers of the scheme, and files quantize it so."""
    if scheme.encode is not None:
        return scheme.quantize_activation is not None or _has_packed_scales(scheme)
    return _has_packed_scales(scheme) or scheme.name in LAST_SCALE


def random_parts(scheme: Scheme, shape: tuple[int, int], device: torch.device) -> dict[str, Tensor]:
    """Return the parts of a random matrix (out, in) whose weights deviate by about WEIGHT_STD."""
    if scheme.encode is not None:
        return scheme.encode(torch.randn(shape, device=device) * WEIGHT_STD)
    (codes_shape, *_) = scheme.part("codes").shapes(*shape)
    codes = torch.randint(0, 256, codes_shape, dtype=torch.uint8, device=device)
    if _has_packed_scales(scheme):
        return _with_packed_scales(scheme, codes, shape[1])
    last = LAST_SCALE[scheme.name]
    parts = {"codes": codes, last: torch.ones(shape[0], device=device)}
    if "block_scale" in scheme.parts:
        parts["block_scale"] = torch.ones(shape[0], shape[1] // GROUP, device=device)
    if scheme is W4A8:
        parts["block_scale"] = (parts["block_scale"] * LEVEL_SCALE).to(torch.float8_e4m3fn)
    if "codebook" in scheme.parts:
        parts["codebook"] = torch.linspace(-1, 1, 16, device=device)
    return parts | {last: parts[last] * _scale(scheme, parts)}


def _with_packed_scales(scheme: Scheme, codes: Tensor, columns: int) -> dict[str, Tensor]:
    """Overwrite the scales among random codes, which may be infinite."""
    blocks = to_blocks(codes, codes.shape[1] * scheme.group // columns)
    _write_scales(scheme, blocks, torch.ones(1, device=codes.device))
    _write_scales(scheme, blocks, _scale(scheme, {"codes": codes}))
    return {"codes": codes}


def _write_scales(scheme: Scheme, blocks: Tensor, scale: Tensor) -> None:
    for start in scheme.part("codes").packed_at:
        blocks[..., start : start + SCALE_BYTES] = from_floats(scale)


def _scale(scheme: Scheme, parts: dict[str, Tensor]) -> Tensor:
    """Return the scale for WEIGHT_STD, float32 [1], where all scales of `parts` are one."""
    sample = {
        name: part if name == "codebook" else part[:SAMPLE_ROWS] for name, part in parts.items()
    }
    return WEIGHT_STD / scheme.decode(sample).square().mean().sqrt().reshape(1)


def _has_packed_scales(scheme: Scheme) -> bool:
    return bool(scheme.part("codes").packed_at)
