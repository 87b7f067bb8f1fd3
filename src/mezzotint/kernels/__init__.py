"""Backends, one per file, and their selection."""

from mezzotint.kernels.backend import (
    ACTIVATION_MODES,
    BF16_ACTIVATIONS,
    QUANTIZED_ACTIVATIONS,
    Backend,
    Can,
    Cannot,
    WeightSpec,
    takes,
)
from mezzotint.kernels.backend_use import BackendUse, merge_uses
from mezzotint.kernels.discovery import (
    BackendChoice,
    all_backends,
    backend_for_scheme,
    check_backend_choice,
    get_backend,
)
from mezzotint.kernels.selection import WITH_PYTORCH, Selection, select, select_bf16_backend
from mezzotint.kernels.target import GPU_GENERATIONS, Target, best_device, resolve_device

__all__ = [
    "ACTIVATION_MODES",
    "BF16_ACTIVATIONS",
    "GPU_GENERATIONS",
    "QUANTIZED_ACTIVATIONS",
    "WITH_PYTORCH",
    "Backend",
    "BackendChoice",
    "BackendUse",
    "Can",
    "Cannot",
    "Selection",
    "Target",
    "WeightSpec",
    "all_backends",
    "backend_for_scheme",
    "best_device",
    "check_backend_choice",
    "get_backend",
    "merge_uses",
    "resolve_device",
    "select",
    "select_bf16_backend",
    "takes",
]
