"""`speed_up`, and the FastTransformer that it returns."""

from typing import Any

from torch import nn

from mezzotint.errors import BadRequest
from mezzotint.families import family_by_transformer
from mezzotint.fast.compile_cache import compile_cache_folder
from mezzotint.fast.fast_pass import Applied, PassContext, Scheduler
from mezzotint.fast.passes import ordered_passes
from mezzotint.fast.report import SpeedReport
from mezzotint.fast.runtime.cuda_graphs import CudaGraphRunner
from mezzotint.fast.runtime.modulation import PrecomputedModulation
from mezzotint.fast.runtime.recompile_warning import RecompileWarning
from mezzotint.fast.runtime.serial import Serial
from mezzotint.fast.runtime.text import CachedTextRefiner
from mezzotint.kernels import Target

WRAPPERS = (
    Serial,
    RecompileWarning,
    CudaGraphRunner,
    CachedTextRefiner,
    PrecomputedModulation,
)
"""What passes wrap `model.forward` in."""


class FastTransformer:
    """A transformer that `speed_up` changed in place, with what is needed to change it back.

    model    the transformer, to be called and moved as before
    report   what was done
    """

    def __init__(self, model: nn.Module, report: SpeedReport, context: PassContext) -> None:
        self.model, self.report = model, report
        self._context = context

    @property
    def precomputes(self) -> bool:
        """Return whether some results are computed once and reused in several calls."""
        return bool(self._context.precomputations)

    def precompute(self, *args: Any, **kwargs: Any) -> None:
        """Compute modulation and refined text for calls with these arguments."""
        for precomputation in self._context.precomputations:
            precomputation.precompute(*args, **kwargs)

    def reset_caches(self) -> None:
        """Forget modulation and refined text. Compiled code and recorded CUDA graphs are kept."""
        for precomputation in self._context.precomputations:
            precomputation.reset()

    def restore(self) -> nn.Module:
        """Return the model as it was before `speed_up`, with bit-identical outputs.

        Fused layers are split, and processors, activations, modulation layers and forwards are put
        back. The model stays on its present device and in its present dtype. Later calls do
        nothing.
        """
        self._context.edits.undo()
        self._context.precomputations.clear()
        return self.model


def speed_up(
    model: nn.Module,
    attention: str | None = None,
    compile_only: bool = False,
    scheduler: Scheduler | None = None,
) -> FastTransformer:
    """Make a diffusers transformer as fast as it can be on its device, in place.

    The first call compiles, once per input shape; the log warns of every shape but the first.
    Compiled kernels are kept in `compile_cache_folder`, so the next process starts in seconds. When
    weights are replaced or moved, calls are recorded again, as the log says. In-place changes to
    weights are not detected, nor are changes to other state, such as the scale of a LoRA. Threads
    that call the model take turns.

    attention     name of an attention backend, or None for the fastest BF16 one
    compile_only  True to select the attention and compile the repeated blocks only, as diffusers'
                  documentation recommends
    scheduler     scheduler of the model's pipeline; with it, modulation is precomputed for all
                  steps
    Raises        BadRequest if the model was sped up before, Unsupported if the attention backend
                  cannot run here
    """
    if isinstance(model.forward, WRAPPERS):
        raise BadRequest(
            "this transformer was sped up already",
            "call restore() of what speed_up returned, or load the model again.",
        )
    name = type(model).__name__
    context = PassContext(
        target=Target.of(next(model.parameters()).device),
        family=family_by_transformer(name, name),
        attention=attention,
        scheduler=scheduler,
        compile_only=compile_only,
    )
    # This sets the folder, and Inductor and Triton read it when they compile.
    fields: dict[str, Any] = {"compile_cache": str(compile_cache_folder())}
    return FastTransformer(model, SpeedReport(**fields | _run_passes(model, context)), context)


def _run_passes(model: nn.Module, context: PassContext) -> dict[str, Any]:
    """Run all passes and return fields of SpeedReport."""
    fields: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for fast_pass in ordered_passes():
        outcome = fast_pass.run(model, context)
        fields |= outcome.report
        if not isinstance(outcome, Applied):
            skipped[fast_pass.name] = outcome.reason
    return fields | {"skipped": skipped}
