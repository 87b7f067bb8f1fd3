"""Malicious files raise errors, take little memory, and write nothing to the terminal."""

import json
import os
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mezzotint
from mezzotint.cli.output import foreign
from mezzotint.containers.container import TensorInfo, element_count
from mezzotint.containers.restricted_pickle import PickleInterpreter, UnsafePickle
from mezzotint.errors import BrokenFile, NotSafetensors, UnreadFormat
from mezzotint.formats import read_header
from mezzotint.untrusted.escaping import LONGEST_LINE, markdown, message, printable, shown
from mezzotint.verification import Severity, VerifyReport
from mezzotint.verification.findings import MAX_PRINTED, suspicious
from mezzotint.verification.statistics import Codes, Numbers, add_tensor
from support.checkpoint_edits import WEIGHTS, rewrite

LAYER = "transformer_blocks.0.attn.to_q"
GIB = 2**30


def sparse(file: Path, entries: dict[str, Any], size: int) -> Path:
    """A safetensors file of these header entries over a hole of `size` bytes."""
    text = json.dumps(entries).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + size)
    return file


def entry(dtype: str, shape: list[int], size: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}


@pytest.mark.parametrize(
    "shape", [[2**62] * 300, [2**62] * 100_000, [1] * 9, [2**31, 2**31, 2], [0, 2**62, 2**62]]
)
def test_shapes_that_no_tensor_has_are_refused(tmp_path: Path, shape: list[int]) -> None:
    file = sparse(tmp_path / "a.safetensors", {"a": entry("U8", shape, 0)}, 0)
    with pytest.raises(BrokenFile, match="which no tensor can have") as error:
        read_header(file)
    assert len(str(error.value)) < 1000


def test_the_element_count_is_that_of_a_tensor() -> None:
    assert element_count([]) == 1
    assert element_count([0, 5]) == 0
    assert element_count([2, 3, 5]) == 30
    assert element_count([2**30, 2**30]) is None


def test_a_name_of_megabytes_is_not_printed(tmp_path: Path) -> None:
    file = sparse(tmp_path / "a.safetensors", {"a" * 2**23: entry("U8", [1], 1)}, 1)
    with pytest.raises(BrokenFile, match="a tensor's name has more than 1,000 characters") as error:
        read_header(file)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("size", [50 * 2**20, 3 * GIB])
def test_markers_larger_than_notes_are_not_read(tmp_path: Path, size: int) -> None:
    file = sparse(
        tmp_path / "a.safetensors",
        {"double_blocks.0.x.comfy_quant": entry("U8", [size], size)},
        size,
    )
    tracemalloc.start()
    report = mezzotint.verify(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "expected a marker of at most 65,536" in report.findings[0].message
    assert peak < 20 * 2**20


@pytest.mark.parametrize(("dtype", "seen"), [("F32", Numbers()), ("U8", Codes())])
def test_sixty_four_gigabytes_of_hole_are_looked_at(
    tmp_path: Path, dtype: str, seen: Numbers | Codes
) -> None:
    size = 64 * GIB
    item = 4 if dtype == "F32" else 1
    file = sparse(tmp_path / "a.safetensors", {"a": entry(dtype, [size // item], size)}, size)
    add_tensor(read_header(file).tensors["a"], seen)
    if isinstance(seen, Numbers):
        assert (seen.count, seen.are_zero, seen.finite) == (size // 4, True, True)
    else:
        assert (int(seen.counts[0]), seen.only) == (size, 0)


def test_data_around_holes_is_read(tmp_path: Path) -> None:
    file = sparse(tmp_path / "a.safetensors", {"a": entry("F32", [2**26], 2**28)}, 2**28)
    start = read_header(file).tensors["a"].start
    with file.open("r+b") as stream:
        stream.seek(start + 4 * 12_345_679)
        stream.write(struct.pack("<f", -2.5))
    seen = Numbers()
    add_tensor(read_header(file).tensors["a"], seen)
    assert (seen.lowest, seen.highest, seen.zeros, seen.count) == (-2.5, 0.0, 2**26 - 1, 2**26)


def test_numbers_are_the_same_in_any_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.cat([torch.randn(10_001), torch.zeros(3)]).bfloat16()
    save_file({"a": values}, tmp_path / "a.safetensors")
    monkeypatch.setattr("mezzotint.verification.statistics.BLOCK_BYTES", 1002)
    seen = Numbers()
    add_tensor(read_header(tmp_path / "a.safetensors").tensors["a"], seen)
    sizes = values[values != 0].abs().double().log2()
    assert (seen.count, seen.zeros) == (10_004, 10_004 - len(sizes))
    assert (seen.lowest, seen.highest) == (values.float().min().item(), values.float().max().item())
    assert seen.mean_log2 == pytest.approx(sizes.mean().item())
    assert seen.spread == pytest.approx(sizes.std(correction=0).item())


@pytest.mark.parametrize("entries", [200_001, 1_000_000])
def test_an_index_of_too_many_entries_is_refused(tmp_path: Path, entries: int) -> None:
    names = dict.fromkeys(map(str, range(entries)), "m.safetensors")
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(BrokenFile, match=r"more than the|over the limit of 200,000"):
        read_header(tmp_path)
    assert [finding.check for finding in mezzotint.verify(tmp_path).findings] == ["index"]


@pytest.mark.parametrize("name", ["..", ".", "a/b", "/etc/passwd", "a\0b", "", "x" * 300])
def test_an_index_names_files_of_its_folder_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(BrokenFile, match="outside its folder"):
        read_header(tmp_path)


def test_fifty_findings_are_printed_and_how_many_more() -> None:
    findings = [suspicious("index", str(i), "odd") for i in range(60)]
    report = VerifyReport(Path("a"), "x", (), 0, 0, 0, tuple(findings))
    told = report.to_dict()
    assert (len(told["findings"]), told["more_findings"]) == (MAX_PRINTED, 10)
    assert len(report.findings) == 60


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"\x80\x02(" + b"}" * 2**22 + b"l.", "more than"),
        (b"\x80\x02(" + b"]" * 2**22 + b"l.", "more than"),
        (b"\x80\x02(" + b"N" * 2**23 + b"l.", "more than"),
        (b"\x80\x02" + b"(" * 2**21 + b".", "more than"),
        (b"\x80\x02N" + b"\x85" * 400 + b".", "more than 64 deep"),
        (b"\x80\x02N" + b"\x85" * 2**20 + b".", "more than"),
        (b"\x80\x02c" + b"a" * 2**20 + b"\nsystem\n.", "asks for a"),
    ],
)
def test_pickles_are_bounded(program: bytes, message: str) -> None:
    tracemalloc.start()
    with pytest.raises(UnsafePickle, match=message) as error:
        PickleInterpreter().run(program)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * 2**20
    assert len(str(error.value)) < 1000


def test_a_list_that_holds_itself_is_a_value() -> None:
    program = b"\x80\x02]q\x00h\x00a."
    value = PickleInterpreter().run(program)
    assert value[0] is value


def test_an_archive_with_a_huge_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mezzotint.containers import torch_zip

    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for i in range(100):
            archive.writestr(f"a/data/{i}", b"")
    monkeypatch.setattr(torch_zip, "MAX_DIRECTORY_BYTES", 1000)
    with pytest.raises(BrokenFile, match="its directory has"):
        torch_zip.CONTAINER.read(tmp_path / "a.pt")


def test_foreign_text_is_escaped_where_it_is_printed() -> None:
    odd = "[/foo]\x1b[31m\u202e\udc80\x0a\x9b|`<b>&:smile:"
    assert printable(odd) == r"[/foo]\x1b[31m\u202e\udc80\x0a\x9b|`<b>&:smile:"
    assert printable("ü 🙂‍\u200d") == "ü 🙂‍\u200d"
    assert str(foreign(odd)) == printable(odd)
    assert foreign("[red]a[/red]").spans == []
    assert message("a\nb\x1b") == "a\nb\\x1b"
    assert len(message("a" * 10**6)) < LONGEST_LINE + 50
    assert "\n" not in markdown(odd)
    assert "|" not in markdown(odd).replace(r"\|", "")
    assert "<" not in markdown(odd).replace(r"\<", "")
    assert len(shown({"a": "b" * 10**6})) < 300


def test_a_tensor_called_like_markup_is_inspected_and_verified(
    nvfp4: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mezzotint.cli import app

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(LAYER)]:
            tensors[key.replace("to_q", "[/foo]\x1b[31m\u202e")] = tensors.pop(key)

    rewrite(nvfp4, rename)
    for arguments in (
        ["inspect", "--layers"],
        ["verify"],
        ["inspect", "--json"],
        ["verify", "--json"],
    ):
        with pytest.raises(SystemExit) as done:
            app([*arguments, str(nvfp4)])
        assert done.value.code in (0, 1, 2)
        printed = capsys.readouterr()
        assert "\x1b" not in printed.out + printed.err
        assert "\u202e" not in printed.out + printed.err


def test_a_file_name_that_cannot_be_decoded_is_verified(
    nvfp4: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mezzotint.cli import app

    bytes_ = os.fsencode(nvfp4) + b"/\xff.safetensors"
    os.rename(os.fsencode(nvfp4 / WEIGHTS), bytes_)  # noqa: PTH104
    for path in (os.fsdecode(bytes_), str(nvfp4)):
        app(["verify", path], standalone_mode=False)
        assert "sound" in capsys.readouterr().out


def test_every_kind_of_other_file_is_not_read(tmp_path: Path) -> None:
    for name, start in {
        "a.safetensors": b"GGUF\3\0\0\0",
        "b.bin": b"\x80\x02}",
        "c.onnx": b"\x08\x07",
        "d.npz": b"PK\x03\x04",
        "e.engine": b"ftrt",
    }.items():
        (tmp_path / name).write_bytes(start + bytes(99))
        with pytest.raises(NotSafetensors):
            read_header(tmp_path / name)
        report = mezzotint.verify(tmp_path / name)
        assert (report.exit_code, report.to_dict()["verdict"]) == (3, "not read")
    (tmp_path / "d.safetensors").write_bytes(b"<!doctype html>" + bytes(99))
    assert mezzotint.verify(tmp_path / "d.safetensors").exit_code == 2


def test_a_folder_of_other_weights_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert mezzotint.verify(tmp_path).exit_code == 3


@pytest.mark.parametrize("name", ["a.weight", "lora_unet_x.lora_down.weight"])
def test_tensors_of_no_known_model_are_not_read(tmp_path: Path, name: str) -> None:
    save_file({name: torch.ones(4, 4).bfloat16()}, tmp_path / "a.safetensors")
    report = mezzotint.verify(tmp_path / "a.safetensors")
    assert (report.exit_code, report.findings[-1].severity) == (3, Severity.NOT_READ)
    with pytest.raises(UnreadFormat):
        _ = mezzotint.open(tmp_path / "a.safetensors").family


def test_a_format_that_no_reader_has_is_not_read(nvfp4: Path) -> None:
    rewrite(
        nvfp4,
        lambda tensors: tensors.update(
            {f"{LAYER}.weight": tensors[f"{LAYER}.weight"].view(torch.int32)}
        ),
    )
    config = json.loads((nvfp4 / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "other", "quant_algo": "W3"}
    (nvfp4 / "config.json").write_text(json.dumps(config))
    assert mezzotint.verify(nvfp4).exit_code in (2, 3)


def test_inspect_json_says_the_same(
    tmp_path: Path, nvfp4: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mezzotint.cli import app

    def told(path: Path) -> tuple[object, str]:
        try:
            app(["inspect", str(path), "--json"], standalone_mode=True)
        except SystemExit as done:
            return done.code, json.loads(capsys.readouterr().out)["verdict"]
        raise AssertionError

    assert told(nvfp4) == (0, "sound")
    rewrite(nvfp4, lambda tensors: tensors.pop(f"{LAYER}.weight_scale"))
    assert told(nvfp4) == (2, "broken")
    (tmp_path / "a.safetensors").write_bytes(b"GGUF" + bytes(99))
    assert told(tmp_path / "a.safetensors") == (3, "not read")
    (tmp_path / "b.safetensors").write_bytes(b"")
    assert told(tmp_path / "b.safetensors") == (2, "broken")


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", '{"shards": []}', '{"shards": {"a": 1}}', '{"transforms": [1]}'),
        *(
            '{"shards": {"a": {"size": "1", "sha256": "x"}}}',
            '{"shards": {"../a": {"size": 1, "sha256": "%s"}}}',
        ),
        '{"shards": {"a": {"size": 1, "sha256": null}}}',
    ],
)
def test_an_unreadable_record_means_that_checksums_were_not_compared(
    nvfp4: Path, text: str
) -> None:
    (nvfp4 / "mezzotint.json").write_text(text.replace("%s", "0" * 64))
    report = mezzotint.verify(nvfp4)
    (finding,) = report.findings
    assert (report.exit_code, report.checksums, finding.where) == (1, 0, "mezzotint.json")
    assert "checksums were not compared" in finding.message


@pytest.mark.parametrize("part", ["input_scale", "weight_scale_2"])
@pytest.mark.parametrize("scale", [1e-44, 1e10, 3e38])
@pytest.mark.parametrize("with_base", [False, True])
def test_absurd_scales_are_suspicious(
    nvfp4: Path, data: Path, part: str, scale: float, with_base: bool
) -> None:
    rewrite(nvfp4, lambda tensors: tensors[f"{LAYER}.{part}"].fill_(scale))
    report = mezzotint.verify(nvfp4, data / "base/flux1" if with_base else None)
    assert report.exit_code >= 1
    assert any(finding.check == "scales" and LAYER in finding.where for finding in report.findings)


def _random(tensors: dict[str, torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = tensors[f"{LAYER}.weight"]
    tensors[f"{LAYER}.weight"] = torch.randint(
        0, 256, codes.shape, generator=generator, dtype=torch.uint8
    )


def _same_scales(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.weight_scale"].view(torch.uint8).fill_(0x58)


def _wild_scales(tensors: dict[str, torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    scales = tensors[f"{LAYER}.weight_scale"].view(torch.uint8)
    scales.copy_(torch.randint(1, 126, scales.shape, generator=generator, dtype=torch.uint8))


def _same_blocks(tensors: dict[str, torch.Tensor]) -> None:
    codes = tensors[f"{LAYER}.weight"]
    tensors[f"{LAYER}.weight"] = codes[:1, :8].repeat(codes.shape[0], codes.shape[1] // 8)


def _copied(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER.replace('to_q', 'to_k')}.weight"].clone()


@pytest.mark.parametrize(
    "change",
    [
        _random,
        _same_scales,
        _wild_scales,
        _same_blocks,
        _copied,
        lambda tensors: tensors[f"{LAYER}.weight_scale_2"].mul_(1000),
        lambda tensors: tensors[f"{LAYER}.weight_scale_2"].div_(1000),
        lambda tensors: tensors[f"{LAYER}.input_scale"].mul_(1e5),
    ],
)
def test_a_layer_unlike_its_sisters_is_suspicious(nvfp4: Path, change: Any) -> None:
    rewrite(nvfp4, change)
    report = mezzotint.verify(nvfp4)
    assert report.exit_code == 1
    assert {finding.where.split(".to_")[0] for finding in report.findings} == {
        LAYER.split(".to_")[0]
    }


def test_a_random_layer_of_fp8_is_suspicious(fp8: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(
            0, 127, tensors[f"{LAYER}.weight"].shape, generator=generator, dtype=torch.uint8
        )
        tensors[f"{LAYER}.weight"] = codes.view(torch.float8_e4m3fn)

    rewrite(fp8, change)
    (finding,) = mezzotint.verify(fp8).findings
    assert (finding.check, finding.where) == ("outliers", LAYER)


def test_no_number_of_an_ignored_tensor_is_judged(tmp_path: Path) -> None:
    """Z-Image's single files hold a `norm_final.weight` that no model uses: in some it is NaN."""
    import diffusers

    sizes = {
        "in_channels": 4,
        "dim": 96,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 3,
        "n_kv_heads": 3,
    }
    axes = {"axes_dims": [8, 12, 12], "axes_lens": [128, 32, 32]}
    model = diffusers.ZImageTransformer2DModel(**sizes, cap_feat_dim=16, **axes).bfloat16()
    theirs: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        name = name.replace("all_x_embedder.2-1", "x_embedder").replace(
            "all_final_layer.2-1", "final_layer"
        )
        name = name.replace("attention.norm_", "attention.").replace("to_out.0", "out")
        name = name.replace("attention.q.", "attention.q_norm.").replace(
            "attention.k.", "attention.k_norm."
        )
        for leaf in "qkv":
            name = name.replace(f"attention.to_{leaf}.", "attention.qkv.")
        theirs[name] = torch.cat([theirs[name], value]) if name in theirs else value.clone()
    for name in ("x_pad_token", "cap_pad_token"):
        torch.nn.init.normal_(theirs[name], std=0.02)
    theirs["norm_final.weight"] = torch.full((96,), torch.nan).bfloat16()
    save_file(
        {f"model.diffusion_model.{k}": v.contiguous() for k, v in theirs.items()},
        tmp_path / "a.safetensors",
    )
    report = mezzotint.verify(tmp_path / "a.safetensors")
    assert report.exit_code == 0, report.findings


@pytest.mark.parametrize("what", ["codes", "scales", "plain"])
def test_load_says_that_a_layer_is_blank(nvfp4: Path, what: str) -> None:
    from mezzotint.checkpoint import Checkpoint
    from mezzotint.families.building import build_meta_model
    from mezzotint.loading import Placement, load, plan

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = {
            "codes": f"{LAYER}.weight",
            "scales": f"{LAYER}.weight_scale",
            "plain": "x_embedder.weight",
        }[what]
        tensors[name].zero_() if what == "plain" else tensors[name].view(torch.uint8).zero_()

    rewrite(nvfp4, change)
    checkpoint = Checkpoint.open(nvfp4)
    model = build_meta_model("FluxTransformer2DModel", checkpoint.header.config)
    events = load(
        plan(checkpoint, model), model, Placement(torch.device("cpu")), torch.bfloat16
    ).events
    name = "x_embedder.weight" if what == "plain" else LAYER
    (event,) = [event for event in events if event.startswith("suspicious")]
    assert name in event
    assert load_file(nvfp4 / WEIGHTS)
    assert any(finding.where == name for finding in mezzotint.verify(nvfp4).findings)


def test_first_values_are_a_vector() -> None:
    info = TensorInfo("a", torch.bfloat16, (4, 8), Path("a"), 10, 74)
    assert (info.first(5).shape, info.first(5).end) == ((5,), 20)
    assert info.first(500).shape == (32,)
