"""Fuse linear layers that read the same input into one matrix multiplication."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from mezzotint.errors import ShapeMismatch
from mezzotint.fast.edits import ModelEdits
from mezzotint.fast.fast_pass import Applied, Pass, PassContext
from mezzotint.fast.report import UnfusedLayers
from mezzotint.nn import FusedLinear, FusedLinearSlice, LowRankAdapter, QuantLinear, fuse_layers
from mezzotint.tensor import QuantTensor


def fuse_linears(
    model: nn.Module, fusable: Sequence[Sequence[str]], edits: ModelEdits | None = None
) -> tuple[int, list[UnfusedLayers]]:
    """Fuse, in every block of `model`, the quantized linears that `fusable` groups.

    fusable  groups of names within a block, such as ("attn.to_q", "attn.to_k", "attn.to_v"); see
             Family.fusable. The first group whose layers are all still separate wins.
    Returns  how many groups were fused, and those that could not be
    """
    edits = edits or ModelEdits()
    fused, unfused = 0, []
    for prefix, block in list(model.named_modules()):
        for names in fusable:
            layers = [_find_submodule(block, name) for name in names]
            linears = [layer for layer in layers if isinstance(layer, QuantLinear)]
            if len(linears) < len(layers):  # absent, not quantized, or fused already
                continue
            reason = _fuse_group(block, names, linears, edits)
            if reason is None:
                fused += 1
            else:
                unfused.append(UnfusedLayers(tuple(f"{prefix}.{name}" for name in names), reason))
    return fused, unfused


def _find_submodule(block: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = block
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module


def _fuse_group(
    block: nn.Module, names: Sequence[str], layers: Sequence[QuantLinear], edits: ModelEdits
) -> str | None:
    """Replace layers by slices of a fused one. Return why not, if they cannot be fused."""
    try:
        linear, originals = fuse_with_undo(layers)
    except ShapeMismatch as error:
        return str(error)
    group = FusedLinear(linear, [layer.out_features for layer in layers])
    for index, (name, original) in enumerate(zip(names, originals, strict=True)):
        edits.replace_layer(block, name, FusedLinearSlice(group, index), original)
    return None


def fuse_with_undo(
    layers: Sequence[QuantLinear],
) -> tuple[QuantLinear, list[Callable[[], QuantLinear]]]:
    """Fuse layers. Return the fused layer, and a function per layer that splits it off again.

    Raises   ShapeMismatch as fuse_layers does
    """
    fused = fuse_layers(layers)
    # Shapes, not tensors: keeping the layers would hold every weight in memory twice.
    weights = [layer.plain_weight(torch.device("meta")) for layer in layers]
    starts = [sum(weight.shape[0] for weight in weights[:index]) for index in range(len(weights))]
    split = zip(weights, starts, strict=True)
    return fused, [partial(_split_layer, fused, weight, start) for weight, start in split]


def _split_layer(fused: QuantLinear, original: QuantTensor, start: int) -> QuantLinear:
    """Return the layer whose output features begin at `start` in a fused one, bit by bit.

    original   the layer's weight as it was, on the meta device
    """
    weight = fused.plain_weight()
    rows, fused_rows = original.shape[0], weight.shape[0]
    parts = {}
    for name, meta in original.parts.items():
        part = weight.parts[name]
        if weight.scheme.part(name).rows and part.shape[:1] == (fused_rows,):
            # A scale per weight became one per row when the scales differed. One row has it.
            count = rows if meta.shape[:1] == (rows,) else 1
            part = part[start : start + count].reshape(meta.shape)
        parts[name] = part.clone(memory_format=torch.contiguous_format)
    layer = QuantLinear(
        replace(original, parts=parts), fused.compute_dtype, fused.activations, fused.backend_name
    )
    layer.modes = fused.modes
    for key, adapter in fused.adapters.items():
        if isinstance(adapter, LowRankAdapter) and start <= adapter.start < start + rows:
            layer.adapters[key.rpartition("@")[0] or key] = adapter.shifted(-start)
    return layer.train(fused.training)


class FuseLinearsPass(Pass):
    """Fuse the groups of linears that the family names."""

    name = "fuse_linears"
    # Fused activations take linears into fused layers of their own; the rest is grouped here.
    after = ("fused_activation",)
    needs_gpu = False

    def apply(self, model: nn.Module, context: PassContext) -> Applied:
        fused, unfused = fuse_linears(model, context.family.fusable, context.edits)
        return Applied({"fused_groups": fused, "unfused": tuple(unfused)})


PASS = FuseLinearsPass()
