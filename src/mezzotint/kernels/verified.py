"""What has run on which hardware, for reports and for the table of backends in the README.

Add an entry when `pytest -m gpu` has passed with the backend on a GPU of that generation. The
figures are in docs/numerics.md. On a CPU every test runs, so nothing needs an entry.
"""

CPU = "cpu"
NOT_VERIFIED = "not verified on hardware"
DEQUANTIZED = (
    *("gguf_q8_0", "gguf_q6_k", "gguf_q5_k", "gguf_q5_1", "gguf_q5_0", "gguf_q4_k", "gguf_q4_1"),
    *("gguf_q4_0", "gguf_q3_k", "gguf_q2_k", "gguf_iq4_nl", "gguf_iq4_xs", "codebook4", "mxfp8"),
    *("int2_groups", "int3_groups", "int4_groups", "int5_groups", "int6_groups", "int7_groups"),
    *("int8_groups", "awq_centered", "fp8_groups", "fp8_e5m2", "llm_int8"),
)
"""Schemes whose kernel of the backend `dequantize` has run."""
VERIFIED = frozenset(
    {
        *((name, "sm_90", "dequantize") for name in DEQUANTIZED),
        *((name, "sm_90", "int8_mm") for name in ("int8", "int4_rows_a8", "w4a8")),
        ("fp8", "sm_90", "scaled_mm"),
        ("nvfp4", "sm_90", "dequant_fp8"),
        ("nvfp4", "sm_90", "humming"),
        ("svdquant_int4", "sm_90", "dequant_fp8"),
        ("svdquant_nvfp4", "sm_90", "dequant_fp8"),
        ("awq_w4a16", "sm_90", "gemv"),
    }
)
"""(scheme, target, backend)"""


def is_verified(scheme: str, target: str, backend: str) -> bool:
    """Return whether a test has passed with this backend on such a device.

    target   "cpu", "sm_90", ...
    """
    return target == CPU or (scheme, target, backend) in VERIFIED
