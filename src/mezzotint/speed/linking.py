"""Blocks in a row that leave their last addition to the next one.

A block adds a gated product to its input last; the next one normalises the sum first. Blocks are compiled one by one,
so that compiling does not take minutes, and then one kernel writes the sum and another one reads it. If the second
block is handed what is to be added instead, a single kernel adds, normalises and rounds.
"""

import inspect
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.speed.rewriting import flux1_single_block, flux1_single_stream

STREAMS = ("x", "hidden_states", "encoder_hidden_states")
"""What diffusers' blocks call what they add to, and hand on."""

LAST = {
    "FluxTransformerBlock": ("ff", "ff_context"),
    "FluxSingleTransformerBlock": ("proj_out",),
    "Flux2TransformerBlock": ("ff", "ff_context"),
    "Flux2SingleTransformerBlock": ("attn",),
    "QwenImageTransformerBlock": ("img_mlp", "txt_mlp"),
    "ZImageTransformerBlock": ("ffn_norm2",),
}
"""{diffusers' class: modules whose results it multiplies by a gate and adds to its input, which is the last it does}"""

SHORTEST = 4
"""Blocks of a row, below which what is done once at its ends takes longer than what is saved in between."""

MOST_KINDS = 256
"""Classes of blocks times shapes, in all the models of a process."""


class Unfinished:
    """x + gate * product, not added up: what a block writes of a product that `_left` has made.

    product   [batch, tokens, width]
    weight    [width] of an RMS norm that the product goes through first, with `eps`; or None
    gate      [batch * width], or of every token; flat, so that a part of a row looks to the compiler like any tensor
    x         [batch, tokens, width]
    before    how many tokens are the text's, where text and picture are one sequence
    """

    def __init__(self, product: Tensor, weight: Tensor | None = None, eps: float = 0.0) -> None:
        self.product, self.weight, self.eps, self.before = product, weight, eps, 0
        self.gate: Any = None
        self.x: Any = None

    @classmethod
    def __torch_function__(cls, function: Any, _types: Any, operands: Any = (), _others: Any = None) -> "Unfinished":
        """What PyTorch asks for gate * product, and for x + that, in either order."""
        left, right = operands
        total, other = (right, left) if isinstance(right, Unfinished) else (left, right)
        if function is Tensor.mul and total.gate is None:
            total.gate = other.expand(len(total.product), -1, -1).flatten()
            return total
        if function is Tensor.add:
            return total.plus(other)
        raise TypeError(f"{function} of a sum that is left to the next block")

    @property
    def dtype(self) -> torch.dtype:
        return self.product.dtype

    def clip(self, _low: float, _high: float) -> "Unfinished":
        """Blocks do so in float16; `finished` does."""
        return self

    def __add__(self, other: Tensor) -> "Unfinished":
        """Python asks this of a sum + tensor, Dynamo `__torch_function__`."""
        return self.plus(other)

    def plus(self, other: Tensor) -> "Unfinished":
        """With x; or, once there is one, with what a ControlNet or an IP-adapter adds to the picture's tokens."""
        if self.gate is None:
            raise TypeError("a product that is left to the next block is added without a gate")
        self.x = other if self.x is None else self.x + F.pad(other, (0, 0, self.before, 0))
        return self

    def __getitem__(self, places: Any) -> "Unfinished":
        """Of some of the tokens: [:, first:last]."""
        some = Unfinished(self.product[places], self.weight, self.eps)
        gate = self.gate.view(len(self.x), -1, self.x.shape[2])
        some.x, some.gate = self.x[places], (gate[places] if gate.shape[1] > 1 else gate).flatten()
        return some

    def finished(self) -> Tensor:
        """The sum [batch, tokens, width]."""
        product = self.product
        if self.weight is not None:
            product = F.rms_norm(product, self.weight.shape, self.weight, self.eps)
        y = torch.addcmul(self.x, self.gate.view(len(self.x), -1, self.x.shape[2]), product)
        return y.clip(-65504, 65504) if y.dtype == torch.float16 else y


class Link:
    """A block's forward, whose result may be left unfinished.

    last   whether what follows takes no unfinished sum
    """

    def __init__(self, block: Any) -> None:
        self.block, self.last = block, True
        self.function = block.forward.__func__
        self.signature = inspect.signature(MethodType(type(block).forward, block))
        self.compiled: Callable[..., Any] | None = None
        self.modules = [block.get_submodule(name) for name in LAST.get(type(block).__name__, ())]
        for module in self.modules:
            module.forward = MethodType(_left, module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.signature.bind(*args, **kwargs).arguments
        sums = {name: self.begun(given[name]) for name in STREAMS if given.get(name) is not None}
        result = (self.compiled or self.between)(**given | sums)
        return _finished(result) if self.last else result

    def between(self, **given: Any) -> Any:
        """What every block of a class does the same, from unfinished sums to unfinished sums."""
        sums = {name: given[name].finished() for name in STREAMS if given.get(name) is not None}
        return self.function(self.block, **given | sums)

    def begun(self, x: Tensor | Unfinished) -> Unfinished:
        """x with nothing to be added to it, in the form in which the block before would have left a sum."""
        if isinstance(x, Unfinished):
            return x
        norm = self.modules[0]
        weight, eps = (torch.ones_like(norm.weight), norm.eps) if _is_norm(norm) else (None, 0.0)
        nothing = Unfinished(x.view_as(x), weight, eps)
        nothing.x, nothing.gate = x, x.new_zeros(x.shape[0] * x.shape[2])
        return nothing

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not compiled, as one of an nn.Module is not: compiled code belongs to this link's block."""
        return self.__dict__ | {"compiled": None}

    def compile(self, **options: Any) -> None:
        """As nn.Module.compile."""
        self.compiled = torch.compile(self.between, **options)


class JoinedLink(Link):
    """FLUX.1's single blocks, which diffusers hands text and picture apart, only to put them side by side again.

    Between two blocks both are in what stands for the picture, and the text is that of before the first one.
    """

    def __init__(self, block: Any) -> None:
        super().__init__(block)
        self.function = flux1_single_stream

    def __call__(self, hidden_states: Any, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        x, before = hidden_states, encoder_hidden_states.shape[1]
        if isinstance(x, Tensor):
            x = torch.cat((encoder_hidden_states, x), 1)
        given = self.signature.bind(x, encoder_hidden_states, *args, **kwargs).arguments
        del given["hidden_states"], given["encoder_hidden_states"]
        result = (self.compiled or self.between)(x=self.begun(x), **given)
        result.before = before
        if not self.last:
            return encoder_hidden_states, result
        whole = result.finished()
        return whole[:, :before], whole[:, before:]


class Tail(Link):
    """The forward of what reads the last block's sum: a norm and, in Z-Image, a product, of the picture only."""

    def __call__(self, x: Unfinished, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(x[:, x.before :], *args, **kwargs)


def compile_blocks(model: Any, **options: Any) -> None:
    """As diffusers' compile_repeated_blocks.

    All links are one function to Dynamo, which gives up on one that it has compiled for eight kinds of arguments,
    unless told otherwise for the whole process.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_KINDS)
    for module in model.modules():
        if isinstance(module.forward, Link):
            module.forward.compile(**options)
        elif type(module).__name__ in model._repeated_blocks:
            module.compile(**options)


def link(model: Any) -> int:
    """Link the blocks of every row in `model` that are known here; returns how many leave a sum to what follows."""
    rows = [list(child) for child in model.children() if isinstance(child, nn.ModuleList)]
    linked = [_linked(row) if len(row) >= SHORTEST and all(_possible(block) for block in row) else [] for row in rows]
    if linked and linked[-1]:
        linked[-1][-1].last = False
        for tail in model.all_final_layer.values() if hasattr(model, "all_final_layer") else [model.norm_out]:
            tail.forward = Tail(tail)
    return sum(not one.last for links in linked for one in links)


def _linked(row: Sequence[Any]) -> list[Link]:
    for block in row:
        joined = block.forward.__func__ is flux1_single_block
        block.forward = JoinedLink(block) if joined else Link(block)
        block.forward.last = block is row[-1]
    return [block.forward for block in row]


def _possible(block: Any) -> bool:
    """Z-Image's text is not modulated; Qwen-Image-Edit may have a gate for every token."""
    if type(block).__name__ == "FluxSingleTransformerBlock":
        return getattr(block.forward, "__func__", None) is flux1_single_block
    known = type(block).__name__ in LAST
    return known and getattr(block, "modulation", True) is not False and not getattr(block, "zero_cond_t", False)


def _is_norm(module: Any) -> bool:
    """Whether a last module is the norm of a product rather than what makes it."""
    return type(module).__name__ == "RMSNorm"


def _left(module: Any, *args: Any, **kwargs: Any) -> Unfinished:
    """The forward of a block's last module."""
    if _is_norm(module):
        (product,) = args
        return Unfinished(product, module.weight.detach(), module.eps)
    return Unfinished(type(module).forward(module, *args, **kwargs))


def _finished(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(_finished(part) for part in result)
    return result.finished() if isinstance(result, Unfinished) else result
