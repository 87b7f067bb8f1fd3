"""Defer each block's last addition to the next block.

A block ends with x + gate * branch, and the next one normalizes that sum first. Blocks are compiled
one by one, because compiling them together takes minutes. Then one kernel writes the sum and
another reads it. If the next block gets x, gate and branch instead, one kernel adds, normalizes and
quantizes.
"""

import inspect
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.families.recipe import ResidualBlock
from mezzotint.fast.edits import ModelEdits
from mezzotint.fast.fast_pass import Applied, Pass, PassContext, Skipped, recipe_of
from mezzotint.fast.passes.fused_activation import (
    flux1_single_block_forward,
    flux1_single_stream_forward,
)

MIN_BLOCKS = 4
"""Shortest row of blocks for which the work saved inside exceeds the work added at its ends."""


class DeferredResidual:
    """The sum x + gate * branch, not computed yet. The output of a rewritten block.

    branch       [batch, tokens, width]
    norm_weight  [width] of an RMS norm that `branch` goes through first, with `norm_eps`; or None
    gate         [batch * width], or of every token. It is flat: to the compiler, a slice of a row
                 then looks like any other tensor
    x            [batch, tokens, width]
    text_tokens  number of text tokens, where text and image are one sequence
    """

    def __init__(
        self, branch: Tensor, norm_weight: Tensor | None = None, norm_eps: float = 0.0
    ) -> None:
        self.branch, self.norm_weight, self.norm_eps = branch, norm_weight, norm_eps
        self.text_tokens = 0
        self.gate: Any = None
        self.x: Any = None

    @classmethod
    def __torch_function__(
        cls, function: Any, _types: Any, operands: Any = (), _kwargs: Any = None
    ) -> "DeferredResidual":
        """Record gate * branch, and x + that. PyTorch calls this for operands in either order."""
        left, right = operands
        residual, other = (right, left) if isinstance(right, DeferredResidual) else (left, right)
        # Dynamo traces this method, so that blocks of diffusers need no rewrite: their last line
        # computes x + gate * module(...). See docs/decisions/0006-sums-left-unfinished.md.
        if function is Tensor.mul and residual.gate is None:
            residual.gate = other.expand(len(residual.branch), -1, -1).flatten()
            return residual
        if function is Tensor.add:
            return residual.add(other)
        raise TypeError(f"{function} of a sum that is deferred to the next block")

    @property
    def dtype(self) -> torch.dtype:
        return self.branch.dtype

    def clip(self, _low: float, _high: float) -> "DeferredResidual":
        """Do nothing. Blocks clip in float16, and `compute` does it for them."""
        return self

    def __add__(self, other: Tensor) -> "DeferredResidual":
        """Record a sum. Python calls this for residual + tensor, Dynamo `__torch_function__`."""
        return self.add(other)

    def add(self, other: Tensor) -> "DeferredResidual":
        """Record x. After that, add what a ControlNet or an IP-adapter adds to the image tokens.

        Raises   TypeError if there is no gate yet
        """
        if self.gate is None:
            raise TypeError("a branch that is deferred to the next block is added without a gate")
        self.x = other if self.x is None else self.x + F.pad(other, (0, 0, self.text_tokens, 0))
        return self

    def __getitem__(self, index: Any) -> "DeferredResidual":
        """Return the residual of some tokens, as in residual[:, first:last]."""
        part = DeferredResidual(self.branch[index], self.norm_weight, self.norm_eps)
        gate = self.gate.view(len(self.x), -1, self.x.shape[2])
        # A gate per sample has one row and applies to every token; a gate per token is cut too.
        part.x, part.gate = self.x[index], (gate[index] if gate.shape[1] > 1 else gate).flatten()
        return part

    def compute(self) -> Tensor:
        """Return the sum [batch, tokens, width]."""
        branch = self.branch
        if self.norm_weight is not None:
            branch = F.rms_norm(branch, self.norm_weight.shape, self.norm_weight, self.norm_eps)
        y = torch.addcmul(self.x, self.gate.view(len(self.x), -1, self.x.shape[2]), branch)
        # The range of float16, to which diffusers' blocks clip their sums.
        return y.clip(-65504, 65504) if y.dtype == torch.float16 else y


class DeferredResidualBlock:
    """The forward of a block that takes deferred residuals, and may return them.

    recipe   names of the block's last modules and arguments
    is_last  True if what follows takes tensors only
    """

    def __init__(self, block: Any, recipe: ResidualBlock, edits: ModelEdits) -> None:
        self.block, self.arguments, self.is_last = block, recipe.arguments, True
        self.block_forward = block.forward.__func__
        self.signature = inspect.signature(MethodType(type(block).forward, block))
        self.compiled: Callable[..., Any] | None = None
        self.modules = [block.get_submodule(name) for name in recipe.last_modules]
        for module in self.modules:
            edits.set(module, forward=MethodType(_defer_branch, module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.signature.bind(*args, **kwargs).arguments
        residuals = {
            name: self.as_deferred(arguments[name])
            for name in self.arguments
            if arguments.get(name) is not None
        }
        output = (self.compiled or self.forward_deferred)(**arguments | residuals)
        return _compute_all(output) if self.is_last else output

    def forward_deferred(self, **arguments: Any) -> Any:
        """Run the block from deferred residuals to deferred residuals. This is what is compiled."""
        tensors = {
            name: arguments[name].compute()
            for name in self.arguments
            if arguments.get(name) is not None
        }
        return self.block_forward(self.block, **arguments | tensors)

    def as_deferred(self, x: Tensor | DeferredResidual) -> DeferredResidual:
        """Return x + 0 * x in the form that the previous block would have returned.

        All blocks of a row then have inputs of one kind, and share one compiled graph.
        """
        if isinstance(x, DeferredResidual):
            return x
        last = self.modules[0]
        weight, eps = (torch.ones_like(last.weight), last.eps) if _is_norm(last) else (None, 0.0)
        # A view: if branch and x were one object, Dynamo would compile another graph for that.
        residual = DeferredResidual(x.view_as(x), weight, eps)
        residual.x, residual.gate = x, x.new_zeros(x.shape[0] * x.shape[2])
        return residual

    def __getstate__(self) -> dict[str, Any]:
        """Leave out compiled code, as nn.Module does: it belongs to this block only."""
        return self.__dict__ | {"compiled": None}

    def compile(self, **options: Any) -> None:
        """Compile the block in place, like nn.Module.compile."""
        self.compiled = torch.compile(self.forward_deferred, **options)


class DeferredResidualSingleBlock(DeferredResidualBlock):
    """The forward of FLUX.1's single blocks, which concatenate text and image and split them again.

    Between two blocks, `hidden_states` is a residual of both, and `encoder_hidden_states` is the
    text before the first block, of which only the length matters.
    """

    def __init__(self, block: Any, recipe: ResidualBlock, edits: ModelEdits) -> None:
        super().__init__(block, recipe, edits)
        self.arguments = ("x",)
        self.block_forward = flux1_single_stream_forward

    def __call__(
        self, hidden_states: Any, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        x, text_tokens = hidden_states, encoder_hidden_states.shape[1]
        if isinstance(x, Tensor):
            x = torch.cat((encoder_hidden_states, x), 1)
        arguments = self.signature.bind(x, encoder_hidden_states, *args, **kwargs).arguments
        del arguments["hidden_states"], arguments["encoder_hidden_states"]
        output = (self.compiled or self.forward_deferred)(x=self.as_deferred(x), **arguments)
        output.text_tokens = text_tokens
        if not self.is_last:
            return encoder_hidden_states, output
        joint = output.compute()
        return joint[:, :text_tokens], joint[:, text_tokens:]


class FinalLayerAdapter(DeferredResidualBlock):
    """The forward of the module that reads the last block's output: a norm, with or without a
    linear.

    It reads image tokens only.
    """

    def __call__(self, x: DeferredResidual, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(x[:, x.text_tokens :], *args, **kwargs)


def defer_residuals(model: nn.Module, edits: ModelEdits | None = None) -> int:
    """Defer the last addition of blocks in every supported row. Return how many blocks do so."""
    edits = edits or ModelEdits()
    recipe = recipe_of(model)
    known = {block.class_name: block for block in recipe.residual_blocks}
    rows = [list(child) for child in model.children() if isinstance(child, nn.ModuleList)]
    wrapped = [_wrap_blocks(row, known, edits) if _is_supported(row, known) else [] for row in rows]
    if wrapped and wrapped[-1] and recipe.final_layer is not None:
        wrapped[-1][-1].is_last = False
        for layer in _final_layers(getattr(model, recipe.final_layer)):
            # Diffusers calls the argument `x` in every class of final layer.
            adapted = ResidualBlock(type(layer).__name__, (), ("x",))
            edits.set(layer, forward=FinalLayerAdapter(layer, adapted, edits))
    return sum(not forward.is_last for row in wrapped for forward in row)


def _final_layers(module: nn.Module) -> list[nn.Module]:
    """Return the modules that may follow the last block. Z-Image has one per patch size."""
    return list(module.values()) if isinstance(module, nn.ModuleDict) else [module]


def _wrap_blocks(
    row: Sequence[Any], known: dict[str, ResidualBlock], edits: ModelEdits
) -> list[DeferredResidualBlock]:
    for block in row:
        recipe = known[type(block).__name__]
        wrapper = DeferredResidualSingleBlock if recipe.needs_rewrite else DeferredResidualBlock
        forward = wrapper(block, recipe, edits)
        forward.is_last = block is row[-1]
        edits.set(block, forward=forward)
    return [block.forward for block in row]


def _is_supported(row: Sequence[Any], known: dict[str, ResidualBlock]) -> bool:
    """Return whether a row is long enough, and each of its blocks ends as its recipe says."""
    return len(row) >= MIN_BLOCKS and all(
        type(block).__name__ in known and _ends_as_named(block, known[type(block).__name__])
        for block in row
    )


def _ends_as_named(block: Any, recipe: ResidualBlock) -> bool:
    if recipe.needs_rewrite:
        return getattr(block.forward, "__func__", None) is flux1_single_block_forward
    if recipe.unsupported is None:
        return True
    attribute, value = recipe.unsupported
    return bool(getattr(block, attribute, not value)) is not value


def _is_norm(module: Any) -> bool:
    """Return whether a last module normalizes the branch, rather than computing it."""
    return type(module).__name__ == "RMSNorm"


def _defer_branch(module: Any, *args: Any, **kwargs: Any) -> DeferredResidual:
    """Replace the forward of a block's last module."""
    if _is_norm(module):
        (branch,) = args
        return DeferredResidual(branch, module.weight.detach(), module.eps)
    return DeferredResidual(type(module).forward(module, *args, **kwargs))


def _compute_all(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(_compute_all(part) for part in output)
    return output.compute() if isinstance(output, DeferredResidual) else output


class DeferredResidualPass(Pass):
    """Let blocks defer their last addition."""

    name = "deferred_residual"
    # Fused activations replace modules whose forward is changed here, and the forward of FLUX.1's
    # single blocks. Fused linears replace modules inside of those.
    after = ("fused_activation", "fuse_linears")

    def apply(self, model: nn.Module, context: PassContext) -> Applied | Skipped:
        count = defer_residuals(model, context.edits)
        if not count:
            return Skipped("the model has no row of blocks that can defer their last addition")
        return Applied({"deferred_residuals": count})


PASS = DeferredResidualPass()
