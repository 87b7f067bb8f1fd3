"""What has run on which hardware: the README's table of kernels and every report read it here.

An entry is made when `pytest -m gpu` has passed with the backend on a GPU of that generation
(tests/test_gpu_backends.py, tests/test_gpu.py); the figures are in docs/numerics.md. On a CPU every test runs, and
nothing needs an entry.
"""

CPU = "cpu"
NOT_VERIFIED = "not verified on hardware"
VERIFIED = frozenset(
    {
        ("fp8", "sm_90", "scaled_mm"),
        ("nvfp4", "sm_90", "expand"),
        ("nvfp4", "sm_90", "humming"),
        ("svdquant_int4", "sm_90", "expand"),
        ("svdquant_nvfp4", "sm_90", "expand"),
        ("awq_w4a16", "sm_90", "gemv"),
    }
)
"""(scheme, target, backend)"""


def is_verified(scheme: str, target: str, backend: str) -> bool:
    """Whether a test has passed with this backend on such a device; `target` is "cpu", "sm_90", ..."""
    return target == CPU or (scheme, target, backend) in VERIFIED
