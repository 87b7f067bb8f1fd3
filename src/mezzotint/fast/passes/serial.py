"""Let threads that call a fast model take turns."""

from torch import nn

from mezzotint.fast.fast_pass import Applied, Pass, PassContext
from mezzotint.fast.runtime.serial import Serial


class SerialPass(Pass):
    """Wrap the model's forward in a lock."""

    name = "serial"
    # The lock must be the outermost wrapper, because all others keep state during a call.
    after = ("precomputed_modulation", "cached_text_refiner", "cuda_graphs", "recompile_warning")
    needs_gpu, compile_only = False, True

    def apply(self, model: nn.Module, context: PassContext) -> Applied:
        context.edits.set(model, forward=Serial(model.forward))
        return Applied()


PASS = SerialPass()
