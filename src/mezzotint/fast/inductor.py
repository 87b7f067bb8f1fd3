"""Compile the blocks of a fast model with Inductor, with some of its choices overridden."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._inductor.choices import InductorChoices
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V
from torch.fx import GraphModule

from mezzotint._version import VERSION
from mezzotint.fast.activations import tanh_by_sigmoid, tanh_gelu

INDUCTOR_CONFIG: dict[str, Any] = {"max_autotune_pointwise": True}
"""Measure a few tile sizes of each elementwise kernel and keep the fastest."""

MAX_PERSISTENT_ROW = 8192
"""Elements of a row that a norm may keep in registers. The widest supported model has 6144."""


def inductor_backend(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Compile a graph; the signature is that of a torch.compile backend."""
    with (
        V.set_choices_handler(PersistentRowChoices()),
        # Inductor's cache does not know our choices, so another version must not find its kernels.
        torch.compiler.config.patch(  # type: ignore[attr-defined]
            cache_key_tag=f"mezzotint {VERSION}"
        ),
    ):
        table = select_decomp_table() | DECOMPOSITIONS
        compiled: Any = compile_fx(
            graph, inputs, config_patches=INDUCTOR_CONFIG, decompositions=table
        )
    return compiled  # type: ignore[no-any-return]


class PersistentRowChoices(InductorChoices):
    """Let norms read each row once and keep it in registers. Inductor reads rows beyond 1024 twice.

    `triton.multi_kernel` would generate and measure both kernels. In PyTorch 2.11 it fails if a
    kernel comes from the cache. It also never preferred the other kernel where it matters.
    """

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        # A dynamic length is a symbol, which cannot be compared here.
        row = features.reduction_numel
        fits: bool = (
            row.is_number
            and row <= MAX_PERSISTENT_ROW
            and features.get_reduction_hint() == ReductionHint.INNER
        )
        return fits or InductorChoices.should_use_persistent_reduction(
            features, cooperative_reduction
        )


def _gelu(x: Tensor, *, approximate: str = "none") -> Any:
    return tanh_gelu(x) if approximate == "tanh" else NotImplemented


def _clamp(x: Tensor, low: float | None = None, high: float | None = None) -> Any:
    """Clamp x by two comparisons, which keep NaN.

    Inductor tests for NaN as well, with three more instructions.
    """
    if low is None or high is None:
        return NotImplemented
    return torch.where(x > high, high, torch.where(x < low, low, x))


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.clamp.default: _clamp,
    torch.ops.aten.gelu.default: _gelu,
    torch.ops.aten.tanh.default: tanh_by_sigmoid,
}
"""{operation: the same function in fewer instructions}.

A norm followed by quantization is limited by instructions, not by memory. For 4608 x 3840 elements,
CUDA's tanh took 17 of 63 us, and clamping to the range of FP8 took 3 of 25 us.
"""
