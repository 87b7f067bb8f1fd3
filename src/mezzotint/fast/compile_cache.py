"""Where compiled kernels are kept between processes."""

import os
from pathlib import Path


def compile_cache_folder() -> Path:
    """Return the folder of compiled kernels, and set it for Inductor and Triton.

    TORCHINDUCTOR_CACHE_DIR, or mezzotint/inductor in the user's cache folder. An import of
    diffusers makes PyTorch write its default, a temporary folder, into that variable. Nobody chose
    that value, so it is ignored.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    default = os.path.abspath(default_cache_dir())  # noqa: PTH100, the form that PyTorch writes
    if not folder or folder == default:
        user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(user_cache / "mezzotint/inductor")
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(folder) / "triton"))
    return Path(folder)
