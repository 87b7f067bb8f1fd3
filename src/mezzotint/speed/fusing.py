"""Layers that read the same input become one product."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from mezzotint.errors import ShapeMismatch
from mezzotint.nn import GroupedLinear, LinearGroup, QuantLinear
from mezzotint.tensor import join_rows


@dataclass(frozen=True)
class Unfused:
    """Layers that could have been one product, and why they are not."""

    layers: tuple[str, ...]
    reason: str


def fuse(model: nn.Module, together: Sequence[Sequence[str]]) -> tuple[int, list[Unfused]]:
    """Replace, in every block of `model`, the quantized linears that `together` names by one product each.

    together   groups of names within a block, such as ("attn.to_q", "attn.to_k", "attn.to_v"); see Family.together
    Returns    how many products were made, and the groups that had to stay apart
    """
    made, apart = 0, []
    for prefix, block in list(model.named_modules()):
        for names in together:
            layers = [_module(block, name) for name in names]
            if all(isinstance(layer, QuantLinear) for layer in layers):
                reason = _join(block, names, [layer for layer in layers if isinstance(layer, QuantLinear)])
                made += reason is None
                if reason is not None:
                    apart.append(Unfused(tuple(f"{prefix}.{name}" for name in names), reason))
    return made, apart


def _module(block: nn.Module, name: str) -> nn.Module | None:
    for step in name.split("."):
        block = block._modules.get(step)  # type: ignore[assignment]
        if block is None:
            return None
    return block


def _join(block: nn.Module, names: Sequence[str], layers: Sequence[QuantLinear]) -> str | None:
    """Put one product in place of these layers, or say why not."""
    try:
        group = LinearGroup(joined(layers), [layer.out_features for layer in layers])
    except ShapeMismatch as error:
        return str(error)
    for member, name in enumerate(names):
        block.set_submodule(name, GroupedLinear(group, member))
    return None


def joined(layers: Sequence[QuantLinear]) -> QuantLinear:
    """One layer that multiplies what these read, their output features one after another.

    Raises   ShapeMismatch where they differ in what a joined weight has only once, or in their backend
    """
    first = layers[0]
    if any(layer.selection.backend is not first.selection.backend for layer in layers):
        raise ShapeMismatch("they run on different backends")
    weight = join_rows([layer.plain_weight() for layer in layers])
    return QuantLinear(weight, first.compute_dtype, first.activations, first.only)
