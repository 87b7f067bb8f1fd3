"""Files as people have them: rebuilt from public reports, each with what should become of it.

The makers that a report came with are in ../shared/field; here is what of them a test needs.
"""

import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import mezzotint
from fuzz import fuzz_conversions
from mezzotint.checkpoint import Checkpoint, inspect
from mezzotint.errors import (
    BadRequest,
    MezzotintError,
    MissingTensor,
    UnexpectedTensor,
    UnknownFormat,
    UnreadFormat,
)
from mezzotint.formats import read_header
from mezzotint.loading import Placement, load, plan
from mezzotint.nn import quant_linears

E4M3, E5M2, F32 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float32
PREFIX = "model.diffusion_model."
ENCODER = "text_encoders.qwen25_7b.transformer.model.layers.0.mlp.up_proj"
SIZES = {
    "num_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
}
QUERY = "transformer_blocks.0.attn.to_q"
Tensors = dict[str, Tensor]


def qwen(**entries: object) -> nn.Module:
    torch.manual_seed(0)
    config = {
        **SIZES,
        "in_channels": 64,
        "out_channels": 16,
        "axes_dims_rope": (8, 12, 12),
        **entries,
    }
    return diffusers.QwenImageTransformer2DModel(**config).bfloat16()


def state(model: nn.Module) -> Tensors:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def weights() -> Tensors:
    return state(qwen())


def is_layer(name: str, value: Tensor) -> bool:
    return "blocks" in name and name.endswith(".weight") and value.ndim == 2


def note(**entries: object) -> Tensor:
    return torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)


def scaled(
    weights: Tensors, scale_of: Callable[[Tensor], Tensor], suffix: str, dtype: torch.dtype = E4M3
) -> Tensors:
    """Return the blocks' matrices in FP8 with the scale of `scale_of`, as float32 or 16 bits."""
    stored = {}
    for name, value in weights.items():
        if is_layer(name, value):
            scale = scale_of(value.float())
            codes = (value.float() / scale.float()).clamp(-448, 448).to(dtype)
            stored |= {name: codes, name.replace(".weight", suffix): scale}
    return weights | stored


def by_matrix(value: Tensor) -> Tensor:
    return value.abs().max() / 448


def noted(weights: Tensors) -> Tensors:
    stored = scaled(weights, by_matrix, ".weight_scale")
    layers = [name for name, value in weights.items() if is_layer(name, value)]
    return stored | {
        name.replace(".weight", ".comfy_quant"): note(format="float8_e4m3fn") for name in layers
    }


def legacy(weights: Tensors, scale_of: Callable[[Tensor], Tensor] = by_matrix) -> Tensors:
    return scaled(weights, scale_of, ".scale_weight") | {"scaled_fp8": torch.zeros(2, dtype=E4M3)}


def cast(weights: Tensors) -> Tensors:
    return {name: value.to(E4M3) for name, value in weights.items()}


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()}


def saved(folder: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.contiguous() for name, value in tensors.items()},
        folder / "model.safetensors",
        metadata,
    )
    return folder / "model.safetensors"


def stands_for(file: Path, expected: Tensors, tmp_path: Path) -> None:
    """Check that the file, and its conversion to Mezzotint's format, hold these tensors."""
    mezzotint.convert(file, tmp_path / "written")
    for checkpoint in (Checkpoint.open(file), Checkpoint.open(tmp_path / "written")):
        assert set(checkpoint.sources) == set(expected)
        for name, value in expected.items():
            module, _, leaf = name.rpartition(".")
            layer = checkpoint.weight if leaf == "weight" else checkpoint.bias
            found = layer(module) if module in checkpoint.linears else checkpoint.tensor(name)
            assert found is not None
            assert torch.equal(found.float(), value.float()), name


def planned(file: Path) -> Checkpoint:
    checkpoint = Checkpoint.open(file)
    return plan(checkpoint, checkpoint.model()).checkpoint


def is_refused(file: Path, tmp_path: Path, error: type[MezzotintError], match: str) -> None:
    """Check that `load` and every target of `convert` raise the same error, and write nothing."""
    with pytest.raises(error, match=match):
        planned(file)
    for to in ("bf16", "mezzotint", "comfy"):
        with pytest.raises(error, match=match):
            mezzotint.convert(file, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


# ---- point 1: what load would refuse, convert refuses


@pytest.mark.parametrize("kind", ["cast", "scaled", "noted"])
def test_e5m2_is_read_exactly(weights: Tensors, tmp_path: Path, kind: str) -> None:
    """Field case fp8_e5m2."""
    suffix = {"scaled": ".scale_weight", "noted": ".weight_scale"}.get(kind)
    expected = {name: value.to(E5M2) for name, value in weights.items()}
    made = dict(expected)
    if suffix:
        made, expected = scaled(weights, by_matrix, suffix, E5M2), dict(weights)
        for name in (name for name, value in weights.items() if is_layer(name, value)):
            expected[name] = made[name].float() * made[name.replace(".weight", suffix)]
    if kind == "scaled":
        made["scaled_fp8"] = torch.zeros(2, dtype=E5M2)
    if kind == "noted":
        said = note(format="float8_e5m2", full_precision_matrix_mult=True)
        layers = [name for name, value in weights.items() if is_layer(name, value)]
        made |= {name.replace(".weight", ".comfy_quant"): said.clone() for name in layers}
    file = saved(tmp_path / "in", made)
    stands_for(file, expected, tmp_path)
    assert not any(
        linear.quantizes_activation for linear in planned(file).contents.linears.values()
    )
    assert mezzotint.verify(file).exit_code == 0


def test_e5m2_with_scales_and_no_note_is_refused(weights: Tensors, tmp_path: Path) -> None:
    file = saved(tmp_path / "in", scaled(weights, by_matrix, ".weight_scale", E5M2))
    is_refused(file, tmp_path, UnreadFormat, "ComfyUI, without its metadata")


def test_e5m2_whose_scales_are_lost_is_refused(weights: Tensors, tmp_path: Path) -> None:
    def to_largest(value: Tensor) -> Tensor:
        return value.abs().max() / 448

    made = scaled(weights, to_largest, ".weight_scale", E5M2)
    lost = {name: value for name, value in made.items() if not name.endswith(".weight_scale")}
    is_refused(saved(tmp_path / "in", lost), tmp_path, UnreadFormat, "they lost their scales")


HADAMARD = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2


def flux_fill(block: int = 0, **said: object) -> tuple[Tensors, Tensors]:
    """Return FLUX.1 Fill in INT8 rows, rotated if so said, and its weights.

    block   instead of rows, scale squares of this side
    """
    torch.manual_seed(0)
    config = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 128}
    config |= {"num_attention_heads": 2, "joint_attention_dim": 64, "pooled_projection_dim": 64}
    model = diffusers.FluxTransformer2DModel(
        in_channels=384, out_channels=64, guidance_embeds=True, **config
    ).bfloat16()
    matrix = torch.kron(torch.kron(HADAMARD, HADAMARD), torch.kron(HADAMARD, HADAMARD))
    stored, truth = state(model), state(model)
    for name, value in state(model).items():
        if not is_layer(name, value) or value.shape[1] % 256:
            continue
        groups = value.float().view(len(value), -1, 256)
        turned = (groups @ matrix.T if said.get("convrot") else groups).reshape(value.shape)
        scale = spread = turned.abs().amax(1, keepdim=True) / 127
        if block:
            tiles = turned.view(len(value) // block, block, -1, block)
            scale = tiles.abs().amax((1, 3)) / 127
            spread = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)
        codes = (turned / spread).round().clamp(-128, 127).to(torch.int8)
        back = codes.float() * spread
        if said.get("convrot"):
            back = (back.view(groups.shape) @ matrix).reshape(value.shape)
        truth[name] = back
        module = name.removesuffix(".weight")
        stored |= {
            name: codes,
            f"{module}.weight_scale": scale,
            f"{module}.comfy_quant": note(**said),
        }
    return stored, truth


CONVROT = {"convrot": True, "convrot_groupsize": 256}


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize(
    "said",
    [
        {"format": "int8_tensorwise", **CONVROT},
        {**CONVROT, "per_row": True},
        {"format": "int8_tensorwise", "per_row": True},
    ],
    ids=["convrot", "no format", "plain rows"],
)
def test_int8_convrot_of_flux_fill_is_read(
    tmp_path: Path, prefix: str, said: dict[str, object]
) -> None:
    """Field case int8_convrot_flux_fill."""
    stored, expected = flux_fill(**said)
    file = saved(tmp_path / "in", under(prefix, stored))
    stands_for(file, expected, tmp_path)
    assert mezzotint.verify(file).exit_code == 0
    planned(file)


def test_int8_blocks_of_flux_fill_are_read(tmp_path: Path) -> None:
    """Field case int8_convrot_flux_fill, blockwise."""
    stored, expected = flux_fill(128, format="int8_blockwise", group_size=128)
    stands_for(saved(tmp_path / "in", stored), expected, tmp_path)


def test_a_layer_whose_note_is_lost_is_refused(weights: Tensors, tmp_path: Path) -> None:
    tensors = noted(weights)
    del tensors[f"{QUERY}.comfy_quant"]
    file = saved(tmp_path / "in", tensors)
    is_refused(file, tmp_path, UnexpectedTensor, rf"{QUERY}\.weight_scale is left over")
    assert any(QUERY in problem for problem in inspect(file).problems)


def test_codes_whose_note_and_scale_are_lost_are_refused(weights: Tensors, tmp_path: Path) -> None:
    tensors = noted(weights)
    del tensors[f"{QUERY}.comfy_quant"], tensors[f"{QUERY}.weight_scale"]
    file = saved(tmp_path / "in", tensors)
    is_refused(
        file,
        tmp_path,
        UnknownFormat,
        rf"{QUERY}\.weight is torch\.float8_e4m3fn, and nothing states",
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_codes_of_integers_are_never_plain(
    weights: Tensors, tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors = noted(weights) | {"img_in.weight": torch.ones(64, 64, dtype=dtype)}
    is_refused(
        saved(tmp_path / "in", tensors),
        tmp_path,
        UnknownFormat,
        "img_in.weight is torch.u?int8, and nothing",
    )


@pytest.mark.parametrize(
    "gone", [f"{QUERY}.weight", "img_in.weight", "txt_norm.weight", f"{QUERY}.bias"]
)
@pytest.mark.parametrize("config", [True, False])
def test_a_checkpoint_that_lacks_a_tensor_is_refused(
    tmp_path: Path, gone: str, config: bool
) -> None:
    model = qwen()
    file = saved(
        tmp_path / "in", {name: value for name, value in state(model).items() if name != gone}
    )
    if config:
        (file.parent / "config.json").write_text(model.to_json_string())
    with pytest.raises(MezzotintError):
        mezzotint.convert(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_last_block_that_is_gone_is_missed_beside_a_config(tmp_path: Path) -> None:
    model = qwen(num_layers=2)
    tensors = {
        name: value
        for name, value in state(model).items()
        if not name.startswith("transformer_blocks.1.")
    }
    file = saved(tmp_path / "in", tensors)
    (file.parent / "config.json").write_text(model.to_json_string())
    is_refused(file, tmp_path, MissingTensor, r"transformer_blocks\.1\.\S+ .*not there")


def test_a_config_of_another_model_is_no_configuration(weights: Tensors, tmp_path: Path) -> None:
    file = saved(tmp_path / "in", weights)
    (file.parent / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    is_refused(
        file,
        tmp_path,
        UnknownFormat,
        "names FluxTransformer2DModel, and the tensors belong to Qwen-Image",
    )


@st.composite
def changed(draw: st.DrawFn) -> Callable[[Tensors], None]:
    """A few tensors renamed, taken away, cast, or given a scale."""
    steps = draw(
        st.lists(st.tuples(st.sampled_from(CHANGES), st.integers(0, 10**6)), min_size=1, max_size=3)
    )

    def change(tensors: Tensors) -> None:
        for step, number in steps:
            step(tensors, sorted(tensors)[number % len(tensors)])

    return change


def drop(tensors: Tensors, name: str) -> None:
    del tensors[name]


def to_e4m3(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].float().to(E4M3)


def to_int8(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].float().to(torch.int8)


def another_scale(tensors: Tensors, name: str) -> None:
    tensors[f"{name.rpartition('.')[0]}.weight_scale"] = torch.tensor(2.0)


def other_name(tensors: Tensors, name: str) -> None:
    tensors[name.replace("0", "1")] = tensors.pop(name)


CHANGES = (drop, to_e4m3, to_int8, another_scale, other_name)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    change=changed(),
    form=st.sampled_from([dict, cast, noted, legacy]),
    to=st.sampled_from(["bf16", "mezzotint"]),
)
def test_convert_writes_what_load_would_accept_and_the_same_numbers(
    weights: Tensors,
    tmp_path: Path,
    change: Callable[[Tensors], None],
    form: Callable[[Tensors], Tensors],
    to: str,
) -> None:
    """Check that a conversion succeeds only if its plan does, and that it keeps the weights."""
    tensors = form(weights)
    change(tensors)
    file = saved(tmp_path / "in", tensors)
    outcome = fuzz_conversions.try_one(file, qwen(), tmp_path / "out", to)
    try:
        plan(Checkpoint.open(file), qwen())
    except MezzotintError:
        assert outcome != "converted"
    else:
        assert outcome == "converted"


# ---- point 2: what is no nn.Linear stays what it is


@pytest.mark.parametrize("form", [cast, noted])
def test_an_embedding_stays_an_embedding(
    tmp_path: Path, form: Callable[[Tensors], Tensors]
) -> None:
    model = qwen(use_additional_t_cond=True, use_layer3d_rope=True)
    name = "time_text_embed.addition_t_embedding"
    tensors = form(state(model))
    expected = tensors[f"{name}.weight"].float()
    if form is noted:  # quantized as a layer is
        scale = torch.tensor(2.0)
        extra = {f"{name}.weight": (expected / scale).to(E4M3), f"{name}.weight_scale": scale}
        tensors |= extra | {f"{name}.comfy_quant": note(format="float8_e4m3fn")}
        expected = extra[f"{name}.weight"].float() * scale
    file = saved(tmp_path / "in", tensors)
    (file.parent / "config.json").write_text(model.to_json_string())
    mezzotint.convert(file, tmp_path / "written")
    for source in (file, tmp_path / "written"):
        checkpoint = Checkpoint.open(source)
        module = qwen(use_additional_t_cond=True, use_layer3d_rope=True).to("meta")
        load(plan(checkpoint, module), module, Placement(torch.device("cpu")), torch.bfloat16)
        embedding = module.get_submodule(name)
        assert isinstance(embedding, nn.Embedding)
        assert torch.equal(embedding.weight.float(), expected)
        assert name not in quant_linears(module)
    assert name not in Checkpoint.open(tmp_path / "written").linears


# ---- point 3: official files


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("form", [lambda weights: weights, cast, noted])
def test_the_marker_of_qwen_image_edit_2511(
    weights: Tensors, tmp_path: Path, form: Callable[[Tensors], Tensors], prefix: str
) -> None:
    marker = "__index_timestep_zero__"
    file = saved(
        tmp_path / "in", under(prefix, form(weights)) | {prefix + marker: torch.tensor([])}
    )
    checkpoint = Checkpoint.open(file)
    assert (
        checkpoint.ignored[prefix + marker]
        == "an empty tensor that stands for zero_cond_t of config.json"
    )
    assert inspect(file).problems == ()
    plan(checkpoint, qwen(zero_cond_t=True))
    with pytest.raises(
        UnexpectedTensor,
        match="says that zero_cond_t is true, and the model's configuration does not",
    ):
        plan(checkpoint, qwen())
    report = mezzotint.convert(file, tmp_path / "out")
    assert any(marker in text for text in report.notes)
    assert not any(marker in name for name in read_header(tmp_path / "out").tensors)


ENCODERS: dict[str, Tensors] = {
    "noted": {
        f"{ENCODER}.weight": torch.ones(64, 64).to(E4M3),
        f"{ENCODER}.weight_scale": torch.tensor(0.01),
        f"{ENCODER}.comfy_quant": note(format="float8_e4m3fn"),
    },
    "convrot": {
        f"{ENCODER}.weight": torch.ones(64, 256, dtype=torch.int8),
        f"{ENCODER}.weight_scale": torch.ones(64, 1),
        f"{ENCODER}.comfy_quant": note(format="int8_tensorwise", convrot=True),
    },
    "cast": {f"{ENCODER}.weight": torch.ones(64, 64).to(E4M3)},
    "e5m2": {
        "clip_l.text_model.embed.weight": torch.ones(64, 64).to(E5M2),
        "odd.name.weight": torch.ones(2),
    },
    "bitsandbytes": {f"{ENCODER}.weight.quant_state.bitsandbytes__nf4": note(blocksize=64)},
}


@pytest.mark.parametrize("form", [cast, legacy, noted])
@pytest.mark.parametrize("encoder", list(ENCODERS))
def test_a_text_encoder_is_set_aside_before_formats_are_asked(
    weights: Tensors, tmp_path: Path, form: Callable[[Tensors], Tensors], encoder: str
) -> None:
    alone = Checkpoint.open(saved(tmp_path / "alone", under(PREFIX, form(weights))))
    both = Checkpoint.open(
        saved(tmp_path / "both", under(PREFIX, form(weights)) | ENCODERS[encoder])
    )
    assert both.detected.format.name == alone.detected.format.name
    assert both.contents.linears.keys() == alone.contents.linears.keys()
    assert {name: both.ignored[name] for name in ENCODERS[encoder]} == dict.fromkeys(
        ENCODERS[encoder], "belongs to another component"
    )
    plan(both, both.model())


def test_notes_of_a_text_encoder_in_the_header_do_not_count(
    weights: Tensors, tmp_path: Path
) -> None:
    told = json.dumps({"layers": {ENCODER: {"format": "convrot_w4a4"}}})
    tensors = under(PREFIX, cast(weights)) | ENCODERS["cast"]
    file = saved(tmp_path / "in", tensors, {"_quantization_metadata": told})
    assert Checkpoint.open(file).detected.format.name == "fp8_cast"


def test_a_part_without_the_prefix_is_not_set_aside(weights: Tensors, tmp_path: Path) -> None:
    tensors = under(PREFIX, noted(weights))
    tensors[f"{QUERY}.weight_scale"] = tensors.pop(f"{PREFIX}{QUERY}.weight_scale")
    with pytest.raises(MissingTensor, match=r"to_q\.weight_scale is not there"):
        mezzotint.convert(saved(tmp_path / "in", tensors), tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32])
@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_scales_by_row_may_have_16_bits(
    weights: Tensors, tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensors = legacy(weights, lambda value: (value.abs().amax(1, keepdim=True) / 448).to(dtype))
    expected = dict(weights)
    for name, value in weights.items():
        if is_layer(name, value):
            scale = name.replace(".weight", ".scale_weight")
            expected[name] = tensors[name].float() * tensors[scale].float()
            tensors[scale] = tensors[scale].reshape(shape)
    stands_for(saved(tmp_path / "in", tensors), expected, tmp_path)


@pytest.mark.parametrize("ones", [torch.tensor(1.0), torch.ones(1).bfloat16(), torch.ones(64, 1)])
def test_a_scale_of_one_beside_bf16_is_ignored_with_its_reason(
    weights: Tensors, tmp_path: Path, ones: Tensor
) -> None:
    tensors = legacy(weights)
    file = saved(
        tmp_path / "in",
        tensors | {"img_in.scale_weight": ones, "img_in.scale_input": torch.tensor(1.0)},
    )
    reason = "a scale of 1.0 for a weight that is not quantized"
    assert inspect(file).ignored["img_in.scale_weight"] == reason
    mezzotint.convert(file, tmp_path / "out")
    assert "img_in.scale_weight" not in read_header(tmp_path / "out").tensors
    twice = saved(tmp_path / "twice", tensors | {"img_in.scale_weight": 2 * ones})
    is_refused(twice, tmp_path / "refused", UnexpectedTensor, "img_in.scale_weight is left over")
    assert inspect(twice).problems


def test_flux_norms_may_be_called_weight(tmp_path: Path) -> None:
    from support.modelopt_exporter import in_original_names
    from support.original_names import TO_ORIGINAL

    torch.manual_seed(0)
    config = {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
    }
    model = diffusers.FluxTransformer2DModel(
        in_channels=16, joint_attention_dim=32, **config
    ).bfloat16()
    original = in_original_names(state(model), TO_ORIGINAL["flux1"])
    renamed = {
        name.replace("_norm.scale", "_norm.weight"): value for name, value in original.items()
    }
    assert renamed.keys() != original.keys()
    stands_for(saved(tmp_path / "in", renamed), state(model), tmp_path)


def test_the_index_of_a_variant_joins_its_shards(tmp_path: Path) -> None:
    model = qwen().half()
    model.save_pretrained(tmp_path / "in", variant="fp16", max_shard_size="150KB")
    assert len(list((tmp_path / "in").glob("*.fp16-0000*.safetensors"))) > 1
    stands_for(tmp_path / "in", state(model), tmp_path)
    assert mezzotint.verify(tmp_path / "in").exit_code == 0


@pytest.mark.parametrize("size", ["150KB", "10GB"], ids=["shards", "one file"])
def test_of_two_variants_the_one_without_a_name_is_taken(tmp_path: Path, size: str) -> None:
    model = qwen()
    model.half().save_pretrained(tmp_path / "in", variant="fp16", max_shard_size=size)
    model.float().save_pretrained(tmp_path / "in")
    assert {info.dtype for info in read_header(tmp_path / "in").tensors.values()} == {F32}
    assert mezzotint.verify(tmp_path / "in").exit_code == 0


# ---- point 5: formats that are not read are named


FOREIGN: dict[str, tuple[Tensors, dict[str, object], str]] = {
    "sdnq": (
        {
            f"{QUERY}.weight": torch.zeros(64, 64).to(torch.uint8),
            f"{QUERY}.scale": torch.ones(64, 1),
        }
        | {f"{QUERY}.zero_point": torch.ones(64, 1)},
        {},
        "SDNQ",
    ),
    "torchao": ({f"{QUERY}._weight_qdata": torch.zeros(64, 64).to(E4M3)}, {}, "torchao"),
    "gptq": (
        {
            f"{QUERY}.qweight": torch.zeros(8, 64, dtype=torch.int32),
            f"{QUERY}.scales": torch.ones(1, 64),
        }
        | {f"{QUERY}.qzeros": torch.zeros(1, 8, dtype=torch.int32)},
        {},
        "AutoRound",
    ),
    "mlx": (
        {
            f"{QUERY}.weight": torch.zeros(64, 8, dtype=torch.uint32),
            f"{QUERY}.scales": torch.ones(64, 1),
        }
        | {f"{QUERY}.biases": torch.ones(64, 1)},
        {},
        "MLX",
    ),
    "unknown": ({}, {"quant_method": "Quark9"}, "'Quark9'"),
}


@pytest.mark.parametrize("case", list(FOREIGN))
def test_a_format_that_is_not_read_is_named_in_one_line(
    weights: Tensors, tmp_path: Path, case: str
) -> None:
    tensors, declared, name = FOREIGN[case]
    kept = {key: value for key, value in weights.items() if key not in tensors}
    file = saved(tmp_path / "in", kept | tensors)
    if declared:
        config = {"_class_name": "QwenImageTransformer2DModel", "quantization_config": declared}
        (file.parent / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnreadFormat, match=name) as caught:
        Checkpoint.open(file)
    assert "\n" not in caught.value.message


def in_blocks(value: Tensor) -> Tensor:
    return (value.view(len(value), -1, 16).abs().amax(2, keepdim=True) / 448).bfloat16()


@pytest.mark.parametrize("marker", [{}, {"scaled_fp8": torch.zeros(2, dtype=E4M3)}])
@pytest.mark.parametrize("dtype", [E4M3, E5M2, torch.int8])
def test_blocks_of_musubi_tuner_are_read(
    weights: Tensors, tmp_path: Path, marker: Tensors, dtype: torch.dtype
) -> None:
    """Field case musubi_blockwise_scale_weight, with and without a marker of ComfyUI."""
    tensors, expected = weights | marker, dict(weights)
    for name, value in weights.items():
        if is_layer(name, value):
            scale, groups = in_blocks(value.float()), value.float().view(len(value), -1, 16)
            codes = (groups / scale.float()).clamp(-448, 448)
            codes = (codes / 4).round().to(dtype) if dtype is torch.int8 else codes.to(dtype)
            tensors[name] = codes.view(value.shape)
            tensors[name.replace(".weight", ".scale_weight")] = scale
            expected[name] = (codes.float() * scale.float()).view(value.shape)
    file = saved(tmp_path / "in", tensors)
    stands_for(file, expected, tmp_path)
    assert not any(
        linear.quantizes_activation for linear in planned(file).contents.linears.values()
    )


def test_a_scale_of_scales_is_left_over(weights: Tensors, tmp_path: Path) -> None:
    """musubi-tuner writes it in an unreleased version, where it multiplies the weight."""
    tensors = legacy(weights) | {f"{QUERY}.scale_weight_tensor": torch.tensor(2.0)}
    file = saved(tmp_path / "in", tensors)
    is_refused(file, tmp_path, UnexpectedTensor, "scale_weight_tensor is left over")


def test_codes_with_scales_and_no_note_are_named(weights: Tensors, tmp_path: Path) -> None:
    file = saved(tmp_path / "in", scaled(weights, by_matrix, ".weight_scale"))
    is_refused(file, tmp_path, UnreadFormat, "is in the format of ComfyUI, without its metadata")


def by_row(value: Tensor) -> Tensor:
    return value.abs().amax(1, keepdim=True) / 448


@pytest.mark.parametrize("dtype", [E4M3, torch.int8])
@pytest.mark.parametrize("of_scales", [F32, torch.bfloat16])
def test_rows_of_lightx2v_are_read(
    weights: Tensors, tmp_path: Path, dtype: torch.dtype, of_scales: torch.dtype
) -> None:
    """Field case lightx2v_fp8_rows."""
    largest = 448 / 127 if dtype is torch.int8 else 1
    made = scaled(
        weights, lambda value: (by_row(value) * largest).to(of_scales), ".weight_scale", E4M3
    )
    expected = dict(weights)
    for name in (name for name, value in weights.items() if is_layer(name, value)):
        scale = made[name.replace(".weight", ".weight_scale")]
        made[name] = made[name].float().round().clamp(-127, 127).to(dtype)
        expected[name] = made[name].float() * scale.float()
    file = saved(tmp_path / "in", made)
    stands_for(file, expected, tmp_path)
    linears = planned(file).contents.linears.values()
    assert all(linear.quantizes_activation and linear.dynamic_input for linear in linears)
    assert mezzotint.verify(file).exit_code == 0


def test_half_of_lightx2vs_rows_is_not_its_format(weights: Tensors, tmp_path: Path) -> None:
    made = scaled(weights, by_row, ".weight_scale")
    made[f"{QUERY}.weight_scale"] = torch.tensor(1.0)
    with pytest.raises(UnreadFormat, match="ComfyUI, without its metadata"):
        Checkpoint.open(saved(tmp_path / "in", made))


# ---- point 7: unknown variants


WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
}


@pytest.mark.parametrize(
    "extra",
    ["audio_injector.injector.0.q.weight", "vace_blocks.0.proj.weight", "cond_encoder.weight"],
)
@pytest.mark.parametrize("original", [True, False])
def test_a_variant_of_wan_is_named(tmp_path: Path, extra: str, original: bool) -> None:
    from support.modelopt_exporter import in_original_names
    from support.original_names import TO_ORIGINAL

    model = diffusers.WanTransformer3DModel(text_dim=16, freq_dim=16, ffn_dim=64, **WAN).bfloat16()
    tensors = in_original_names(state(model), TO_ORIGINAL["wan2.2"]) if original else state(model)
    file = saved(tmp_path / "in", tensors | {extra: torch.zeros(32, 32)})
    is_refused(file, tmp_path, UnexpectedTensor, "an unknown variant of Wan 2.2")
    assert any("an unknown variant of Wan 2.2" in problem for problem in inspect(file).problems)


# ---- point 20: --rename, --raw, and configurations that are not true


def test_names_can_be_mapped(weights: Tensors, tmp_path: Path) -> None:
    odd = {
        f"net.{name}".replace("transformer_blocks", "layers"): value
        for name, value in noted(weights).items()
    }
    file = saved(tmp_path / "in", odd)
    rename = {r"^net\.": "", r"^layers\.(\d+)": r"transformer_blocks.\1"}
    mezzotint.convert(file, tmp_path / "out", rename=rename)
    expected = Checkpoint.open(saved(tmp_path / "known", noted(weights)))
    assert set(Checkpoint.open(file, rename=rename).linears) == set(expected.linears)
    assert torch.equal(Checkpoint.open(tmp_path / "out").weight(QUERY), expected.weight(QUERY))
    assert mezzotint.verify(file, rename=rename).exit_code == 0


def test_notes_in_the_header_are_renamed_with_their_layers(
    weights: Tensors, tmp_path: Path
) -> None:
    stored = under("net.", scaled(weights, by_matrix, ".weight_scale"))
    layers = {
        name.removesuffix(".weight"): {"format": "float8_e4m3fn"}
        for name, v in stored.items()
        if v.dtype is E4M3
    }
    file = saved(
        tmp_path / "in", stored, {"_quantization_metadata": json.dumps({"layers": layers})}
    )
    checkpoint = Checkpoint.open(file, rename={r"^net\.": ""})
    plan(checkpoint, checkpoint.model())


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"(": ""}, "not a usable regular expression"),
        ({"nothing": "x"}, "changes no tensor"),
        ({".*": "a"}, "two tensors"),
    ],
)
def test_a_rule_that_cannot_be_followed_is_an_error(
    weights: Tensors, tmp_path: Path, rename: dict[str, str], message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        Checkpoint.open(saved(tmp_path / "in", weights), rename=rename)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"swap_weight_nibbles": True}, "swap_weight_nibbles True, but codes are low first"),
        ({"checkpoint_weight_scale_layout": "swizzled"}, "swizzled, but scales are row major"),
        ({"group_size": 32}, "group_size 32, but groups have 16 columns"),
        (
            {
                "swap_weight_nibbles": False,
                "checkpoint_weight_scale_layout": "linear",
                "group_size": 16,
            },
            "",
        ),
    ],
)
def test_a_configuration_that_is_not_true_is_named(
    nvfp4: Path, entries: dict[str, object], message: str
) -> None:
    config = json.loads((nvfp4 / "config.json").read_text())
    config["quantization_config"] |= entries
    (nvfp4 / "config.json").write_text(json.dumps(config))
    found = Checkpoint.open(nvfp4).contradictions
    assert (found and message in found[0]) if message else found == ()
    assert set(found) <= set(inspect(nvfp4).notes)


def test_raw_shows_what_a_file_says_of_itself_in_any_format(tmp_path: Path) -> None:
    file = saved(tmp_path / "in", {"a.SCB": torch.ones(1)}, {"mflux_version": "\x1b[31m1"})
    (file.parent / "config.json").write_text('{"quantization_config": {"quant_method": "sdnq"}}')
    found = mezzotint.checkpoint.raw(file)
    assert found["metadata"] == {"mflux_version": "\x1b[31m1"}
    assert found["quantization_config"] == {"quant_method": "sdnq"}
