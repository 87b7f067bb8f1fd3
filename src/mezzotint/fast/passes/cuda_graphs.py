"""Record each input shape of a model as a CUDA graph."""

from torch import nn

from mezzotint.fast.fast_pass import Applied, Pass, PassContext
from mezzotint.fast.runtime.cuda_graphs import CudaGraphRunner
from mezzotint.nn import modes_of


class CudaGraphsPass(Pass):
    """Wrap the model's forward in a CudaGraphRunner."""

    name = "cuda_graphs"
    # A replay runs no Python code, so the warning about shapes belongs to what is recorded.
    after = ("recompile_warning",)

    def apply(self, model: nn.Module, context: PassContext) -> Applied:
        modes = modes_of(model)
        runner = CudaGraphRunner(model.forward, lambda: modes.key, model)
        context.edits.set(model, forward=runner)
        return Applied({"uses_cuda_graphs": True})


PASS = CudaGraphsPass()
