"""`verify` finds each damage with the intended check, and nothing in intact files."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import mezzotint
from mezzotint.errors import UnexpectedTensor
from mezzotint.hub import hub_path, local_copy
from mezzotint.verification import Severity, VerifyReport, against_base
from mezzotint.verification.against_base import LayerError
from support.checkpoint_edits import WEIGHTS, edited, rewrite
from support.hub_server import Hub, serving

LAYER = "transformer_blocks.0.attn.to_q"


@pytest.fixture
def shards(nvfp4: Path, tmp_path: Path) -> Path:
    """A Mezzotint folder of several files."""
    mezzotint.convert(nvfp4, tmp_path / "mz", shard_bytes=300_000)
    return tmp_path / "mz"


def found(report: VerifyReport) -> set[tuple[str, str]]:
    """{(severity, check)}"""
    return {(finding.severity.name.lower(), finding.check) for finding in report.findings}


def shard(folder: Path, number: int) -> Path:
    return sorted(folder.glob("*.safetensors"))[number - 1]


@pytest.mark.parametrize(
    "path", ["modelopt_flux1_fp8/checkpoint", "modelopt_flux1_nvfp4/checkpoint"]
)
def test_sound_exports_are_sound_beside_their_base(data: Path, path: str) -> None:
    report = mezzotint.verify(data / path, data / "base/flux1")
    assert report.findings == ()
    assert report.exit_code == 0
    assert sum(layer.scheme != "plain" for layer in report.layers) == 20
    assert all(layer.cosine > 0.99 for layer in report.layers)


def test_a_sound_folder_of_shards_has_its_checksums_compared(shards: Path) -> None:
    steps: list[tuple[int, int]] = []
    report = mezzotint.verify(shards, on_progress=lambda done, total: steps.append((done, total)))
    assert (report.exit_code, report.checksums, report.findings) == (
        0,
        len(list(shards.glob("*.safetensors"))),
        (),
    )
    assert steps[-1][0] == steps[-1][1]


@pytest.mark.parametrize(
    ("case", "severity", "check"),
    [
        ("config_lies_about_algo", 2, "format"),
        ("duplicate_key_across_shards", 2, "duplicates"),
        ("header_length_lie", 2, "header"),
        ("malicious_pickle", 2, "format"),
        ("missing_input_scale", 2, "layers"),
        ("missing_shard", 2, "index"),
        ("missing_weight_scale", 2, "layers"),
        ("nan_scale", 2, "layers"),
        ("stale_index_beside_single_file", 1, "index"),
        ("truncated_shard", 2, "header"),
        ("wrong_shape_scale", 2, "layers"),
        ("zero_size_file", 2, "header"),
    ],
)
def test_each_damage_is_found_by_the_check_that_is_meant_for_it(
    data: Path, case: str, severity: int, check: str
) -> None:
    """test_golden.py checks the messages."""
    report = mezzotint.verify(data / f"broken_{case}/checkpoint")
    assert report.exit_code == severity
    (finding,) = [finding for finding in report.findings if finding.severity == severity]
    assert finding.check == check


def test_tensors_that_are_no_part_of_the_model_are_named(data: Path, tmp_path: Path) -> None:
    extra = {"my_extra.weight": torch.zeros(3).bfloat16()}
    full = data / "bfl_flux2dev_nvfp4/checkpoint/flux2-dev-nvfp4.safetensors"
    file = edited(
        full,
        tmp_path / "own.safetensors",
        lambda tensors: tensors.update({"final_layer.x_scale": torch.ones(1)}),
    )
    report = mezzotint.verify(file)
    assert ("suspicious", "unknown") in found(report)
    assert any(
        "final_layer.x_scale does not belong" in note for note in mezzotint.inspect(file).notes
    )
    swapped = data / "comfy_qwenimage_mixed_nvfp4_fp8/checkpoint/qwen-image-mixed.safetensors"
    file = edited(swapped, tmp_path / "a.safetensors", lambda tensors: tensors.update(extra))
    variant, finding = [
        one for one in mezzotint.verify(file, data / "base/qwenimage").findings if one.severity
    ]
    assert variant.severity == Severity.NOT_READ
    assert "my_extra.weight is left over" in variant.message
    assert "an unknown variant of Qwen-Image" in variant.message
    assert "has no tensor of the same shape for my_extra.weight" in finding.message
    with pytest.raises(UnexpectedTensor, match=r"my_extra\.weight is left over"):
        mezzotint.convert(file, tmp_path / "out", base=data / "base/qwenimage")


def test_nibbles_that_are_swapped_throughout_are_one_finding(data: Path) -> None:
    report = mezzotint.verify(
        data / "broken_nibble_swapped_comfy/checkpoint", data / "base/qwenimage"
    )
    (finding,) = [finding for finding in report.findings if finding.severity]
    assert (finding.severity, finding.check) == (Severity.BROKEN, "layout")
    assert "codes low first" in finding.message
    assert "unlike the format's usual layout (codes high first" in finding.message
    assert all(layer.cosine > 0.99 for layer in report.layers)


def test_swapped_nibbles_are_seen_beside_the_base(nvfp4: Path, data: Path) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.weight"] = (tensors[f"{LAYER}.weight"] << 4) | (
            tensors[f"{LAYER}.weight"] >> 4
        )

    rewrite(nvfp4, swap)
    report = mezzotint.verify(nvfp4, data / "base/flux1")
    (finding,) = report.findings
    assert (finding.severity, finding.check, finding.where) == (Severity.BROKEN, "base", LAYER)
    assert "nibble order" in finding.hint


def test_a_layer_that_lacks_a_part_is_left_out_beside_the_base(nvfp4: Path, data: Path) -> None:
    rewrite(nvfp4, lambda tensors: tensors.pop(f"{LAYER}.weight_scale"))
    report = mezzotint.verify(nvfp4, data / "base/flux1")
    (finding,) = report.findings
    assert (finding.severity, finding.where) == (Severity.BROKEN, LAYER)
    assert LAYER not in {layer.name for layer in report.layers}


def test_a_flipped_byte_is_a_checksum_that_differs(shards: Path) -> None:
    file = shard(shards, 2)
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    report = mezzotint.verify(shards)
    assert ("broken", "checksums") in found(report)
    assert [finding.where for finding in report.findings if finding.check == "checksums"] == [
        file.name
    ]


def test_index_and_shards_are_compared_both_ways(shards: Path) -> None:
    index = shards / f"{WEIGHTS}.index.json"
    entries = json.loads(index.read_text())
    names = list(entries["weight_map"])
    entries["weight_map"]["ghost"] = entries["weight_map"][names[0]]
    del entries["weight_map"][names[1]]
    index.write_text(json.dumps(entries))
    shutil.copy(shard(shards, 1), shards / "old.safetensors")
    findings = {
        (f.severity, f.where) for f in mezzotint.verify(shards).findings if f.check == "index"
    }
    assert findings == {
        (Severity.BROKEN, "ghost"),
        (Severity.SUSPICIOUS, names[1]),
        (Severity.SUSPICIOUS, "old.safetensors"),
    }


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {"a": "../b"}}', '{"weight_map": {}}'])
def test_an_index_that_is_none_is_broken(shards: Path, text: str) -> None:
    (shards / f"{WEIGHTS}.index.json").write_text(text)
    assert ("broken", "index") in found(mezzotint.verify(shards))


def test_two_broken_files_are_both_named(shards: Path) -> None:
    for number in (1, 3):
        shard(shards, number).write_bytes(shard(shards, number).read_bytes()[:1000])
    report = mezzotint.verify(shards)
    assert [f.where for f in report.findings if f.check == "header"] == [
        shard(shards, n).name for n in (1, 3)
    ]


@pytest.mark.parametrize(
    ("byte", "message"),
    [(0x00, "every code is 0x00"), (0x77, "every code is 0x77"), (None, "is saturated")],
)
def test_blank_and_saturated_layers_are_suspicious(
    nvfp4: Path, byte: int | None, message: str
) -> None:
    def fill(tensors: dict[str, torch.Tensor]) -> None:
        codes = tensors[f"{LAYER}.weight"]
        codes.fill_(byte) if byte is not None else codes[: len(codes) * 3 // 4].fill_(0x7F)

    rewrite(nvfp4, fill)
    (finding,) = mezzotint.verify(nvfp4).findings
    assert (finding.severity, finding.where) == (Severity.SUSPICIOUS, LAYER)
    assert message in finding.message


def test_a_layer_whose_scales_are_all_zero_is_blank(nvfp4: Path) -> None:
    rewrite(nvfp4, lambda tensors: tensors[f"{LAYER}.weight_scale"].view(torch.uint8).zero_())
    (finding,) = mezzotint.verify(nvfp4).findings
    assert (finding.severity, finding.where) == (Severity.SUSPICIOUS, LAYER)
    assert "every one of its scales is zero" in finding.message


def test_a_factor_that_most_layers_have_is_missed(nvfp4: Path) -> None:
    def smooth(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.endswith(".weight_scale_2")]:
            module = key.removesuffix(".weight_scale_2")
            tensors[f"{module}.pre_quant_scale"] = torch.ones(
                tensors[f"{module}.weight"].shape[1] * 2
            ).bfloat16()

    rewrite(nvfp4, smooth)
    assert mezzotint.verify(nvfp4).findings == ()
    rewrite(nvfp4, lambda tensors: tensors.pop(f"{LAYER}.pre_quant_scale"))
    (finding,) = mezzotint.verify(nvfp4).findings
    assert (finding.severity, finding.where) == (Severity.SUSPICIOUS, LAYER)
    assert "has no pre_quant_scale, and most other layers have one" in finding.message


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_layers": "two"}, "diffusers cannot build a FluxTransformer2DModel of it (TypeError"),
        (
            {"num_attention_heads": 10**18},
            f"num_attention_heads is {10**18}, and no known model has more than 65,536",
        ),
        ({"num_layers": 10**5}, "num_layers is 100000, and no known model has more than 1000"),
    ],
)
def test_a_config_that_no_model_has_is_broken(
    nvfp4: Path, entries: dict[str, object], message: str
) -> None:
    config = json.loads((nvfp4 / "config.json").read_text())
    (nvfp4 / "config.json").write_text(json.dumps(config | entries))
    (finding,) = mezzotint.verify(nvfp4).findings
    assert (finding.severity, finding.check) == (Severity.BROKEN, "config")
    assert message in finding.message


def test_codes_and_tensors_that_are_no_numbers_are_broken(fp8: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.weight"].view(torch.uint8)[5, 5] = 0x7F
        tensors["proj_out.bias"][0] = float("inf")
        tensors["x_embedder.weight"].zero_()

    rewrite(fp8, damage)
    findings = {(f.severity, f.where) for f in mezzotint.verify(fp8).findings}
    assert findings == {
        (Severity.BROKEN, f"{LAYER}.weight"),
        (Severity.BROKEN, "proj_out.bias"),
        (Severity.SUSPICIOUS, "x_embedder.weight"),
    }


def test_the_config_is_held_against_the_tensors(nvfp4: Path) -> None:
    config = json.loads((nvfp4 / "config.json").read_text())
    (nvfp4 / "config.json").write_text(json.dumps(config | {"num_layers": 2}))
    (finding,) = mezzotint.verify(nvfp4).findings
    assert (finding.severity, finding.check) == (Severity.BROKEN, "config")
    assert "transformer_blocks.1" in finding.message


def test_a_decoded_tree_may_differ_from_its_base_as_quantized_layers_do(
    nvfp4: Path, data: Path, tmp_path: Path
) -> None:
    mezzotint.convert(nvfp4, tmp_path / "bf16", to="bf16")
    assert mezzotint.verify(tmp_path / "bf16", data / "base/flux1").exit_code == 0
    (tmp_path / "bf16/mezzotint.json").unlink()
    assert mezzotint.verify(tmp_path / "bf16", data / "base/flux1").exit_code == 1


def test_an_outlier_among_the_layers_of_a_scheme_is_flagged() -> None:
    errors = [LayerError(f"layer{i}", "nvfp4", 0.1 + i * 0.0005, 0.995) for i in range(20)]
    assert list(against_base.find_outliers(errors, decoded=False)) == []
    (finding,) = against_base.find_outliers(
        [*errors, LayerError("odd", "nvfp4", 0.2, 0.98)], decoded=False
    )
    assert finding.where == "odd"
    assert "the median of its 21 nvfp4 layers is 0.105" in finding.message


def test_an_outlier_as_small_as_rounding_to_fp8_is_none() -> None:
    """Smoothing moves errors between columns: some INT8 layers have 3 times the median error."""
    errors = [LayerError(f"layer{i}", "int8", 0.0066 + i * 0.0001, 0.9999) for i in range(20)]
    assert (
        list(
            against_base.find_outliers(
                [*errors, LayerError("odd", "int8", 0.0294, 0.9996)], decoded=False
            )
        )
        == []
    )


def test_repair_says_where_it_cannot(shards: Path) -> None:
    shard(shards, 1).unlink()
    report = mezzotint.verify(shards, repair=True)
    (repair,) = report.repairs
    assert not repair.fetched
    assert "its origin is unknown" in repair.reason
    assert report.exit_code == 2


@pytest.fixture
def hub(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving({"makers/flux": shards}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def downloaded(name: str) -> Path:
    folder = hub_path(name)
    assert folder is not None
    return local_copy(folder)


def test_repair_fetches_broken_shards_from_the_hub_again(hub: Hub, shards: Path) -> None:
    folder = downloaded("makers/flux")
    cut, gone = shard(folder, 2), shard(folder, 3)
    cut.resolve().write_bytes(cut.read_bytes()[:1000])
    gone.unlink()
    assert mezzotint.verify(folder).exit_code == 2
    hub.served.clear()
    report = mezzotint.verify(folder, repair=True)
    assert {repair.file: repair.fetched for repair in report.repairs} == {
        cut.name: True,
        gone.name: True,
    }
    assert report.exit_code == 0
    assert {name for _, name in hub.served} == {cut.name, gone.name}
    assert gone.read_bytes() == (shards / gone.name).read_bytes()


def test_repair_says_what_the_hub_refuses(hub: Hub, shards: Path) -> None:
    folder = downloaded("makers/flux")
    gone = shard(folder, 3)
    gone.unlink()
    shard(shards, 3).unlink()
    (repair,) = mezzotint.verify(folder, repair=True).repairs
    assert not repair.fetched
    assert repair.reason.startswith("makers/flux@")
