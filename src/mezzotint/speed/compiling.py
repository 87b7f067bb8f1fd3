"""How a fast model's blocks are compiled on a GPU: by Inductor, with a few of its choices made for it."""

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
from mezzotint.speed.activations import tanh_by_sigmoid, tanh_gelu

TUNED: dict[str, Any] = {"max_autotune_pointwise": True}
"""A few tile sizes of each elementwise kernel are measured."""

LONGEST_ROW = 8192
"""Numbers of a row that a norm may keep in registers; the widest model here has 6144."""


def tuned(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """A backend of torch.compile."""
    with (
        V.set_choices_handler(RowsInRegisters()),
        torch.compiler.config.patch(cache_key_tag=f"mezzotint {VERSION}"),  # type: ignore[attr-defined]
    ):
        table = select_decomp_table() | DECOMPOSITIONS
        compiled: Any = compile_fx(graph, inputs, config_patches=TUNED, decompositions=table)
    return compiled  # type: ignore[no-any-return]


class RowsInRegisters(InductorChoices):
    """Norms that read a row once and keep it, whatever its length; Inductor's own read rows beyond 1024 twice.

    It can write both kernels and measure them (`triton.multi_kernel`), which fails in PyTorch 2.11 where a kernel comes
    from the cache, and has never preferred the other one where it matters.
    """

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        row = features.reduction_numel
        fits: bool = row.is_number and row <= LONGEST_ROW and features.get_reduction_hint() == ReductionHint.INNER
        return fits or InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)


def _gelu(x: Tensor, *, approximate: str = "none") -> Any:
    return tanh_gelu(x) if approximate == "tanh" else NotImplemented


def _clamp(x: Tensor, low: float | None = None, high: float | None = None) -> Any:
    """A comparison each way hands NaN on; Inductor asks for it besides, which takes three instructions more."""
    if low is None or high is None:
        return NotImplemented
    return torch.where(x > high, high, torch.where(x < low, low, x))


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.clamp.default: _clamp,
    torch.ops.aten.gelu.default: _gelu,
    torch.ops.aten.tanh.default: tanh_by_sigmoid,
}
"""{operation: the same function in fewer instructions}. A norm and the rounding behind it wait for instructions, not
for memory: of 4608 x 3840 numbers, a gate through CUDA's tanh took 17 of 63 us, clamping to FP8's range 3 of 25."""
