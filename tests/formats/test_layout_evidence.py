"""Layouts that the header does not prove: measured against a base, inferred, or assumed."""

import re
from pathlib import Path

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from safetensors.torch import load_file, save_file

from mezzotint import layouts
from mezzotint.checkpoint import Checkpoint, inspect
from mezzotint.errors import UnknownFormat
from mezzotint.layouts import swap_nibbles
from mezzotint.tensor import PLAIN, Layout, QuantTensor
from support.checkpoint_edits import WEIGHTS, edited
from support.golden_files import EXACT, assert_stands_for, plain_parts

SWAPPED = "broken_nibble_swapped_comfy/checkpoint/qwen-image-mixed.safetensors"
COMFY = "comfy_qwenimage_mixed_nvfp4_fp8/checkpoint/qwen-image-mixed.safetensors"
HIGH, LOW = Layout("high_first", "tiles_128x4"), Layout("low_first", "tiles_128x4")


def nvfp4_layouts(checkpoint: Checkpoint) -> set[Layout]:
    return {
        linear.layout
        for linear in checkpoint.contents.linears.values()
        if linear.scheme.name == "nvfp4"
    }


def weights(checkpoint: Checkpoint) -> dict[str, QuantTensor]:
    linears = checkpoint.contents.linears
    return {
        name: layouts.convert(linear.read(checkpoint.header), PLAIN)
        for name, linear in linears.items()
    }


def test_swapped_nibbles_are_found_with_a_base_and_undone(data: Path) -> None:
    checkpoint = Checkpoint.open(data / SWAPPED, base=data / "base/qwenimage")
    assert nvfp4_layouts(checkpoint) == {LOW}
    assert (
        "unlike the format's usual layout (codes high first, scales tiles 128x4)"
        in checkpoint.evidence
    )
    expected = data / "comfy_qwenimage_mixed_nvfp4_fp8/expected.safetensors"
    assert_stands_for(weights(checkpoint), expected, EXACT)


def test_inspect_prints_what_was_measured(data: Path) -> None:
    evidence = inspect(data / SWAPPED, base=data / "base/qwenimage").evidence
    assert "layout measured on 4 layers against" in evidence
    right, wrong = (float(number) for number in re.findall(r"cosine (-?[\d.]+)", evidence))
    assert right > 0.99
    assert abs(wrong) < 0.1


@pytest.mark.parametrize(
    ("file", "base", "layout"),
    [
        (COMFY, "base/qwenimage", HIGH),
        ("modelopt_flux1_nvfp4/checkpoint", "base/flux1", PLAIN),
        ("modelopt_flux1_nvfp4svd/checkpoint", "base/flux1", PLAIN),
        (f"modelopt_flux1_nvfp4_comfyfile/checkpoint/{WEIGHTS}", "base/flux1", LOW),
    ],
)
def test_a_right_layout_is_confirmed(data: Path, file: str, base: str, layout: Layout) -> None:
    checkpoint = Checkpoint.open(data / file, base=data / base)
    assert nvfp4_layouts(checkpoint) == {layout}
    assert "unlike the format" not in checkpoint.evidence
    assert not checkpoint.contents.assumed


def test_a_base_of_other_weights_is_refused(data: Path, tmp_path: Path) -> None:
    tensors = {
        name: torch.randn(t.shape).to(t.dtype)
        for name, t in load_file(data / "base/qwenimage" / WEIGHTS).items()
    }
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(UnknownFormat, match=r"no arrangement of its bytes agrees with .* cosine"):
        Checkpoint.open(data / COMFY, base=tmp_path)


@pytest.mark.parametrize("codes", ["high_first", "low_first"])
@pytest.mark.parametrize("scales", ["tiles_128x4", "row_major"])
def test_layouts_of_blocks_of_similar_size_are_found(
    data: Path, tmp_path: Path, codes: str, scales: str
) -> None:
    """In untrained weights, scales in the wrong order cost little more than quantization."""
    base, random = load_file(data / "base/flux1" / WEIGHTS), torch.Generator().manual_seed(7)
    stored = {}
    for name in ("attn.to_q", "attn.to_k", "ff.net.0.proj", "ff.net.2"):
        key = f"transformer_blocks.0.{name}.weight"
        base[key] = (torch.rand(base[key].shape, generator=random) - 0.5).bfloat16()
        matrix = base[key].float()
        scale = matrix.abs().amax() / 2688
        parts = QuantizedTensor.from_float(matrix, "TensorCoreNVFP4Layout", scale=scale).state_dict(
            key
        )
        if codes == "low_first":
            parts[key] = swap_nibbles(parts[key])
        if scales == "row_major":
            parts[f"{key}_scale"] = layouts.from_tiles(
                parts[f"{key}_scale"], len(matrix), matrix.shape[1] // 16
            )
        marker = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
        stored |= parts | {key.replace("weight", "comfy_quant"): marker}
    save_file(base, tmp_path / "base.safetensors")
    save_file(base | stored, tmp_path / "a.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "a.safetensors", base=tmp_path / "base.safetensors")
    assert nvfp4_layouts(checkpoint) == {Layout(codes, scales)}


def test_a_base_of_another_size_is_refused(data: Path, tmp_path: Path) -> None:
    tensors = {
        name: torch.nn.functional.pad(value, (0, 64)) if value.ndim == 2 else value
        for name, value in load_file(data / "base/qwenimage" / WEIGHTS).items()
    }
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(
        UnknownFormat, match=r"has no unquantized layer with the shape of transformer_blocks\.0\."
    ):
        Checkpoint.open(data / COMFY, base=tmp_path)


def test_random_weights_show_no_layout_and_evidence_says_so(data: Path) -> None:
    checkpoint = Checkpoint.open(data / SWAPPED)
    assert nvfp4_layouts(checkpoint) == {HIGH}
    assert checkpoint.contents.assumed == {"codes"}
    assert "codes: values alone cannot tell" in checkpoint.evidence
    assert "name the BF16 model as a base to be certain" in checkpoint.evidence


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_2"])
def test_layers_that_lack_a_scale_are_no_sample_and_are_reported(
    data: Path, tmp_path: Path, suffix: str
) -> None:
    source = data / "bfl_flux2dev_nvfp4/checkpoint/flux2-dev-nvfp4.safetensors"
    key = f"double_blocks.0.img_mlp.2.{suffix}"
    file = edited(source, tmp_path / "a.safetensors", lambda tensors: tensors.pop(key), {})
    (missing,) = inspect(file).problems
    assert f"{key} is not there" in missing


@pytest.mark.parametrize("base", [None, "base/qwenimage"])
@pytest.mark.parametrize(
    ("value", "said"), [(0.0, "holds 0, expected"), (float("nan"), "is not finite")]
)
def test_layers_with_unusable_scales_are_no_sample_and_are_odd(
    data: Path, tmp_path: Path, base: str | None, value: float, said: str
) -> None:
    sampled = "transformer_blocks.0.attn.to_v.weight_scale_2"
    file = edited(
        data / COMFY, tmp_path / "a.safetensors", lambda tensors: tensors[sampled].fill_(value)
    )
    report = inspect(file, base=None if base is None else data / base)
    assert any(sampled in note and said in note for note in report.notes)
    assert len(set(report.notes)) == len(report.notes)
    assert not report.problems
    assert ("measured on" in report.evidence) == (base is not None)


def test_links_with_unusable_scales_are_odd(orderly: Path, tmp_path: Path) -> None:
    key = "transformer_blocks.0.attn.to_v.weight_scale_2"
    file = edited(orderly, tmp_path / "a.safetensors", lambda tensors: tensors[key].zero_())
    report = inspect(file)
    assert any(f"{key} holds 0" in note for note in report.notes)
    assert "codes high first: inferred" in report.evidence


@pytest.fixture
def orderly(data: Path, tmp_path: Path) -> Path:
    """Return a ComfyUI file with weights like trained ones: connected layers share sizes."""
    tensors = load_file(data / "base/flux1" / WEIGHTS)
    random = torch.Generator().manual_seed(5)
    block = "transformer_blocks.0."
    names = [("attn.to_v", "attn.to_out.0"), ("attn.add_v_proj", "attn.to_add_out")]
    names += [("ff.net.0.proj", "ff.net.2"), ("ff_context.net.0.proj", "ff_context.net.2")]
    for writer, reader in names:
        size = (
            torch.randn(tensors[f"{block}{writer}.weight"].shape[0], generator=random) * 0.4
        ).exp()
        tensors[f"{block}{writer}.weight"] = tensors[f"{block}{writer}.weight"] * size[:, None]
        tensors[f"{block}{reader}.weight"] = tensors[f"{block}{reader}.weight"] * size[None, :]
    for name in [block + name for pair in names for name in pair]:
        matrix = tensors.pop(f"{name}.weight").float()
        scale = matrix.abs().amax() / 2688
        tensors |= QuantizedTensor.from_float(
            matrix, "TensorCoreNVFP4Layout", scale=scale
        ).state_dict(f"{name}.weight")
        tensors[f"{name}.comfy_quant"] = torch.tensor(
            list(b'{"format": "nvfp4"}'), dtype=torch.uint8
        )
    save_file(tensors, tmp_path / "orderly.safetensors")
    return tmp_path / "orderly.safetensors"


def each(tensors: dict[str, torch.Tensor], change) -> None:
    for key in [
        key for key in tensors if tensors[key].dtype == torch.uint8 and key.endswith(".weight")
    ]:
        change(tensors, key)


def test_the_order_of_nibbles_shows_in_trained_weights(orderly: Path) -> None:
    checkpoint = Checkpoint.open(orderly)
    assert nvfp4_layouts(checkpoint) == {HIGH}
    assert "codes high first: inferred" in checkpoint.evidence
    assert not checkpoint.contents.assumed


def test_swapped_nibbles_show_in_trained_weights(orderly: Path, tmp_path: Path) -> None:
    right = weights(Checkpoint.open(orderly))

    def swap(tensors: dict[str, torch.Tensor], key: str) -> None:
        tensors[key] = swap_nibbles(tensors[key])

    swapped = edited(orderly, tmp_path / "swapped.safetensors", lambda tensors: each(tensors, swap))
    checkpoint = Checkpoint.open(swapped)
    assert nvfp4_layouts(checkpoint) == {LOW}
    assert "unlike the format's usual layout" in checkpoint.evidence
    for name, weight in weights(checkpoint).items():
        assert torch.equal(weight.parts["codes"], right[name].parts["codes"])


def test_row_major_scales_show_in_trained_weights(orderly: Path, tmp_path: Path) -> None:
    right = weights(Checkpoint.open(orderly))

    def untile(tensors: dict[str, torch.Tensor], key: str) -> None:
        scale = key + "_scale"
        rows, packed = tensors[key].shape
        tensors[scale] = layouts.from_tiles(tensors[scale], rows, packed // 8)

    in_rows = edited(orderly, tmp_path / "rows.safetensors", lambda tensors: each(tensors, untile))
    checkpoint = Checkpoint.open(in_rows)
    assert nvfp4_layouts(checkpoint) == {Layout("high_first", "row_major")}
    assert "scales row major: inferred" in checkpoint.evidence
    for name, weight in weights(checkpoint).items():
        assert torch.equal(
            weight.parts["block_scale"].float(), right[name].parts["block_scale"].float()
        )


@pytest.mark.parametrize(("first", "last"), [(0, 128), (5, 9), (100, 300), (383, 384)])
def test_rows_that_are_read_alone_are_those_of_the_whole(data: Path, first: int, last: int) -> None:
    file = data / "bfl_flux2dev_nvfp4/checkpoint/flux2-dev-nvfp4.safetensors"
    checkpoint = Checkpoint.open(file)
    linear = checkpoint.contents.linears["double_blocks.0.img_attn.qkv"]
    whole = plain_parts(file)["double_blocks.0.img_attn.qkv"].select_rows(torch.arange(first, last))
    alone = linear.read_rows(checkpoint.header, first, last)
    for part in whole.parts:
        assert torch.equal(whole.parts[part].float(), alone.parts[part].float()), part
