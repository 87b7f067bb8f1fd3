"""Every name in a family's recipe exists in the installed diffusers: upstream renames fail here."""

import inspect
from typing import Any

import diffusers
import pytest
from torch import nn

from mezzotint.families import families
from mezzotint.families.building import build_meta_model
from mezzotint.families.recipe import Recipe
from mezzotint.fast.fast_pass import recipe_of
from mezzotint.fast.passes import ordered_passes
from mezzotint.fast.passes.attention_processors import PROCESSORS
from mezzotint.fast.passes.fused_activation import REWRITES

NAMES = list(families())


def model_of(name: str) -> tuple[Any, Recipe]:
    model = build_meta_model(families()[name].transformer_class, {})
    return model, recipe_of(model)


def modules(model: nn.Module, class_name: str) -> list[Any]:
    found = [module for module in model.modules() if type(module).__name__ == class_name]
    assert found, f"{type(model).__name__} has no {class_name}"
    return found


@pytest.mark.parametrize("name", NAMES)
def test_processors_are_those_of_the_model(name: str) -> None:
    model, recipe = model_of(name)
    present = {type(getattr(module, "processor", None)).__name__ for module in model.modules()}
    assert set(recipe.attn_processors) <= present
    assert set(recipe.attn_processors.values()) <= set(PROCESSORS)


@pytest.mark.parametrize("name", NAMES)
def test_rewritten_modules_have_the_attributes_that_rewrites_use(name: str) -> None:
    model, recipe = model_of(name)
    for class_name, rewrite in recipe.rewrites.items():
        assert rewrite.kind in REWRITES
        for module in modules(model, class_name):
            assert all(hasattr(module, attribute) for attribute in rewrite.attributes)


@pytest.mark.parametrize("name", NAMES)
def test_residual_blocks_have_the_modules_and_arguments_of_the_recipe(name: str) -> None:
    model, recipe = model_of(name)
    for block in recipe.residual_blocks:
        for module in modules(model, block.class_name):
            assert all(module.get_submodule(last) is not None for last in block.last_modules)
            assert set(block.arguments) <= set(inspect.signature(module.forward).parameters)
            assert block.unsupported is None or hasattr(module, block.unsupported[0])
    if recipe.final_layer is not None:
        layer = getattr(model, recipe.final_layer)
        layers = layer.values() if isinstance(layer, nn.ModuleDict) else [layer]
        assert all("x" in inspect.signature(each.forward).parameters for each in layers)


@pytest.mark.parametrize("name", NAMES)
def test_the_text_refiner_is_where_the_recipe_says(name: str) -> None:
    model, recipe = model_of(name)
    refiner = recipe.text_refiner
    if refiner is None:
        return
    assert refiner.text_argument in inspect.signature(model.forward).parameters
    for module in (refiner.embedder, refiner.blocks, refiner.image_blocks):
        assert isinstance(model.get_submodule(module), nn.Module)
    join = inspect.signature(getattr(model, refiner.join)).parameters
    assert {refiner.join_text, refiner.join_lengths} <= set(join)


def test_every_family_names_a_class_of_diffusers() -> None:
    for family in families().values():
        assert hasattr(diffusers, family.transformer_class)


def test_passes_run_after_those_that_they_name() -> None:
    seen: set[str] = set()
    for fast_pass in ordered_passes():
        assert set(fast_pass.after) <= seen, fast_pass.name
        seen.add(fast_pass.name)
    assert list(ordered_passes())[-1].name == "serial"
