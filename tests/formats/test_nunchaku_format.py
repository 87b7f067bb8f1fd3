"""Nunchaku's files: golden values, the same bytes written back, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mezzotint.checkpoint import Checkpoint, inspect
from mezzotint.errors import (
    MezzotintError,
    MissingTensor,
    NotACheckpoint,
    ShapeMismatch,
    UnexpectedTensor,
    Unsupported,
)
from mezzotint.families import families, family_by_transformer
from mezzotint.families.building import build_meta_model
from mezzotint.formats import detect_format, read_header, targets
from mezzotint.formats.writers.nunchaku import metadata
from mezzotint.formats.writers.svdquant import nunchaku_tensors
from mezzotint.formats.writers.writer import CannotStore, ModelInfo
from mezzotint.loading import LoadReport, Placement, load, plan
from mezzotint.nn import SplitLinear, quant_linears
from mezzotint.schemes import AWQ_W4A16, SVDQUANT_NVFP4
from mezzotint.tensor import QuantTensor
from support.flux_inputs import flux_inputs
from support.nunchaku_files import CASES, LEGACY, as_nunchaku, changed, golden, same_bytes

FLUX_INT4, FLUX_NVFP4 = "nunchaku_flux1_int4_r32", "nunchaku_flux1_nvfp4_r32"
PATHS = [(case, f"{case}/checkpoint/{file}") for case, file in CASES.items()] + [
    (FLUX_INT4, LEGACY)
]
each_case = pytest.mark.parametrize(
    ("case", "path"), PATHS, ids=["int4", "nvfp4", "zimage", "legacy"]
)


def loaded(
    checkpoint: Checkpoint, dtype: torch.dtype, activations: str
) -> tuple[nn.Module, LoadReport]:
    model = build_meta_model(checkpoint.family.transformer_class, checkpoint.header.config)
    report = load(
        plan(checkpoint, model, activations), model, Placement(torch.device("cpu")), dtype
    )
    return model.eval(), report


def relative(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.norm(a.float() - b.float()) / torch.linalg.norm(b.float()))


@each_case
def test_pieces_equal_the_golden_ones(data: Path, case: str, path: str) -> None:
    checkpoint, expected = (
        Checkpoint.open(data / path),
        load_file(data / case / "expected.safetensors"),
    )
    checked = 0
    for module in checkpoint.modules:
        pieces = checkpoint.read(module)
        for i, piece in enumerate(pieces):
            name = f"{module}.part{i}" if len(pieces) > 1 else module
            for part in ("smooth", "proj_down", "proj_up", "shift"):
                assert (part in piece.parts) == (f"{name}.{part}" in expected), f"{name}.{part}"
                checked += part in piece.parts
                assert part not in piece.parts or torch.equal(
                    piece.parts[part], expected[f"{name}.{part}"]
                )
            if f"{name}.bias_stored" in expected:
                assert torch.equal(piece.parts["bias"], expected[f"{name}.bias_stored"])
            if f"{name}.residual" in expected:
                residual = piece.scheme.decode(piece.parts)[expected[f"{name}.rows"]]
                assert torch.equal(residual, expected[f"{name}.residual"])
    assert checked > 20


def test_a_linear_in_two_pieces_names_the_parts_of_each(data: Path) -> None:
    parts = Checkpoint.open(golden(data, FLUX_INT4)).parts("single_transformer_blocks.0.proj_out")
    assert parts["0.codes"].shape == (128, 64)
    assert parts["1.codes"].shape == (128, 256)
    assert parts["1.shift"].item() == 0.171875


@each_case
def test_quantized_inputs_stay_near_the_golden_samples(data: Path, case: str, path: str) -> None:
    """4-bit inputs have errors of up to 0.25 here, because smoothing does not fit these samples."""
    expected = load_file(data / case / "expected.safetensors")
    model, _ = loaded(Checkpoint.open(data / path), torch.float32, "as_stored")
    for name, layer in quant_linears(model).items():
        y, wanted = layer(expected[f"{name}.x"].float()), expected[f"{name}.y"]
        weight_only = all(sublayer.scheme is AWQ_W4A16 for sublayer in layer.sublayers)
        if any("shift" in dict(sublayer.named_buffers()) for sublayer in layer.sublayers):
            continue  # their inputs come from a GELU, and these samples are negative half the time
        assert relative(y, wanted) <= (1e-6 if weight_only else 0.3), name


def test_shifted_layers_quantize_the_output_of_a_gelu_well(data: Path) -> None:
    layer = quant_linears(
        loaded(Checkpoint.open(golden(data, FLUX_INT4)), torch.float32, "as_stored")[0]
    )["transformer_blocks.0.ff.net.2"]
    x = nn.functional.gelu(
        torch.randn(64, 512, generator=torch.Generator().manual_seed(5)), approximate="tanh"
    )
    bias = Checkpoint.open(golden(data, FLUX_INT4)).bias("transformer_blocks.0.ff.net.2")
    assert relative(layer(x), x @ layer.dequantize().T + bias) <= 0.1


def test_the_whole_model_equals_one_with_the_decoded_weights(data: Path) -> None:
    checkpoint = Checkpoint.open(golden(data, FLUX_INT4))
    model, report = loaded(checkpoint, torch.float32, "bf16")
    assert isinstance(model.single_transformer_blocks[0].proj_out, SplitLinear)
    assert report.tensors_used + len(report.ignored) == len(checkpoint.header.tensors)
    assert all(key.endswith("smooth_orig") for key in report.ignored)
    plain = build_meta_model("FluxTransformer2DModel", checkpoint.header.config)
    state = {name: checkpoint.tensor(name).float() for name in checkpoint.plain}
    for module in checkpoint.modules:
        state |= {
            f"{module}.weight": checkpoint.weight(module),
            f"{module}.bias": checkpoint.bias(module),
        }
    plain.load_state_dict(state, assign=True)
    with torch.no_grad():
        outputs = [m(**flux_inputs(), return_dict=False)[0] for m in (model, plain.eval())]
    assert relative(*outputs) <= 1e-5


@pytest.mark.parametrize("case", list(CASES))
def test_the_same_bytes_are_written_back(data: Path, case: str) -> None:
    """Layers are split, fused again and packed; every tensor is compared, smooth_orig included."""
    stored, written = (
        load_file(golden(data, case)),
        as_nunchaku(Checkpoint.open(golden(data, case))),
    )
    assert stored.keys() == written.keys()
    assert all(same_bytes(written[key], value) for key, value in stored.items())


@pytest.mark.parametrize("case", list(CASES))
def test_metadata_equals_nunchakus(data: Path, case: str) -> None:
    checkpoint = Checkpoint.open(golden(data, case))
    config, modules = checkpoint.header.config, list(checkpoint.contents.linears)
    scheme = next(
        linear.scheme
        for linear in checkpoint.contents.linears.values()
        if linear.scheme is not AWQ_W4A16
    )
    written = metadata(
        family_by_transformer(config["_class_name"], "").nunchaku, scheme, 32, modules
    )
    for key, text in written.items():
        theirs = checkpoint.header.metadata[key]
        assert text == theirs if key == "model_class" else json.loads(text) == json.loads(theirs), (
            key
        )


def round_to_nearest(weight: Tensor, group: int) -> Tensor:
    groups = weight.view(weight.shape[0], -1, group)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    return (torch.round(groups / scale) * scale).view(weight.shape)


def test_weights_are_as_near_to_the_base_as_a_right_reading_is(data: Path) -> None:
    """Loose bounds would accept a wrong reading; 1.5 times round-to-nearest's error does not."""
    checkpoint = Checkpoint.open(golden(data, FLUX_INT4))
    base = load_file(data / "base/nunchaku_flux1/diffusion_pytorch_model.safetensors")
    for module in checkpoint.modules:
        weight = base[f"{module}.weight"].float()
        bound = 1.5 * relative(round_to_nearest(weight, 64), weight)
        assert relative(checkpoint.weight(module), weight) <= bound, module


@pytest.mark.parametrize("part", ["smooth", "proj_down", "codes", "block_scale"])
def test_a_wrong_reading_is_farther_from_the_base(data: Path, part: str) -> None:
    """One part at a time stays in fragment order, or scales are read as [g][n]."""
    checkpoint = Checkpoint.open(golden(data, FLUX_INT4))
    base = load_file(data / "base/nunchaku_flux1/diffusion_pytorch_model.safetensors")
    module = "transformer_blocks.0.attn.to_out.0"
    linear = checkpoint.contents.linears["transformer_blocks.0.out_proj"]
    right = linear.to_plain(linear.read(checkpoint.header))
    stored = linear.read(checkpoint.header).parts[part]
    wrong = (
        stored.view(torch.uint8) if part == "codes" else stored.t() if stored.ndim == 2 else stored
    )
    weight = base[f"{module}.weight"].float()
    bound = relative(right.scheme.dequantize(right.parts), weight)
    assert relative(right.scheme.dequantize({**right.parts, part: wrong}), weight) > 1.5 * bound


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ("transformer_blocks.0.mlp_fc1.wscales", r"mlp_fc1\.wscales is not there"),
        ("transformer_blocks.0.mlp_fc1.lora_up", r"mlp_fc1\.lora_up is not there"),
        ("transformer_blocks.0.mlp_fc1.lora_down", r"mlp_fc1\.lora_down is not there"),
        ("transformer_blocks.0.mlp_fc1.smooth", r"mlp_fc1\.smooth is not there"),
        ("transformer_blocks.0.mlp_fc1.bias", r"ff\.net\.0\.proj\.bias"),
        ("transformer_blocks.0.mlp_fc1.qweight", r"ff\.net\.0\.proj"),
        ("transformer_blocks.0.mlp_fc1.wtscale", r"mlp_fc1\.wtscale is not there"),
        ("transformer_blocks.0.qkv_proj.wcscales", r"qkv_proj\.wtscale is not there"),
        ("transformer_blocks.0.norm1.linear.wzeros", r"norm1\.linear\.wzeros is not there"),
        ("single_transformer_blocks.0.out_proj.qweight", r"out_proj\.|proj_out"),
    ],
)
def test_any_missing_tensor_is_an_error(
    data: Path, tmp_path: Path, stored: str, message: str
) -> None:
    file = changed(
        golden(data, FLUX_NVFP4), tmp_path / "a.safetensors", lambda tensors: tensors.pop(stored)
    )
    with pytest.raises(MezzotintError, match=message):
        loaded(Checkpoint.open(file), torch.bfloat16, "bf16")


def test_a_shift_is_made_up_for_in_a_bias_that_has_to_be_there(data: Path, tmp_path: Path) -> None:
    key = "single_transformer_blocks.0.mlp_fc2.bias"
    file = changed(
        golden(data, FLUX_INT4), tmp_path / "a.safetensors", lambda tensors: tensors.pop(key)
    )
    with pytest.raises(MezzotintError, match=r"mlp_fc2\.bias is not there"):
        loaded(Checkpoint.open(file), torch.bfloat16, "as_stored")


def test_inspect_reports_a_missing_tensor(data: Path, tmp_path: Path) -> None:
    key = "transformer_blocks.0.mlp_fc1.lora_up"
    file = changed(
        golden(data, FLUX_INT4), tmp_path / "a.safetensors", lambda tensors: tensors.pop(key)
    )
    assert key in inspect(file).problems[0]


def test_a_prefix_does_not_hide_which_layers_follow_a_gelu(data: Path, tmp_path: Path) -> None:
    def prefix(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[f"model.diffusion_model.{key}"] = tensors.pop(key)

    plain = Checkpoint.open(golden(data, FLUX_INT4))
    prefixed = Checkpoint.open(changed(golden(data, FLUX_INT4), tmp_path / "a.safetensors", prefix))
    module = "transformer_blocks.0.ff.net.2"
    assert "shift" in plain.parts(module)
    assert torch.equal(prefixed.bias(module), plain.bias(module))


def test_a_scale_that_int4_layers_do_not_have_is_left_over(data: Path, tmp_path: Path) -> None:
    key = "transformer_blocks.0.mlp_fc1.wcscales"
    extra = {key: torch.ones(512).bfloat16()}
    file = changed(
        golden(data, FLUX_INT4), tmp_path / "a.safetensors", lambda tensors: tensors.update(extra)
    )
    assert inspect(file).problems == (
        f"a.safetensors: {key} is not a part of a SVDQuant INT4 layer",
    )
    with pytest.raises(UnexpectedTensor, match=r"mlp_fc1\.wcscales is left over"):
        loaded(Checkpoint.open(file), torch.bfloat16, "bf16")


@pytest.mark.parametrize("shape", [(), (512, 128)])
def test_a_weight_that_is_stored_twice_is_an_error(
    data: Path, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    extra = {"transformer_blocks.0.mlp_fc1.weight": torch.ones(shape).bfloat16()}
    file = changed(
        golden(data, FLUX_INT4), tmp_path / "a.safetensors", lambda tensors: tensors.update(extra)
    )
    with pytest.raises(UnexpectedTensor, match=r"mlp_fc1\.weight is left over"):
        Checkpoint.open(file)


def test_a_weight_without_sides_is_in_no_table() -> None:
    name = "transformer_blocks.0.mlp_fc1.weight"
    assert list(
        families()["flux1"].nunchaku.naming({name: (), "x_embedder.weight": (128, 64)})
    ) == [
        name,
        "x_embedder.weight",
    ]


def test_scales_in_another_shape_are_refused(data: Path, tmp_path: Path) -> None:
    key = "transformer_blocks.0.mlp_fc1.wscales"
    file = changed(
        golden(data, FLUX_INT4),
        tmp_path / "a.safetensors",
        lambda tensors: tensors.update({key: tensors[key].t().contiguous()}),
    )
    with pytest.raises(ShapeMismatch, match=r"has shape \[512, 2\], expected \[2, 512\]"):
        loaded(Checkpoint.open(file), torch.bfloat16, "bf16")


def test_the_tensors_decide_rank_and_precision(data: Path, tmp_path: Path) -> None:
    tensors = load_file(golden(data, FLUX_NVFP4))
    save_file(
        tensors,
        tmp_path / "svdq-int4_r128.safetensors",
        {"quantization_config": '{"method": "svdquant"}'},
    )
    checkpoint = Checkpoint.open(tmp_path / "svdq-int4_r128.safetensors")
    (piece,) = checkpoint.read("transformer_blocks.0.ff.net.2")
    assert piece.scheme is SVDQUANT_NVFP4
    assert piece.parts["proj_down"].shape == (32, 512)


def test_evidence_names_what_was_found(data: Path) -> None:
    found = detect_format(read_header(golden(data, FLUX_INT4)))
    assert found.format.name == "nunchaku"
    assert (
        "3 AWQ W4A16 and 12 SVDQuant INT4 layers under Nunchaku's v1 names, "
        "rank 32 by their proj_up" in found.evidence
    )
    assert "declared by quantization_config in the header" in found.evidence
    legacy = detect_format(read_header(data / LEGACY))
    assert "implied by the folder" in legacy.evidence


@pytest.mark.parametrize("case", list(CASES))
def test_without_metadata_the_order_is_inferred_from_the_codes(
    data: Path, tmp_path: Path, case: str
) -> None:
    file = changed(
        golden(data, case), tmp_path / "a.safetensors", lambda _: None, keep_metadata=False
    )
    found = detect_format(read_header(file))
    assert found.format.name == "nunchaku"
    assert "100% of its groups contain the largest code if read as fragments" in found.evidence


def test_the_configuration_in_the_header_takes_precedence(data: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy(golden(data, FLUX_INT4), tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "Other"}')
    assert read_header(file).config["_class_name"] == "FluxTransformer2DModel"


def test_half_a_legacy_folder_is_refused(data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data / LEGACY, tmp_path / "folder"))
    (folder / "unquantized_layers.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(NotACheckpoint, match="2 weight files and no index"):
        read_header(folder)


def test_a_damaged_scale_is_named(data: Path, tmp_path: Path) -> None:
    key = "transformer_blocks.0.mlp_fc1.smooth"
    file = changed(
        golden(data, FLUX_INT4),
        tmp_path / "a.safetensors",
        lambda tensors: tensors[key].fill_(torch.nan),
    )
    with pytest.raises(MezzotintError, match=r"mlp_fc1\.smooth holds a value that is not finite"):
        Checkpoint.open(file).weight("transformer_blocks.0.ff.net.0.proj")


def test_what_nunchaku_cannot_hold_is_refused(data: Path) -> None:
    (right,) = Checkpoint.open(golden(data, FLUX_INT4)).read("transformer_blocks.0.attn.to_out.0")
    without = {name: part for name, part in right.parts.items() if name != "proj_up"}
    half = QuantTensor(right.scheme, right.layout, right.shape, without)
    writer = targets()["nunchaku"].writer(ModelInfo(families()["flux1"], {}))
    refused = writer.layer({"transformer_blocks.0.attn.to_out.0": [half]})
    assert isinstance(refused, CannotStore)
    assert "has no proj_up" in refused.reason
    shifted = QuantTensor(
        right.scheme, right.layout, right.shape, {**right.parts, "shift": torch.tensor(0.171875)}
    )
    with pytest.raises(Unsupported, match="Nunchaku computes the layer with None"):
        nunchaku_tensors("a", shifted, v1=True)


def test_a_qweight_alone_is_not_nunchakus(tmp_path: Path) -> None:
    save_file({"a.qweight": torch.zeros(128, 64, dtype=torch.int8)}, tmp_path / "a.safetensors")
    with pytest.raises(MezzotintError, match=r"nunchaku: no, no layer has \.qweight and \.wscales"):
        detect_format(read_header(tmp_path / "a.safetensors"))


def test_missing_is_what_a_half_written_layer_is_called(data: Path, tmp_path: Path) -> None:
    file = changed(
        golden(data, FLUX_INT4),
        tmp_path / "a.safetensors",
        lambda tensors: tensors.pop("transformer_blocks.0.out_proj.smooth"),
    )
    with pytest.raises(MissingTensor, match="never taken to be"):
        plan(
            Checkpoint.open(file),
            build_meta_model("FluxTransformer2DModel", Checkpoint.open(file).header.config),
        )


@pytest.mark.parametrize("case", [FLUX_INT4, FLUX_NVFP4])
def test_a_linear_in_two_pieces_compiles_without_a_graph_break(data: Path, case: str) -> None:
    layer = SplitLinear(
        Checkpoint.open(golden(data, case)).read("single_transformer_blocks.0.proj_out")
    )
    x = torch.randn(3, 640, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
