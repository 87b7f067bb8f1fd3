"""The five families: detected by their tensors in all naming schemes, and named as in diffusers."""

import os
import re
import subprocess
import sys
from functools import cache

import pytest
import torch
from diffusers import FluxTransformer2DModel

from mezzotint.checkpoint import Checkpoint
from mezzotint.errors import (
    MezzotintError,
    MissingTensor,
    UnexpectedTensor,
    UnknownFormat,
    Unsupported,
)
from mezzotint.families import families, family_of
from mezzotint.families.building import build_meta_model
from mezzotint.families.converter_trace import trace_converter
from mezzotint.loading import plan
from support.header_fixtures import MODELS, expand, header_of, read_fixture

FAMILY = {"flux1": "flux1", "flux2": "flux2", "wan2.2": "wan", "z": "zimage", "qwen": "qwenimage"}
TENSORS = {
    "flux1-dev": (1160, 780),
    "flux2-dev": (331, 299),
    "flux2-klein-4b": (169, 149),
    "flux2-klein-9b": (233, 201),
    "wan2.2-t2v-a14b": (1095, 1095),
    "wan2.2-ti2v-5b": (825, 825),
    "z-image-turbo": (521, 454),
    "qwen-image": (1933, 1933),
}
"""{model: how many tensors its diffusers form and its original form have}"""


@pytest.mark.parametrize(
    ("name", "looks"),
    [
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "a LoRA's"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "a LoRA's"),
        ("decoder.conv_in.weight", "a VAE's"),
        ("encoder.block.0.layer.0.SelfAttention.k.weight", "a text encoder's"),
    ],
)
def test_other_components_are_named(name: str, looks: str) -> None:
    with pytest.raises(
        UnknownFormat, match=f"no model family known here .* they look like {looks}"
    ):
        family_of({name: (4, 4)}, "file")


def test_no_tensors_are_no_model() -> None:
    with pytest.raises(UnknownFormat, match="file: holds no tensors of a model"):
        family_of({}, "file")


def checkpoint_of(model: str, form: str) -> Checkpoint:
    fixture = read_fixture(model)
    return Checkpoint.of(header_of(expand(fixture[form]), fixture["config"]))


@cache
def empty_model(model: str) -> torch.nn.Module:
    config = read_fixture(model)["config"]
    return build_meta_model(config["_class_name"], config)


def test_every_family_and_every_size_has_a_fixture() -> None:
    assert sorted(families()) == sorted(set(FAMILY.values()))
    assert sorted(TENSORS) == MODELS


@pytest.mark.parametrize("form", ["diffusers", "original"])
@pytest.mark.parametrize("model", MODELS)
def test_at_full_size_every_tensor_lands_on_one_parameter(model: str, form: str) -> None:
    checkpoint = checkpoint_of(model, form)
    empty = empty_model(model)
    plan(checkpoint, empty)
    assert checkpoint.family.name == FAMILY[model.split("-")[0]]
    assert len(checkpoint.header.tensors) == TENSORS[model][form == "original"]
    assert set(checkpoint.plain) == set(empty.state_dict())
    uses = uses_of_rows(checkpoint)
    assert uses.keys() | checkpoint.ignored.keys() == checkpoint.shapes.keys()
    assert all(bool((count == 1).all()) for count in uses.values())


@pytest.mark.parametrize("form", ["diffusers", "original"])
@pytest.mark.parametrize("model", MODELS)
def test_without_a_configuration_the_shapes_give_the_same_model(model: str, form: str) -> None:
    fixture = read_fixture(model)
    checkpoint = Checkpoint.of(header_of(expand(fixture[form]), {}))
    built = checkpoint.model()
    checkpoint.placed(built)
    expected = {name: value.shape for name, value in empty_model(model).state_dict().items()}
    assert {name: value.shape for name, value in built.state_dict().items()} == expected


def uses_of_rows(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """{stored tensor: how often each of its rows is in the model}"""
    uses: dict[str, torch.Tensor] = {}
    for piece in checkpoint.plain.values():
        count = uses.setdefault(
            piece.source, torch.zeros(checkpoint.shapes[piece.source][0], dtype=torch.int8)
        )
        count[slice(None) if piece.rows is None else piece.rows] += 1
    return uses


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("model", ["flux1-dev", "flux2-klein-4b", "wan2.2-ti2v-5b", "qwen-image"])
def test_a_single_files_prefix_changes_nothing(model: str, prefix: str) -> None:
    fixture = read_fixture(model)
    shapes = {
        name.removeprefix("model.diffusion_model."): shape
        for name, shape in expand(fixture["original"]).items()
    }
    bare, prefixed = (
        Checkpoint.of(
            header_of({before + name: shape for name, shape in shapes.items()}, fixture["config"])
        )
        for before in ("", prefix)
    )
    assert prefixed.family == bare.family
    assert {name: prefix + piece.source for name, piece in bare.plain.items()} == {
        name: piece.source for name, piece in prefixed.plain.items()
    }


def test_what_the_converter_drops_is_ignored_with_its_reason() -> None:
    ignored = checkpoint_of("z-image-turbo", "original").ignored
    assert ignored == {"model.diffusion_model.norm_final.weight": "the model never uses it"}


def test_other_components_of_a_single_file_are_left_aside() -> None:
    fixture = read_fixture("z-image-turbo")
    shapes = expand(fixture["original"]) | {"vae.decoder.conv_in.weight": (4, 4)}
    checkpoint = Checkpoint.of(header_of(shapes, fixture["config"]))
    assert checkpoint.ignored["vae.decoder.conv_in.weight"] == "belongs to another component"
    plan(checkpoint, empty_model("z-image-turbo"))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stray", ["stray.weight", "double_blocks.0.img_attn.qkv.surprise"])
def test_a_tensor_that_reaches_no_place_is_an_error(model: str, stray: str) -> None:
    fixture = read_fixture(model)
    prefix = "model.diffusion_model." if model.startswith(("z", "qwen")) else ""
    shapes = expand(fixture["original"]) | {prefix + stray: (3,)}
    checkpoint = Checkpoint.of(header_of(shapes, fixture["config"]))
    with pytest.raises(UnexpectedTensor, match=stray):
        plan(checkpoint, empty_model(model))


@pytest.mark.parametrize("model", MODELS)
def test_a_tensor_that_is_taken_away_is_missed(model: str) -> None:
    fixture = read_fixture(model)
    shapes = expand(fixture["original"])
    gone = next(
        name for name in reversed(shapes) if name.endswith("weight") and "norm_final" not in name
    )
    del shapes[gone]
    with pytest.raises(MissingTensor, match="not there"):
        plan(Checkpoint.of(header_of(shapes, fixture["config"])), empty_model(model))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"double_blocks.x.img_mod.lin.weight": (4, 4)},
            UnknownFormat,
            "cannot convert the tensors' names",
        ),
        (
            {"single_blocks.0.linear1.weight": (5, 64)},
            UnknownFormat,
            "cannot convert the tensors' names",
        ),
        ({"img_in.weight": (320, 64)}, Unsupported, "320 wide"),
        ({"img_in.weight": ()}, Unsupported, "0 wide"),
        ({"img_in.weight": (2**62, 0)}, Unsupported, "wide"),
        ({"img_in.bias": (2**40,)}, UnknownFormat, "rows in all"),
    ],
)
def test_names_and_shapes_that_no_converter_expects_are_one_error(
    change: dict[str, tuple[int, ...]], error: type[MezzotintError], message: str
) -> None:
    shapes = expand(read_fixture("flux1-dev")["original"]) | change
    with pytest.raises(error, match=message) as caught:
        _ = Checkpoint.of(header_of(shapes, {})).plain
    assert caught.value.message.startswith("model.safetensors: ")


def test_a_tensor_joined_from_two_is_refused() -> None:
    with pytest.raises(UnknownFormat, match="joined from several"):
        trace_converter(
            lambda t: {"c": torch.cat([t["a.weight"], t["b.weight"]])},
            {"a.weight": (2,), "b.weight": (2,)},
        )


def test_a_tiny_flux1_in_the_makers_spelling_is_split_at_its_own_width() -> None:
    config = {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 32,
    }
    model = build_meta_model(
        "FluxTransformer2DModel", config | {"axes_dims_rope": [8, 12, 12], "guidance_embeds": False}
    )
    assert isinstance(model, FluxTransformer2DModel)
    one_block = re.compile(r"(double|single)_blocks\.0\.|(img|txt|time|vector)_in|final_layer")
    narrow = {
        name: tuple(
            64 * side // 3072 if side % 3072 == 0 else 32 if side == 128 else side for side in shape
        )
        for name, shape in expand(read_fixture("flux1-dev")["original"]).items()
        if one_block.match(name)
    }
    checkpoint = Checkpoint.of(header_of(narrow, config))
    plan(checkpoint, model)
    rows = checkpoint.plain["single_transformer_blocks.0.attn.to_v.weight"].rows
    assert rows is not None
    assert rows.tolist() == list(range(128, 192))
    bias = checkpoint.plain["norm_out.linear.bias"].rows
    assert bias is not None
    assert bias.tolist() == [*range(64, 128), *range(64)]


def test_recognizing_a_family_imports_no_converter() -> None:
    code = (
        "import sys; from mezzotint.families import family_of\n"
        "from support import header_fixtures as headers\n"
        "for model in headers.MODELS:\n"
        "    for form in ('diffusers', 'original'):\n"
        "        family_of(headers.expand(headers.read_fixture(model)[form]), model)\n"
        "assert 'diffusers' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
