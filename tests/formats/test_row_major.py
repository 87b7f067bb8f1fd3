"""Row-major SVDQuant from Nunchaku's golden files, with vectors in both orders."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mezzotint.checkpoint import Checkpoint
from mezzotint.errors import MissingTensor, UnknownFormat, Unsupported
from mezzotint.families import families
from mezzotint.families.building import build_meta_model
from mezzotint.formats import detect_format, read_header
from mezzotint.formats.writers.row_major import CONVERSION
from mezzotint.formats.writers.svdquant import fuse_stored_linear, row_major_tensors
from mezzotint.loading import plan
from support.checkpoint_edits import rewrite
from support.checkpoint_makers import row_major
from support.nunchaku_files import as_nunchaku, as_rows, changed, golden, same_bytes
from support.pipeline_cases import Case

FLUX, ZIMAGE = "nunchaku_flux1_nvfp4_r32", "nunchaku_zimage_int4_r32"
VLLM = {"tool": "convert_nunchaku_to_svdquant", "layout": "row_major"}
each_case = pytest.mark.parametrize("case", [FLUX, ZIMAGE])


@each_case
@pytest.mark.parametrize(
    ("packed", "conversion", "evidence"),
    [
        (False, CONVERSION, "vectors row-major, declared by conversion in the header"),
        (False, VLLM, "vectors row-major, inferred: smooth follows"),
        (True, VLLM, "vectors in fragment order, inferred: smooth follows"),
    ],
    ids=["ours", "row-major", "fragments"],
)
def test_weights_equal_those_of_the_nunchaku_file(
    data: Path, tmp_path: Path, case: str, packed: bool, conversion: dict[str, str], evidence: str
) -> None:
    source = Checkpoint.open(golden(data, case))
    rows = Checkpoint.open(as_rows(source, tmp_path / "a.safetensors", packed, conversion))
    assert rows.detected.format.name == "row_major"
    assert evidence in rows.detected.evidence
    assert rows.family is source.family
    for module in rows.modules:
        assert torch.equal(rows.weight(module), source.weight(module)), module
        ours, theirs = rows.bias(module), source.bias(module)
        assert (ours is None and theirs is None) or torch.equal(ours, theirs), module


@each_case
@pytest.mark.parametrize("packed", [False, True])
def test_every_tensor_has_its_place_in_the_model(
    data: Path, tmp_path: Path, case: str, packed: bool
) -> None:
    source = Checkpoint.open(golden(data, case))
    rows = Checkpoint.open(as_rows(source, tmp_path / "a.safetensors", packed, VLLM))
    plan(rows, build_meta_model(rows.family.transformer_class, rows.header.config))


@each_case
def test_the_same_bytes_are_written_back(data: Path, tmp_path: Path, case: str) -> None:
    first = as_rows(
        Checkpoint.open(golden(data, case)), tmp_path / "a.safetensors", False, CONVERSION
    )
    again = load_file(
        as_rows(Checkpoint.open(first), tmp_path / "b.safetensors", False, CONVERSION)
    )
    before = load_file(first)
    assert before.keys() == again.keys()
    assert all(same_bytes(again[key], value) for key, value in before.items())


def test_nunchaku_to_rows_and_back_is_lossless(data: Path, tmp_path: Path) -> None:
    stored = load_file(golden(data, ZIMAGE))
    rows = as_rows(Checkpoint.open(golden(data, ZIMAGE)), tmp_path / "a.safetensors", True, VLLM)
    written = as_nunchaku(Checkpoint.open(rows))
    assert stored.keys() == written.keys()
    assert all(same_bytes(written[key], value) for key, value in stored.items())


def test_outer_scales_of_one_come_and_go(data: Path, tmp_path: Path) -> None:
    """Row-major files have wcscales and wtscale; Nunchaku's have only the one that is not 1."""
    rows = as_rows(
        Checkpoint.open(golden(data, FLUX)), tmp_path / "a.safetensors", False, CONVERSION
    )
    tensors = load_file(rows)
    assert tensors["transformer_blocks.0.attn.to_qkv.wtscale"].tolist() == [1.0]
    assert tensors["transformer_blocks.0.ff.net.2.wcscales"].eq(1).all()
    stored, written = load_file(golden(data, FLUX)), as_nunchaku(Checkpoint.open(rows))
    quantized = {key: value for key, value in stored.items() if "norm" not in key}
    assert all(same_bytes(written[key], value) for key, value in quantized.items())
    assert not any(key.endswith("wcscales") and "qkv" not in key for key in written)


def test_bytes_are_row_major(data: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(golden(data, FLUX))
    tensors = load_file(as_rows(source, tmp_path / "a.safetensors", False, CONVERSION))
    parts = source.parts("transformer_blocks.0.ff.net.2")
    name = "transformer_blocks.0.ff.net.2"
    assert tensors[f"{name}.qweight"].dtype == torch.int8
    assert torch.equal(tensors[f"{name}.qweight"].view(torch.uint8), parts["codes"])
    assert torch.equal(tensors[f"{name}.wscales"].float(), parts["block_scale"].float().t())
    assert torch.equal(tensors[f"{name}.proj_down"], parts["proj_down"].t())
    assert torch.equal(tensors[f"{name}.smooth_factor"], parts["smooth"])


def test_codes_that_a_converter_left_in_fragments_are_noticed(data: Path, tmp_path: Path) -> None:
    """The file declares row-major, and its INT4 codes are in fragment order."""
    metadata = {"conversion": '{"layout": "row_major"}'}
    save_file(load_file(golden(data, ZIMAGE)), tmp_path / "a.safetensors", metadata)
    found = detect_format(read_header(tmp_path / "a.safetensors"))
    assert found.format.name == "nunchaku"
    assert "conversion in the header declares row-major; inferred from" in found.evidence


def test_the_configuration_may_declare_it(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    file = as_rows(Checkpoint.open(golden(data, FLUX)), tmp_path / "a.safetensors", False, VLLM)
    changed(
        file, folder / "diffusion_pytorch_model.safetensors", lambda _: None, keep_metadata=False
    )
    (folder / "config.json").write_text(
        '{"quantization_config": {"quant_method": "svdquant", "rank": 32}}'
    )
    found = detect_format(read_header(folder))
    assert found.format.name == "row_major"
    assert "declared by quant_method svdquant in config.json" in found.evidence


def test_an_undecidable_order_is_reported_as_assumed(data: Path, tmp_path: Path) -> None:
    file = as_rows(Checkpoint.open(golden(data, ZIMAGE)), tmp_path / "a.safetensors", False, VLLM)

    def flatten(tensors: dict[str, torch.Tensor]) -> None:
        for key in tensors:
            if key.endswith(".smooth_factor"):
                tensors[key] = torch.ones_like(tensors[key])

    changed(file, tmp_path / "b.safetensors", flatten)
    assert (
        "vectors assumed row-major"
        in detect_format(read_header(tmp_path / "b.safetensors")).evidence
    )


@pytest.mark.parametrize("packed", [False, True])
def test_base_weights_decide_the_order_of_vectors(data: Path, tmp_path: Path, packed: bool) -> None:
    """The base decides even against the declaration of the file."""
    source = Checkpoint.open(golden(data, FLUX))
    file = as_rows(source, tmp_path / "a.safetensors", packed, CONVERSION)
    rows = Checkpoint.open(file, base=data / "base/nunchaku_flux1")
    assert all(torch.equal(rows.weight(module), source.weight(module)) for module in rows.modules)
    plain, fragments = (
        float(error)
        for error in re.findall(r"error ([\d.]+) row-major, ([\d.]+)", rows.evidence)[0]
    )
    assert 1.5 * min(plain, fragments) < (plain if packed else fragments)
    declared = Checkpoint.open(file)
    same = all(
        torch.equal(declared.weight(module), source.weight(module)) for module in rows.modules
    )
    assert same != packed


def test_layers_smaller_than_a_fragment_have_but_one_order(
    cases: Callable[[str], Case], tmp_path: Path
) -> None:
    case = cases("qwenimage")
    rows = Checkpoint.open(row_major(case, tmp_path / "made"), base=case.folder)
    assert re.search(
        r"vectors row-major, implied by \S+ \(\d+ x \d+, no multiple of 128\)", rows.evidence
    )
    assert "measured" not in rows.evidence


def test_weights_of_another_model_decide_nothing(data: Path, tmp_path: Path) -> None:
    file = as_rows(Checkpoint.open(golden(data, FLUX)), tmp_path / "a.safetensors", False, VLLM)
    base = Path(shutil.copytree(data / "base/nunchaku_flux1", tmp_path / "base"))
    rewrite(
        base,
        lambda tensors: tensors.update({name: value.flip(-1) for name, value in tensors.items()}),
    )
    with pytest.raises(UnknownFormat, match="in neither order of vectors"):
        Checkpoint.open(file, base=base)


def test_a_smooth_of_ones_leaves_the_order_open(data: Path, tmp_path: Path) -> None:
    """Vectors that are constant within runs of 16 are the same in both orders."""
    file = as_rows(Checkpoint.open(golden(data, FLUX)), tmp_path / "a.safetensors", False, VLLM)
    rows = Checkpoint.open(file)
    base = Path(shutil.copytree(data / "base/nunchaku_flux1", tmp_path / "base"))

    def flatten(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {
            key: torch.ones_like(value)
            for key, value in tensors.items()
            if key.endswith(".smooth_factor")
        }

    flat = Checkpoint.open(changed(file, tmp_path / "b.safetensors", flatten))
    rewrite(
        base,
        lambda tensors: tensors.update(
            {f"{m}.weight": flat.weight(m).bfloat16() for m in rows.modules}
        ),
    )
    assert (
        "which does not decide" in Checkpoint.open(tmp_path / "b.safetensors", base=base).evidence
    )


def test_a_missing_smooth_is_an_error_and_not_a_guess(data: Path, tmp_path: Path) -> None:
    file = as_rows(Checkpoint.open(golden(data, ZIMAGE)), tmp_path / "a.safetensors", False, VLLM)
    key = "layers.0.attention.to_out.0.smooth_factor"
    changed(file, tmp_path / "b.safetensors", lambda tensors: tensors.pop(key))
    checkpoint = Checkpoint.open(tmp_path / "b.safetensors")
    assert "vectors row-major, inferred" in checkpoint.detected.evidence
    with pytest.raises(MissingTensor, match=r"to_out\.0\.smooth_factor is not there"):
        checkpoint.weight("layers.0.attention.to_out.0")


def test_shifted_and_awq_layers_are_refused(data: Path) -> None:
    checkpoint = Checkpoint.open(golden(data, "nunchaku_flux1_int4_r32"))
    for module, reason in (
        ("transformer_blocks.0.ff.net.2", "shifted"),
        ("transformer_blocks.0.norm1.linear", "AWQ"),
    ):
        with pytest.raises(Unsupported, match=reason):
            row_major_tensors(module, checkpoint.read(module)[0])


def test_halves_of_a_swiglu_are_gate_first(data: Path) -> None:
    checkpoint = Checkpoint.open(golden(data, ZIMAGE))
    fused = families()["zimage"].nunchaku.stored_layers(checkpoint.modules, row_major=True)[
        "layers.0.feed_forward.w13"
    ]
    assert [module for module, _ in fused] == [
        "layers.0.feed_forward.w1",
        "layers.0.feed_forward.w3",
    ]
    weight = fuse_stored_linear([checkpoint.read(module)[piece] for module, piece in fused])
    gate = checkpoint.parts("layers.0.feed_forward.w1")["codes"]
    assert torch.equal(
        row_major_tensors("a", weight)["a.qweight"][: len(gate)].view(torch.uint8), gate
    )
