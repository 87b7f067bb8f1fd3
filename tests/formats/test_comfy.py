"""ComfyUI's files: golden values, metadata, markers, `scaled_fp8`, padding, ModelOpt's variant."""

import json
from pathlib import Path

import comfy_kitchen
import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor, TensorWiseINT8Layout
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel
from safetensors.torch import load_file, save_file

import mezzotint
from mezzotint.errors import BrokenFile, MissingTensor, ShapeMismatch, UnknownFormat, UnreadFormat
from mezzotint.formats import detect_format
from mezzotint.layouts import from_tiles, to_tiles
from mezzotint.nn import quant_linears
from mezzotint.schemes import FP8, INT8, MXFP8, NVFP4, Scheme
from mezzotint.tensor import PLAIN, Layout
from support.checkpoint_edits import WEIGHTS, edited, load_flux
from support.golden_files import EXACT, assert_stands_for, opened, plain_parts
from support.modelopt_exporter import in_original_names
from support.original_names import TO_ORIGINAL

QWEN = "comfy_qwenimage_mixed_nvfp4_fp8"
QWEN_FILE = f"{QWEN}/checkpoint/qwen-image-mixed.safetensors"
MODELOPT_FILE = f"modelopt_flux1_nvfp4_comfyfile/checkpoint/{WEIGHTS}"
TILED = Layout("high_first", "tiles_128x4")


def marker(**config: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)


def weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.1


def kitchen(layout: str, matrix: torch.Tensor, **config: object) -> dict[str, torch.Tensor]:
    """Return a layer X as comfy-kitchen and ComfyUI write it."""
    scale = {"scale": matrix.abs().amax() / 2688} if "NVFP4" in layout else {}
    stored = QuantizedTensor.from_float(matrix, layout, **scale).state_dict("X.weight")
    return stored | {"X.comfy_quant": marker(**config)}


def saved(
    tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> Path:
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, metadata)
    return file


def test_each_layer_has_the_scheme_of_its_metadata(data: Path) -> None:
    linears = opened(data / QWEN_FILE)[1].linears
    assert linears["transformer_blocks.0.attn.to_q"].scheme is NVFP4
    assert linears["transformer_blocks.0.attn.to_q"].layout == TILED
    assert linears["transformer_blocks.1.attn.to_q"].scheme is FP8
    assert linears["transformer_blocks.1.attn.to_q"].layout == PLAIN
    assert all(linear.quantizes_activation for linear in linears.values())
    assert "input_scale" not in linears["transformer_blocks.0.img_mlp.net.2"].keys


def test_scales_of_padded_shape_prove_their_tiles(data: Path) -> None:
    evidence = opened(data / QWEN_FILE)[1].evidence
    assert evidence[0].startswith("codes high first: as comfy-kitchen writes nvfp4, not verified")
    assert evidence[1].startswith(
        "scales tiles 128x4: implied, the shapes in 8 layers allow no other order"
    )


def test_metadata_in_the_header_equals_markers(data: Path, tmp_path: Path) -> None:
    with_markers = opened(data / QWEN_FILE)[1]
    tensors = load_file(data / QWEN_FILE)
    layers = {
        key.removesuffix(".comfy_quant"): json.loads(bytes(value.tolist()))
        for key, value in tensors.items()
        if key.endswith(".comfy_quant")
    }
    kept = {key: value for key, value in tensors.items() if not key.endswith(".comfy_quant")}
    metadata = json.dumps({"format_version": "1.0", "layers": layers})
    assert (
        opened(saved(tmp_path, kept, {"_quantization_metadata": metadata}))[1].linears
        == with_markers.linears
    )


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "transformer."])
@pytest.mark.parametrize("in_metadata", [True, False])
def test_names_may_have_a_prefix_that_metadata_omits(
    tmp_path: Path, prefix: str, in_metadata: bool
) -> None:
    stored = kitchen("TensorCoreNVFP4Layout", weight(32, 64), format="nvfp4")
    del stored["X.comfy_quant"]
    layers = {(prefix if in_metadata else "") + "X": {"format": "nvfp4"}}
    file = saved(
        tmp_path,
        {prefix + key: value for key, value in stored.items()},
        {"_quantization_metadata": json.dumps({"layers": layers})},
    )
    assert list(plain_parts(file)) == [f"{prefix}X"]


@pytest.mark.parametrize("shape", [(32, 64), (100, 72), (7, 24), (128, 48)])
@pytest.mark.parametrize(
    ("layout", "written", "scheme"),
    [("TensorCoreNVFP4Layout", "nvfp4", NVFP4), ("TensorCoreMXFP8Layout", "mxfp8", MXFP8)],
)
def test_padded_layers_are_cut_to_their_true_shape(
    tmp_path: Path, shape: tuple[int, int], layout: str, written: str, scheme: object
) -> None:
    matrix = weight(*shape)
    stored = kitchen(layout, matrix, format=written) | {
        "X.bias": torch.zeros(shape[0]),
        "X.pre_quant_scale": torch.ones(shape[1]),
    }
    decoded = plain_parts(saved(tmp_path, stored))["X"]
    assert decoded.scheme is scheme
    assert decoded.shape == shape
    scale = {"scale": matrix.abs().amax() / 2688} if scheme is NVFP4 else {}
    theirs = QuantizedTensor.from_float(matrix, layout, **scale).dequantize()
    assert torch.equal(decoded.scheme.dequantize(decoded.parts), theirs[: shape[0], : shape[1]])
    x = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(1))
    assert decoded.scheme.linear(x, decoded.parts, quantize=True).shape == (3, shape[0])


def test_mxfp8_scales_may_be_stored_as_bytes(tmp_path: Path) -> None:
    stored = kitchen("TensorCoreMXFP8Layout", weight(32, 64), format="mxfp8")
    typed = plain_parts(saved(tmp_path, stored))["X"]
    stored["X.weight_scale"] = stored["X.weight_scale"].view(torch.uint8)
    raw = plain_parts(saved(tmp_path, stored))["X"]
    assert torch.equal(typed.scheme.dequantize(typed.parts), raw.scheme.dequantize(raw.parts))


@pytest.mark.parametrize("per_channel", [False, True])
def test_int8_equals_comfy_kitchen(tmp_path: Path, per_channel: bool) -> None:
    matrix = weight(32, 64)
    codes, params = TensorWiseINT8Layout.quantize(matrix, per_channel=per_channel)
    stored = {
        "X.weight": codes,
        "X.weight_scale": params.scale,
        "X.comfy_quant": marker(format="int8_tensorwise"),
    }
    layer = plain_parts(saved(tmp_path, stored))["X"]
    assert layer.scheme is INT8
    assert layer.quantizes_activation
    assert torch.equal(INT8.dequantize(layer.parts), TensorWiseINT8Layout.dequantize(codes, params))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"format": "nvfp4", "convrot": True}, "nvfp4 with convrot"),
        ({"format": "awq_w4a16", "group_size": 128}, "group_size 128, expected 64"),
        ({"format": "int8_tensorwise", "group_size": 128}, "group_size 128, expected none"),
        ({"format": "mxfp8", "full_precision_matrix_mult": True}, "always quantize"),
    ],
)
def test_formats_that_are_not_read_are_refused_by_name(
    tmp_path: Path, config: dict[str, object], message: str
) -> None:
    file = saved(
        tmp_path,
        {"X.weight": torch.zeros(16, 16, dtype=torch.int8), "X.comfy_quant": marker(**config)},
    )
    with pytest.raises(UnreadFormat, match=f"layer X has format .*{message}"):
        opened(file)


def test_an_unknown_format_lists_the_known_ones(tmp_path: Path) -> None:
    file = saved(
        tmp_path,
        {"X.weight": torch.zeros(16, 16, dtype=torch.int8), "X.comfy_quant": marker(format="int3")},
    )
    with pytest.raises(
        UnknownFormat, match="'int3', expected nvfp4 or float8_e4m3fn or float8_e4m3fn_rowwise or"
    ):
        opened(file)


@pytest.mark.parametrize("text", [b"{", b"[]", b"[" * 10_000])
def test_a_marker_that_is_no_object_is_an_error(tmp_path: Path, text: bytes) -> None:
    stored = torch.tensor(list(text), dtype=torch.uint8)
    with pytest.raises(BrokenFile, match="comfy_quant"):
        opened(saved(tmp_path, {"X.weight": torch.zeros(4, 4), "X.comfy_quant": stored}))


def test_a_marker_that_is_no_bytes_is_an_error(tmp_path: Path) -> None:
    stored = kitchen("TensorCoreNVFP4Layout", weight(32, 64), format="nvfp4") | {
        "Y.comfy_quant": torch.zeros(4)
    }
    with pytest.raises(
        BrokenFile, match=r"Y\.comfy_quant is torch\.float32, expected a marker in uint8"
    ):
        opened(saved(tmp_path, stored))


def test_half_of_a_low_rank_pair_is_not_enough_here_either(tmp_path: Path) -> None:
    stored = kitchen("TensorCoreNVFP4Layout", weight(32, 64), format="nvfp4")
    stored["X.svdquant_lora_a"] = torch.zeros(8, 64).bfloat16()
    with pytest.raises(MissingTensor, match=r"X\.svdquant_lora_b is not there"):
        plain_parts(saved(tmp_path, stored))


def test_metadata_may_request_full_precision(tmp_path: Path) -> None:
    stored = kitchen(
        "TensorCoreNVFP4Layout", weight(32, 64), format="nvfp4", full_precision_matrix_mult=True
    )
    assert not plain_parts(saved(tmp_path, stored))["X"].quantizes_activation


def test_an_input_scale_under_full_precision_is_ignored_with_its_reason(
    tmp_path: Path,
) -> None:
    stored = kitchen(
        "TensorCoreNVFP4Layout", weight(32, 64), format="nvfp4", full_precision_matrix_mult=True
    )
    file = saved(tmp_path, stored | {"X.input_scale": torch.tensor(0.5)})
    assert opened(file)[1].ignored["X.input_scale"] == "the file requests unquantized inputs"
    assert not plain_parts(file)["X"].quantizes_activation


@pytest.mark.parametrize(
    ("layout", "written", "scheme"),
    [("TensorCoreMXFP8Layout", "mxfp8", MXFP8), ("int8", "int8_tensorwise", INT8)],
)
def test_metadata_that_only_comfyui_writes_outweighs_the_names(
    tmp_path: Path, layout: str, written: str, scheme: Scheme
) -> None:
    """Black Forest Labs' names without a prefix, and no marker."""
    matrix, module = weight(32, 64), "double_blocks.0.img_mlp.0"
    codes = (torch.zeros(32, 64, dtype=torch.int8), torch.tensor(1.0))
    stored = dict(zip(("X.weight", "X.weight_scale"), codes, strict=True))
    stored = kitchen(layout, matrix, format=written) if layout != "int8" else stored
    stored.pop("X.comfy_quant", None)
    tensors = {key.replace("X.", f"{module}."): value for key, value in stored.items()}
    metadata = json.dumps({"layers": {module: {"format": written}}})
    header, contents = opened(saved(tmp_path, tensors, {"_quantization_metadata": metadata}))
    assert contents.linears[module].scheme is scheme
    assert f"with layers in {written}" in detect_format(header).evidence


def test_nvfp4_scales_may_be_stored_as_bytes(tmp_path: Path) -> None:
    stored = kitchen("TensorCoreNVFP4Layout", weight(32, 64), format="nvfp4")
    expected = plain_parts(saved(tmp_path, stored))["X"]
    stored["X.weight_scale"] = stored["X.weight_scale"].view(torch.uint8)
    layer = plain_parts(saved(tmp_path, stored))["X"]
    assert torch.equal(NVFP4.dequantize(layer.parts), NVFP4.dequantize(expected.parts))


@pytest.fixture
def padded(tmp_path: Path) -> tuple[Path, Path]:
    """Return a FLUX.2 of width 72, fused and padded under BFL's names, and its base model."""
    torch.manual_seed(0)
    heads = {"attention_head_dim": 24, "num_attention_heads": 3, "axes_dims_rope": (6, 6, 6, 6)}
    model = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        **heads,
    ).bfloat16()
    model.save_pretrained(tmp_path / "base")
    tensors = in_original_names(model.state_dict(), TO_ORIGINAL["flux2"])
    for name in [name for name in tensors if "_blocks." in name and tensors[name].ndim == 2]:
        stored = kitchen("TensorCoreNVFP4Layout", tensors.pop(name).float(), format="nvfp4")
        tensors |= {
            key.replace("X.", name.removesuffix("weight")): value for key, value in stored.items()
        }
    return saved(tmp_path, tensors), tmp_path / "base"


def test_a_base_shows_the_padding_of_fused_layers(padded: tuple[Path, Path]) -> None:
    file, base = padded
    checkpoint, reference = mezzotint.open(file, base=base), mezzotint.open(base)
    assert "layout measured on 4 layers" in checkpoint.evidence
    for module in checkpoint.modules:
        weight, original = checkpoint.weight(module), reference.tensor(f"{module}.weight").float()
        assert torch.linalg.norm(weight - original) < 0.12 * torch.linalg.norm(original)


def test_padding_agrees_with_the_base(padded: tuple[Path, Path]) -> None:
    file, base = padded
    report = mezzotint.verify(file, base)
    assert report.exit_code == 0
    assert sum(layer.scheme == "nvfp4" for layer in report.layers) == 14


def legacy(
    matrix: torch.Tensor, elements: int = 1, input_scale: float | None = None
) -> dict[str, torch.Tensor]:
    """Return a layer X of a `scaled_fp8` file."""
    scale = matrix.abs().amax() / 448
    stored = {
        "scaled_fp8": torch.zeros(elements).to(torch.float8_e4m3fn),
        "X.weight": comfy_kitchen.quantize_per_tensor_fp8(matrix, scale, torch.float8_e4m3fn),
        "X.scale_weight": scale,
    }
    return stored if input_scale is None else stored | {"X.scale_input": torch.tensor(input_scale)}


@pytest.mark.parametrize(
    ("elements", "input_scale", "static", "quantizes"),
    [
        (1, None, False, True),
        (1, 0.25, True, True),
        (1, 1.0, False, True),
        (2, 0.25, False, False),
        (2, None, False, False),
    ],
)
def test_scaled_fp8_decides_whether_inputs_are_quantized(
    tmp_path: Path, elements: int, input_scale: float | None, static: bool, quantizes: bool
) -> None:
    matrix = weight(32, 64)
    file = saved(tmp_path, legacy(matrix, elements, input_scale))
    layer = plain_parts(file)["X"]
    assert ("input_scale" in layer.parts, layer.quantizes_activation) == (static, quantizes)
    error = torch.linalg.norm(FP8.dequantize(layer.parts) - matrix) / torch.linalg.norm(matrix)
    assert error < 0.04
    used = {key for linear in opened(file)[1].linears.values() for key in linear.keys.values()}
    assert used | opened(file)[1].ignored.keys() == load_file(file).keys()


def test_scaled_fp8_without_a_scale_is_an_error(tmp_path: Path) -> None:
    stored = legacy(weight(32, 64))
    del stored["X.scale_weight"]
    with pytest.raises(MissingTensor, match=r"X\.scale_weight is not there"):
        plain_parts(saved(tmp_path, stored))


def modelopt_row_col(tensors: dict[str, torch.Tensor]) -> None:
    """Pad as ModelOpt's `row_col`: packed columns and scale columns to multiples of 16."""
    for key in [key for key in tensors if key.endswith(".weight_scale_2")]:
        name = key.removesuffix(".weight_scale_2")
        rows, packed = tensors[f"{name}.weight"].shape
        groups = packed // 8
        plain = from_tiles(tensors[f"{name}.weight_scale"], rows, groups)
        padded = torch.nn.functional.pad(plain.view(torch.uint8), (0, -groups % 16)).view(
            torch.float8_e4m3fn
        )
        tensors[f"{name}.weight"] = torch.nn.functional.pad(
            tensors[f"{name}.weight"], (0, -packed % 16)
        )
        tensors[f"{name}.weight_scale"] = to_tiles(padded)


def test_modelopts_padded_scale_columns_are_cut(data: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        ((data / MODELOPT_FILE).parent / "config.json").read_text()
    )
    edited(data / MODELOPT_FILE, tmp_path / WEIGHTS, modelopt_row_col)
    assert opened(tmp_path)[0].tensors["transformer_blocks.0.attn.to_q.weight_scale"].shape == (
        128,
        16,
    )
    assert_stands_for(
        plain_parts(tmp_path), data / "modelopt_flux1_nvfp4/expected.safetensors", EXACT
    )


def test_modelopts_scales_may_be_left_in_rows(data: Path, tmp_path: Path) -> None:
    def untile(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.endswith(".weight_scale")]:
            rows, packed = tensors[key.removesuffix("_scale")].shape
            tensors[key] = from_tiles(tensors[key], rows, packed // 8)[:, : packed // 8]

    config = (data / MODELOPT_FILE).parent / "config.json"
    (tmp_path / "config.json").write_text(config.read_text())
    odd = {"odd.weight": torch.zeros(8, 8, dtype=torch.uint8), "odd.weight_scale": torch.ones(8, 1)}
    odd["odd.weight_scale"] = odd["odd.weight_scale"].to(torch.float8_e4m3fn)
    odd |= {"odd.weight_scale_2": torch.tensor(1.0), "odd.input_scale": torch.tensor(1.0)}
    edited(
        data / MODELOPT_FILE,
        tmp_path / WEIGHTS,
        lambda tensors: (untile(tensors), tensors.update(odd)),
    )
    contents = opened(tmp_path)[1]
    assert contents.evidence[1].startswith("scales row major: implied")
    weights = plain_parts(tmp_path)
    del weights["odd"]
    assert_stands_for(weights, data / "modelopt_flux1_nvfp4/expected.safetensors", EXACT)


def test_the_model_shows_padding_that_no_part_shows(data: Path, tmp_path: Path) -> None:
    config = json.loads((data / "base/flux1/config.json").read_text()) | {"in_channels": 24}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    tensors = FluxTransformer2DModel.from_config(config).bfloat16().state_dict()
    for name in ("x_embedder", "proj_out"):
        stored = kitchen("TensorCoreNVFP4Layout", tensors.pop(f"{name}.weight"), format="nvfp4")
        tensors |= {key.replace("X.", f"{name}."): value for key, value in stored.items()}
    save_file(tensors, tmp_path / WEIGHTS)
    assert opened(tmp_path)[1].linears["x_embedder"].shape == (128, 32)
    assert opened(tmp_path)[1].linears["proj_out"].shape == (24, 128)
    layer = quant_linears(load_flux(tmp_path))["x_embedder"]
    assert (layer.out_features, layer.in_features) == (128, 24)
    assert layer(torch.randn(2, 24).bfloat16()).shape == (2, 128)


def test_a_layer_that_is_larger_than_padding_explains_is_an_error(
    data: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(
        ((data / MODELOPT_FILE).parent / "config.json").read_text()
    )

    def grow(tensors: dict[str, torch.Tensor]) -> None:
        key = "transformer_blocks.0.attn.to_q.weight"
        tensors[key] = torch.nn.functional.pad(tensors[key], (0, 64))

    edited(data / MODELOPT_FILE, tmp_path / WEIGHTS, grow)
    with pytest.raises(ShapeMismatch, match="to_q"):
        load_flux(tmp_path)


def test_modelopts_comfy_file_runs(data: Path) -> None:
    assert len(quant_linears(load_flux((data / MODELOPT_FILE).parent))) == 20
