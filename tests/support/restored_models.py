"""Apply all passes to a model, and compare a restored model with the one that it was."""

from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.families import families
from mezzotint.fast import FastTransformer, SpeedReport
from mezzotint.fast.edits import ModelEdits
from mezzotint.fast.fast_pass import PassContext
from mezzotint.fast.passes.attention import ATTENTION_BACKENDS
from mezzotint.fast.passes.attention_processors import replace_attn_processors
from mezzotint.fast.passes.cached_text_refiner import cache_text_refiner
from mezzotint.fast.passes.deferred_residual import defer_residuals
from mezzotint.fast.passes.fuse_linears import fuse_linears
from mezzotint.fast.passes.fused_activation import fuse_activations
from mezzotint.fast.passes.precomputed_modulation import precompute_modulation
from mezzotint.kernels import Target
from support.modulation_models import SCHEDULE

CPU = Target("cpu")
REPORT = SpeedReport("sdpa", {}, "")


def structure(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Classes, processors and instance forwards of all modules, by name and in order."""
    return {
        name: (
            type(module),
            type(getattr(module, "processor", None)),
            vars(module).get("forward"),
            vars(module).get("_compiled_call_impl"),
            sorted(vars(module).keys() - {"modes"}),  # the model owns its modes, fast or not
        )
        for name, module in model.named_modules()
    }


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def assert_restored(model: nn.Module, modules: dict[str, Any], weights: dict[str, Tensor]) -> None:
    assert structure(model) == modules
    assert list(structure(model)) == list(modules)
    state = model.state_dict()
    assert state.keys() == weights.keys()
    for name, tensor in weights.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(bits(state[name]), bits(tensor)), name


def apply_all(model: Any, family: str) -> FastTransformer:
    """Apply every pass that a CPU can run, including those that `speed_up` keeps for GPUs."""
    edits = ModelEdits()
    recipe = families()[family].fast
    fuse_activations(model, CPU, recipe, edits)
    replace_attn_processors(model, ATTENTION_BACKENDS["sdpa"], recipe, edits)
    fuse_linears(model, families()[family].fusable, edits)
    defer_residuals(model, edits)
    cache_text_refiner(model, edits)
    precompute_modulation(model, SCHEDULE, edits=edits)
    return FastTransformer(model, REPORT, PassContext(CPU, families()[family], edits=edits))
