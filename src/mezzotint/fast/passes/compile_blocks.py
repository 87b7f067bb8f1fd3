"""Compile the repeated blocks of a model, one by one."""

from typing import Any

import torch
from torch import nn

from mezzotint.fast.edits import ModelEdits
from mezzotint.fast.fast_pass import Applied, Pass, PassContext, repeated_block_classes
from mezzotint.fast.passes.deferred_residual import DeferredResidualBlock

MAX_RECOMPILES = 256
"""Block classes times input shapes, in all models of a process."""


def compile_blocks(model: nn.Module, edits: ModelEdits | None = None, **options: Any) -> None:
    """Compile repeated blocks, like diffusers' `compile_repeated_blocks`.

    All instances of DeferredResidualBlock are one function to Dynamo. It gives up on a function
    that it has compiled for eight kinds of arguments, so the limit of the process is raised.
    """
    edits = edits or ModelEdits()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_RECOMPILES)
    repeated = repeated_block_classes(model)
    for module in model.modules():
        if isinstance(module.forward, DeferredResidualBlock):
            module.forward.compile(**options)
        elif type(module).__name__ in repeated:
            edits.save(module, "_compiled_call_impl")
            module.compile(**options)


def compile_backend(context: PassContext) -> Any:
    """Return the backend for torch.compile.

    Ours takes seconds to import, so it is imported only where there is a GPU.
    """
    if not context.optimizes_for_gpu:
        return "inductor"
    from mezzotint.fast.inductor import inductor_backend

    return inductor_backend


class CompileBlocksPass(Pass):
    """Compile every repeated block."""

    name = "compile_blocks"
    # torch.compile is lazy, but it captures `forward`: all rewrites of blocks come first.
    after = ("attention", "attention_processors", "fuse_linears", "deferred_residual")
    needs_gpu, compile_only = False, True

    def apply(self, model: nn.Module, context: PassContext) -> Applied:
        backend = compile_backend(context)
        compile_blocks(model, context.edits, fullgraph=True, backend=backend)
        return Applied()


PASS = CompileBlocksPass()
