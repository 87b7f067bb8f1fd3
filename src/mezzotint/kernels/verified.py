"""What has run on which hardware, for reports and for the table of backends in the README.

Add an entry when `pytest -m gpu` has passed with the backend on a GPU of that generation. The
figures are in docs/numerics.md. On a CPU every test runs, so nothing needs an entry.
"""

CPU = "cpu"
NOT_VERIFIED = "not verified on hardware"
VERIFIED = frozenset(
    {
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
