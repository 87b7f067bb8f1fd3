"""Refine a model's text once per prompt."""

from torch import nn

from mezzotint.fast.edits import ModelEdits
from mezzotint.fast.fast_pass import Applied, Pass, PassContext, Skipped, recipe_of
from mezzotint.fast.runtime.text import CachedTextRefiner


def cache_text_refiner(model: nn.Module, edits: ModelEdits | None = None) -> bool:
    """Refine a model's text once per prompt. Return whether the model has blocks that refine text.

    Must come after whatever else wraps `model.forward`, which then receives refined text.
    """
    refiner = recipe_of(model).text_refiner
    if refiner is None:
        return False
    (edits or ModelEdits()).set(model, forward=CachedTextRefiner(model, refiner))
    return True


class CachedTextRefinerPass(Pass):
    """Wrap the model's forward in a CachedTextRefiner."""

    name = "cached_text_refiner"
    # Recorded graphs get refined text; a graph that refined it would do so in every step.
    after = ("recompile_warning", "cuda_graphs")

    def apply(self, model: nn.Module, context: PassContext) -> Applied | Skipped:
        if not cache_text_refiner(model, context.edits):
            return Skipped("the model has no blocks for text alone")
        assert isinstance(model.forward, CachedTextRefiner)  # noqa: S101
        context.precomputations.append(model.forward)
        return Applied({"caches_text_refiner": True})


PASS = CachedTextRefinerPass()
