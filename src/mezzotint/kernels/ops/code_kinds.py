"""Kinds of 4-bit codes that our kernels decode, without an import of Triton."""

from mezzotint.schemes import SVDQUANT_INT4, Scheme

E2M1, SIGNED, UNSIGNED = range(3)


def code_kind(scheme: Scheme) -> int:
    """Return the kind of the codes of NVFP4 and of the SVDQuant schemes."""
    return SIGNED if scheme is SVDQUANT_INT4 else E2M1
