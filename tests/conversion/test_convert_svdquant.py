"""`--to nunchaku` and `--to row-major` keep all bytes, and raise for layers they cannot store."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import mezzotint
from mezzotint.checkpoint import Checkpoint
from mezzotint.checkpoint.encoded_layers import EncodedLayers
from mezzotint.conversion.planning import plan_contents
from mezzotint.errors import Unsupported
from mezzotint.families import families
from mezzotint.families.building import build_meta_model
from mezzotint.formats import targets
from mezzotint.formats.writers import nunchaku, row_major
from mezzotint.formats.writers.writer import CannotStore, ModelInfo
from mezzotint.loading import plan
from mezzotint.schemes import SVDQUANT_INT4, SVDQUANT_NVFP4, Scheme
from support.checkpoint_edits import WEIGHTS, rewrite
from support.checkpoint_makers import FILE, svdquant
from support.nunchaku_files import CASES, LEGACY, golden, same_bytes
from support.pipeline_cases import Case

FLUX_INT4, FLUX_NVFP4, ZIMAGE = CASES
MODULATION = "*norm*.linear"
FC2 = "transformer_blocks.0.ff.net.2"


def same_tensors(one: Path, other: Path) -> None:
    """Every tensor of two files is the same, to the byte."""
    ours, theirs = load_file(one), load_file(other)
    assert ours.keys() == theirs.keys()
    assert not [key for key in theirs if not same_bytes(ours[key], theirs[key])]


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata())


def through(source: Path, folder: Path, *targets: str) -> Path:
    """The file that a chain of lossless conversions ends with."""
    for number, to in enumerate(targets):
        report = mezzotint.convert(source, folder / f"{number}-{to}", to=to)
        assert not report.transforms
        source = report.output
    return source


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("way", [(), ("mezzotint",)], ids=["at once", "by way of mezzotint"])
def test_nunchakus_own_file_comes_back_byte_for_byte(
    data: Path, tmp_path: Path, case: str, way: tuple[str, ...]
) -> None:
    """Fused layers, AWQ modulation, shifted biases, padding and smooth_orig included."""
    file = golden(data, case)
    written = through(file, tmp_path, *way, "nunchaku")
    same_tensors(written, file)
    ours, theirs = metadata(written), metadata(file)
    for key in ("config", "quantization_config"):
        assert json.loads(ours[key]) == json.loads(theirs[key])
    assert ours["model_class"] == theirs["model_class"]
    assert Checkpoint.open(written).detected.format.name == "nunchaku"


def test_an_older_folder_becomes_the_merged_file(data: Path, tmp_path: Path) -> None:
    same_tensors(through(data / LEGACY, tmp_path, "nunchaku"), golden(data, FLUX_INT4))


@pytest.mark.parametrize("scheme", [SVDQUANT_INT4, SVDQUANT_NVFP4], ids=lambda scheme: scheme.name)
def test_qwen_image_generates_the_same_from_nunchakus_file(
    cases: Callable[[str], Case], tmp_path: Path, scheme: Scheme
) -> None:
    """Without a golden file: write as Nunchaku does and read again, AWQ modulation included."""
    case = cases("qwenimage")
    ours = tmp_path / "ours"
    svdquant(case, scheme, ours, modulation=True)
    file = through(ours, tmp_path, "nunchaku")
    assert "2 AWQ W4A16" in Checkpoint.open(file).detected.evidence
    assert torch.equal(
        case.generate(transformer=file).latents, case.generate(transformer=ours).latents
    )
    same_tensors(through(file, tmp_path, "mezzotint") / WEIGHTS, ours / FILE)


@pytest.mark.parametrize("way", [("row-major",), ("row-major", "mezzotint", "row-major")], ids=len)
def test_nunchaku_comes_back_from_row_major_byte_for_byte(
    data: Path, tmp_path: Path, way: tuple[str, ...]
) -> None:
    same_tensors(through(golden(data, ZIMAGE), tmp_path, *way, "nunchaku"), golden(data, ZIMAGE))


def test_row_major_is_a_component_folder_that_states_its_order(data: Path, tmp_path: Path) -> None:
    folder = through(golden(data, ZIMAGE), tmp_path, "row-major")
    found = Checkpoint.open(folder)
    assert found.detected.format.name == "row_major"
    assert "vectors row-major, declared by conversion in the header" in found.detected.evidence
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "svdquant",
        "rank": 32,
        "precision": "int4",
        "act_unsigned": False,
        "modules_to_not_convert": ["lm_head"],
    }
    plan(found, build_meta_model("ZImageTransformer2DModel", config))


def test_modulation_in_bf16_lets_flux_become_row_major_and_not_nunchaku_again(
    data: Path, tmp_path: Path
) -> None:
    source = Checkpoint.open(golden(data, FLUX_NVFP4))
    with pytest.raises(Unsupported, match="is AWQ W4A16, and row-major files store SVDQuant"):
        mezzotint.convert(source.header.path, tmp_path / "rows", to="row-major")
    report = mezzotint.convert(
        source.header.path, tmp_path / "rows", to="row-major", keep_bf16=[MODULATION]
    )
    assert report.transforms == {"decoded to BF16": 3}
    rows = Checkpoint.open(tmp_path / "rows")
    assert all(torch.equal(rows.weight(module), source.weight(module)) for module in rows.modules)
    with pytest.raises(
        Unsupported,
        match=r"norm\.linear and 2 more: unquantized, and Nunchaku needs quantized weights",
    ):
        mezzotint.convert(tmp_path / "rows", tmp_path / "again", to="nunchaku")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rows"]


def test_shifted_and_awq_layers_are_refused_together(data: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported) as refused:
        mezzotint.convert(golden(data, FLUX_INT4), tmp_path / "rows", to="row-major")
    assert (
        "proj_out, transformer_blocks.0.ff.net.2, "
        "transformer_blocks.0.ff_context.net.2: follows a GELU" in str(refused.value)
    )
    assert "norm1.linear, transformer_blocks.0.norm1_context.linear: is AWQ W4A16" in str(
        refused.value
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["nunchaku", "row-major"])
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("modelopt_flux1_nvfp4/checkpoint", "is NVFP4, not SVDQuant"),
        ("modelopt_wan_fp8/checkpoint", r"is FP8 \(e4m3\), not SVDQuant"),
        ("base/flux1", "the layers are unquantized"),
    ],
)
def test_other_schemes_are_refused(
    data: Path, tmp_path: Path, source: str, reason: str, to: str
) -> None:
    with pytest.raises(Unsupported, match=reason):
        mezzotint.convert(data / source, tmp_path / "out", to=to)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("writer", [nunchaku, row_major])
def test_other_models_are_refused(data: Path, writer: ModuleType) -> None:
    (piece,) = Checkpoint.open(golden(data, ZIMAGE)).read("layers.0.attention.to_out.0")
    answer = writer.TARGET.writer(ModelInfo(families()["wan"], {})).layer(
        {"blocks.0.attn1.to_q": [piece]}
    )
    assert answer == CannotStore("Nunchaku does not quantize this layer of a WanTransformer3DModel")


def test_a_part_of_a_fused_layer_cannot_be_left_out(data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        Unsupported,
        match=r"to_qkv holds attention\.to_q, .* together, and attention\.to_k is not quant",
    ):
        mezzotint.convert(
            golden(data, ZIMAGE), tmp_path / "out", to="nunchaku", keep_bf16=["layers.0.*.to_k"]
        )


def another_shift(tensors: dict[str, Tensor]) -> None:
    tensors[f"{FC2}.shift"] = torch.tensor(0.25)


def smooth_of_its_own(tensors: dict[str, Tensor]) -> None:
    tensors["transformer_blocks.0.attn.to_k.smooth"] *= 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            another_shift,
            r"ff\.net\.2: has shift 0\.25, and Nunchaku computes the layer with 0\.171875",
        ),
        (
            smooth_of_its_own,
            r"to_v: weights cannot be concatenated by rows: their smooth differ",
        ),
    ],
)
def test_numbers_that_nunchaku_cannot_hold_are_refused_before_anything_is_written(
    data: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], reason: str
) -> None:
    folder = through(golden(data, FLUX_INT4), tmp_path, "mezzotint")
    rewrite(folder, change)
    with pytest.raises(Unsupported, match=reason):
        mezzotint.convert(folder, tmp_path / "out", to="nunchaku")
    assert [file.name for file in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize("to", ["nunchaku", "row-major"])
def test_a_plan_keeps_none_of_the_numbers_that_it_was_decided_by(data: Path, to: str) -> None:
    """In a large model, these add up to more than the memory that a conversion may take."""
    checkpoint = Checkpoint.open(golden(data, ZIMAGE))
    model = ModelInfo(families()["zimage"], checkpoint.header.config)
    assert checkpoint.linears
    before = real_tensors()
    contents = plan_contents(EncodedLayers(checkpoint), targets()[to].writer(model), (), None)
    assert contents.groups
    assert real_tensors() <= before


def real_tensors() -> int:
    gc.collect()
    return sum(type(item) is Tensor and not item.is_meta for item in gc.get_objects())


def test_nunchakus_file_needs_the_models_configuration(data: Path, tmp_path: Path) -> None:
    folder = through(golden(data, ZIMAGE), tmp_path, "row-major")
    (folder / "config.json").unlink()
    with pytest.raises(
        Unsupported, match="no model configuration was found, which Nunchaku's file needs"
    ):
        mezzotint.convert(folder / WEIGHTS, tmp_path / "out", to="nunchaku")
