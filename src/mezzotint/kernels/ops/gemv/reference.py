"""Define the product of a few vectors and a 4-bit matrix; the kernel must match it."""

from torch import Tensor

from mezzotint.kernels.ops.code_kinds import E2M1, SIGNED
from mezzotint.schemes.minifloats import unpack_e2m1, unpack_nibbles


def gemv4_reference(
    x: Tensor,
    codes: Tensor,
    block_scale: Tensor,
    block_zero: Tensor | None,
    factor: Tensor,
    kind: int,
    group: int,
) -> Tensor:
    """Compute x [m, in] @ ((code * block_scale + block_zero) * factor).T; float32 [m, out].

    codes         uint8 [out, in/2], low nibble first
    block_scale   e4m3 or bf16 [out, in/group]; block_zero likewise or None
    factor        float32 [out]
    kind          of the codes: E2M1, SIGNED or UNSIGNED of `code_kinds`
    """
    codes_out, half = codes.shape
    groups = _decode(codes, kind).reshape(codes_out, 2 * half // group, group)
    # A zero point is a value, not a code: files of AWQ layers store -zero * scale.
    values: Tensor = groups * block_scale.float()[..., None]
    if block_zero is not None:
        values = values + block_zero.float()[..., None]
    return x.float() @ (values.flatten(1) * factor[:, None]).t()


def _decode(codes: Tensor, kind: int) -> Tensor:
    if kind == E2M1:
        return unpack_e2m1(codes)
    values = unpack_nibbles(codes).float()
    return values - 16 * (values >= 8) if kind == SIGNED else values
