"""The models that `bench` times are made of the layers that a file of the scheme has."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mezzotint.bench import PUBLISHED_MODELS, BenchCase, PublishedModel
from mezzotint.bench.random_model import SCHEMES, build
from mezzotint.bench.random_parts import WEIGHT_STD, random_parts
from mezzotint.checkpoint import Checkpoint
from mezzotint.families import families
from mezzotint.families.building import build_meta_model
from mezzotint.fast.passes.fuse_linears import fuse_linears
from mezzotint.loading import Placement, load, plan
from mezzotint.nn import QuantLinear, SplitLinear, quant_linears
from support.nunchaku_files import CASES, golden

CPU = torch.device("cpu")
SVDQUANT = pytest.mark.parametrize("scheme", ["svdquant-int4", "svdquant-nvfp4"])
CONFIGS: dict[str, dict[str, Any]] = {
    "flux1-dev": {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 32,
        "axes_dims_rope": [16, 24, 24],
        "guidance_embeds": True,
    },
    "qwen-image": {
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "joint_attention_dim": 64,
        "axes_dims_rope": [16, 24, 24],
    },
    "z-image-turbo": {
        "dim": 384,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 3,
        "n_kv_heads": 3,
        "cap_feat_dim": 64,
    },
}
JOINED = {
    "flux1-dev": 2 + 1,  # queries, keys and values, of the image and of the text
    "qwen-image": 2,
    "z-image-turbo": 3 * 2,  # gate and up too
}
Small = Callable[..., BenchCase]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Small:
    """A case with another configuration in the place of the published one."""

    def case(model: str, scheme: str, config: dict[str, Any] | None = None) -> BenchCase:
        shape = PUBLISHED_MODELS[model]
        monkeypatch.setitem(
            PUBLISHED_MODELS,
            model,
            PublishedModel(shape.transformer, config or CONFIGS[model], shape.sampling),
        )
        return BenchCase(model, scheme, shape.sampling)

    return case


def family_of(model: nn.Module) -> Any:
    return next(
        family for family in families().values() if family.transformer_class == type(model).__name__
    )


@SVDQUANT
@pytest.mark.parametrize("name", CONFIGS)
def test_svdquant_layers_are_joined_where_a_file_has_one(
    small: Small, name: str, scheme: str
) -> None:
    model = build(small(name, scheme), CPU)
    family = family_of(model)
    assert all(family.nunchaku.quantizes(layer) for layer in quant_linears(model))
    fused, unfused = fuse_linears(model, family.fusable)
    assert fused == JOINED[name]
    assert [group.layers[0] for group in unfused] == (
        ["single_transformer_blocks.0.proj_mlp"] if name == "flux1-dev" else []
    ), "FLUX.1's files have a separate smoothing for it"


@pytest.mark.parametrize("name", CASES)
def test_a_random_model_has_the_layers_of_a_file(data: Path, small: Small, name: str) -> None:
    checkpoint = Checkpoint.open(golden(data, name))
    model = build_meta_model(checkpoint.family.transformer_class, checkpoint.header.config)
    load(plan(checkpoint, model), model, Placement(CPU), torch.bfloat16)
    of = next(
        known
        for known, shape in PUBLISHED_MODELS.items()
        if shape.transformer == checkpoint.family.transformer_class
    )
    scheme = "svdquant-int4" if "int4" in name else "svdquant-nvfp4"
    made = build(small(of, scheme, checkpoint.header.config), CPU)
    stored, built = (
        {key: described(layer) for key, layer in quant_linears(m).items()} for m in (model, made)
    )
    assert built == stored


def described(layer: QuantLinear | SplitLinear) -> list[Any]:
    """Return each sublayer's scheme, shape and parts; files have one of two outer scales."""
    weights = [sublayer.quant_weight for sublayer in layer.sublayers]
    parts = [set(weight.parts) - {"global_scale", "channel_scale"} for weight in weights]
    biases = [sublayer.bias is not None for sublayer in layer.sublayers]
    return [
        (weight.scheme.name, weight.shape, *rest)
        for weight, *rest in zip(weights, parts, biases, strict=True)
    ]


def test_only_svdquant_is_stored_in_pieces(small: Small) -> None:
    for scheme, pieces in (("fp8", 1), ("nvfp4", 1), ("svdquant-int4", 2)):
        block = build(small("flux1-dev", scheme), CPU).get_submodule("single_transformer_blocks.0")
        assert len(block.proj_out.sublayers) == pieces
    first, second = block.proj_out.sublayers
    assert (first.in_features, second.in_features) == (128, 4 * 128)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_pieces_of_a_published_model_are_as_wide_as_its_linears(name: str) -> None:
    model = build_meta_model(PUBLISHED_MODELS[name].transformer, PUBLISHED_MODELS[name].config)
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    family = family_of(model)
    linears = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
    widths = {key: family.nunchaku.piece_columns(key, shapes) for key in linears}
    assert all(sum(columns) == shapes[f"{key}.weight"][1] for key, columns in widths.items())
    in_pieces = {key: columns for key, columns in widths.items() if len(columns) > 1}
    assert len(in_pieces) == (38 if name == "flux1-dev" else 0)
    assert all(columns == [3072, 12288] for columns in in_pieces.values())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_random_weights_of_every_scheme_are_valid_and_as_large_as_usual(scheme: str) -> None:
    made, shape = SCHEMES[scheme], (48, 512)
    parts = random_parts(made, shape, CPU)
    for name, part in parts.items():
        made.check_part(name, tuple(part.shape), part.dtype, shape, name)
        made.check_values(name, part, name)
    weights = made.decode(parts)
    assert 0.9 * WEIGHT_STD < weights.square().mean().sqrt() < 1.1 * WEIGHT_STD


def test_a_model_may_be_of_a_scheme_without_an_encoder(small: Small) -> None:
    model = build(small("flux1-dev", "codebook4"), CPU)
    assert {layer.scheme.name for layer in quant_linears(model).values()} == {"codebook4"}
