"""Warn in the log before a fast model compiles for another input shape."""

from torch import nn

from mezzotint.fast.fast_pass import Applied, Pass, PassContext
from mezzotint.fast.runtime.recompile_warning import RecompileWarning


class RecompileWarningPass(Pass):
    """Wrap the model's forward in a RecompileWarning."""

    name = "recompile_warning"
    # It must be the innermost wrapper: it looks at the shapes that blocks are compiled for.
    after = ("compile_blocks",)
    needs_gpu, compile_only = False, True

    def apply(self, model: nn.Module, context: PassContext) -> Applied:
        context.edits.set(model, forward=RecompileWarning(model))
        return Applied()


PASS = RecompileWarningPass()
