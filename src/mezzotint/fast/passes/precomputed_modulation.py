"""Compute the modulation of all blocks for all steps at once."""

from torch import nn

from mezzotint.families import family_by_transformer
from mezzotint.fast.edits import ModelEdits
from mezzotint.fast.fast_pass import (
    Applied,
    Pass,
    PassContext,
    Scheduler,
    Skipped,
    repeated_block_classes,
)
from mezzotint.fast.runtime.cuda_graphs import CudaGraphRunner
from mezzotint.fast.runtime.modulation import (
    ComputeOutputs,
    PrecomputedLinear,
    PrecomputedModulation,
    RecordGraph,
)
from mezzotint.nn import modes_of


def precompute_modulation(
    model: nn.Module,
    scheduler: Scheduler,
    record_graph: RecordGraph = lambda function, _layers: function,
    edits: ModelEdits | None = None,
) -> int:
    """Replace a model's modulation layers by their precomputed outputs, and return how many there
    are.

    Must come after whatever else wraps `model.forward`, which sees outputs change in place.
    """
    edits = edits or ModelEdits()
    family = family_by_transformer(type(model).__name__, type(model).__name__)
    embedding = family.time_embedding
    if embedding is None:
        return 0
    key = embedding.unsupported_config_key
    if key and getattr(model.config, key, None):
        return 0
    layers = [
        _replace_layer(block, name, edits)
        for block in model.modules()
        if type(block).__name__ in repeated_block_classes(model)
        for name in family.modulation_layers
        if name in dict(block.named_modules())
    ]
    forward = PrecomputedModulation(model, embedding, layers, scheduler, record_graph)
    edits.set(model, forward=forward)
    return len(layers)


def _replace_layer(block: nn.Module, name: str, edits: ModelEdits) -> PrecomputedLinear:
    layer = PrecomputedLinear(block.get_submodule(name))
    edits.replace_layer(block, name, layer, lambda: layer.layer)
    return layer


class PrecomputedModulationPass(Pass):
    """Wrap the model's forward in a PrecomputedModulation."""

    name = "precomputed_modulation"
    # It writes outputs where recorded graphs read them, so it stays outside of the graphs. Blocks
    # are compiled when they are first called, which is after this pass.
    after = ("cuda_graphs", "cached_text_refiner")

    def apply(self, model: nn.Module, context: PassContext) -> Applied | Skipped:
        if context.scheduler is None:
            return Skipped("no scheduler was given")
        modes = modes_of(model)

        def record_graph(function: ComputeOutputs, layers: nn.Module) -> ComputeOutputs:
            return CudaGraphRunner(function, lambda: modes.key, layers)

        count = precompute_modulation(model, context.scheduler, record_graph, context.edits)
        if not isinstance(model.forward, PrecomputedModulation):
            return Skipped("no modulation layers of this model can be precomputed")
        context.precomputations.append(model.forward)
        return Applied({"precomputed_layers": count})


PASS = PrecomputedModulationPass()
