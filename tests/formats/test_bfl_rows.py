"""FLUX.3's forms, FP8 with a scale per row and NVFP4 with scales in rows, as diffusers reads them.

diffusers is the tool: it quantizes each matrix, loads the file, and dequantizes it.
"""

from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.quantizers.bfl import utils as tool
from safetensors.torch import save_file
from torch import Tensor, nn

import mezzotint
from conftest import RecordSupport
from mezzotint.checkpoint import Checkpoint
from mezzotint.formats import detect_format, read_header
from mezzotint.layouts import swap_nibbles, to_tiles
from mezzotint.schemes import FP8, NVFP4
from mezzotint.tensor import PLAIN, Layout
from support.golden_files import FLUX2_DEV, KLEIN
from support.modelopt_exporter import in_original_names
from support.original_names import TO_ORIGINAL
from support.tool_goldens import random_matrices

SIZES = {"narrow": KLEIN, "wide": FLUX2_DEV}
FORMS = ("fp8r", "nvfp4")


def stored(matrix: Tensor, form: str) -> dict[str, Tensor]:
    """Return what a file of this form has of a matrix."""
    if form == "fp8r":
        codes, scale = tool.quantize_fp8r(matrix)
        return {"weight": codes, "weight_scale": scale}
    codes, scale, outer = tool.quantize_nvfp4(matrix)
    inputs = {"weight_scale_2": outer, "input_scale": torch.tensor(0.01)}
    return {"weight": codes, "weight_scale": scale} | inputs


def model_of(sizes: dict[str, object]) -> nn.Module:
    torch.manual_seed(0)
    given = {name: value for name, value in sizes.items() if name != "_class_name"}
    return diffusers.Flux2Transformer2DModel(**given).bfloat16()


def saved(folder: Path, form: str, model: nn.Module) -> Path:
    """Write a file under the makers' names, with the matrices of its blocks quantized."""
    tensors = in_original_names(model.state_dict(), TO_ORIGINAL["flux2"])
    for name, weight in list(tensors.items()):
        if "blocks." in name and weight.ndim == 2:
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{part}": v for part, v in stored(weight, form).items()}
    model.save_config(folder)
    return written(folder, tensors)


def written(folder: Path, tensors: dict[str, Tensor]) -> Path:
    file = folder / "model.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    return file


def dequantized_by_diffusers(file: Path) -> dict[str, Tensor]:
    model = diffusers.Flux2Transformer2DModel.from_single_file(
        str(file),
        config=str(file.parent),
        quantization_config=diffusers.BFLQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
        local_files_only=True,
    )
    model.dequantize()
    return model.state_dict()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_what_diffusers_loads_we_decode_bit_for_bit(
    tmp_path: Path, record_support: RecordSupport, form: str, size: str
) -> None:
    """Both orders of scales fit the wide model: its BF16 weights show which one it is."""
    model = model_of(SIZES[size])
    file = saved(tmp_path, form, model)
    model.save_pretrained(tmp_path / "base")
    ambiguous = form == "nvfp4" and size == "wide"
    checkpoint = Checkpoint.open(file, base=tmp_path / "base" if ambiguous else None)
    assert checkpoint.detected.format.name == "bfl"
    theirs = dequantized_by_diffusers(file)
    for module in checkpoint.modules:
        assert torch.equal(checkpoint.weight(module), theirs[f"{module}.weight"])
    record_support("golden", checkpoint)


@pytest.mark.parametrize("form", FORMS)
def test_verify_finds_a_file_of_this_kind_sound(tmp_path: Path, form: str) -> None:
    report = mezzotint.verify(saved(tmp_path, form, model_of(KLEIN)))
    assert report.exit_code == 0, report.findings


def random_layers(form: str) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield (stored tensors, the matrix that diffusers decodes)."""
    for matrix in random_matrices(1000, 16):
        if form == "nvfp4" and not matrix.any():
            continue  # diffusers divides by zero
        layer = stored(matrix, form)
        names = ("weight", "weight_scale", *(("weight_scale_2",) if form == "nvfp4" else ()))
        yield layer, getattr(tool, f"dequantize_{form}")(*(layer[name] for name in names))


def test_a_thousand_matrices_of_fp8r_decode_to_diffusers_bits() -> None:
    for layer, truth in random_layers("fp8r"):
        parts = {"codes": layer["weight"], "weight_scale": layer["weight_scale"]}
        assert torch.equal(FP8.dequantize(parts), truth)


def test_a_thousand_matrices_of_nvfp4_decode_to_diffusers_bits() -> None:
    for layer, truth in random_layers("nvfp4"):
        parts = {"codes": layer["weight"], "block_scale": layer["weight_scale"]}
        ours = NVFP4.dequantize(parts | {"global_scale": layer["weight_scale_2"]})
        assert torch.equal(ours, truth)


def layouts_of(file: Path) -> set[Layout]:
    header = read_header(file)
    linears = detect_format(header).format.contents(header).linears.values()
    return {linear.layout for linear in linears}


def test_names_of_flux3_say_that_scales_are_in_rows(tmp_path: Path) -> None:
    """Both orders fit 128 x 64; of other models, the file is taken for comfy-kitchen's."""
    torch.manual_seed(0)
    parts = stored(torch.randn(128, 64), "nvfp4")
    layer = {f"single_blocks.0.q_proj.{name}": value for name, value in parts.items()}
    assert layouts_of(written(tmp_path, layer)) == {Layout("high_first", "tiles_128x4")}
    name = {"early_stream_modulations.image.lin.weight": torch.zeros(4, 4)}
    assert layouts_of(written(tmp_path, layer | name)) == {PLAIN}


def test_shapes_that_only_rows_have_mean_low_first_codes(tmp_path: Path) -> None:
    layer = {f"double_blocks.0.x.{n}": v for n, v in stored(torch.randn(24, 48), "nvfp4").items()}
    assert layouts_of(written(tmp_path, layer)) == {PLAIN}
    tiled = {
        "double_blocks.0.x.weight": swap_nibbles(layer["double_blocks.0.x.weight"]),
        "double_blocks.0.x.weight_scale": to_tiles(layer["double_blocks.0.x.weight_scale"]),
    }
    assert layouts_of(written(tmp_path, layer | tiled)) == {Layout("high_first", "tiles_128x4")}


def test_scales_that_look_row_major_mean_low_first_codes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained = torch.randn(512, 512) * torch.randn(512).exp() * torch.randn(512, 1).exp()
    layer = {f"double_blocks.0.x.{n}": v for n, v in stored(trained, "nvfp4").items()}
    checkpoint = Checkpoint.open(written(tmp_path, layer))
    assert {linear.layout for linear in checkpoint.contents.linears.values()} == {PLAIN}
    assert "scales row major: inferred" in checkpoint.evidence
    assert "codes low first: as every known tool writes them" in checkpoint.evidence
