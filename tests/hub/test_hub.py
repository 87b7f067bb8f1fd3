"""Hub ids: headers by byte ranges, weights only when loading, and only the cache when offline."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from diffusers import ZImagePipeline
from safetensors.torch import load_file, save_file

import mezzotint
from mezzotint.checkpoint import Checkpoint, inspect
from mezzotint.errors import BrokenFile, HubError, MissingTensor, NotACheckpoint
from mezzotint.formats import read_header
from mezzotint.formats.comfy_metadata import MARKER
from mezzotint.generation.generate import generate
from mezzotint.generation.pipeline import recommended_sampling
from mezzotint.generation.pipeline_index import Component, PipelineIndex, read_index
from mezzotint.generation.transformer_planning import open_transformer, plan_transformer
from mezzotint.hub import FIRST_READ, hub_path
from support import sparse_checkpoints as sparse
from support.checkpoint_edits import WEIGHTS
from support.checkpoint_makers import cast
from support.header_fixtures import read_fixture
from support.hub_server import COMMIT, Hub, serving
from support.modelopt_exporter import export
from support.nunchaku_files import golden
from support.pipeline_cases import PROMPTS, Case

KLEIN = "makers/klein"


def klein(folder: Path) -> Path:
    """Write FLUX.2 klein 4B in full size with original names: a real header, and a sparse file."""
    sparse.write(
        folder,
        sparse.full_size("flux2-klein-4b", "original"),
        read_fixture("flux2-klein-4b")["config"],
    )
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00001-of-00001.safetensors").rename(folder / "klein.safetensors")
    return folder


@pytest.fixture
def hub(
    cases: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    case = cases("wan_ti2v")
    quantized = export(
        case.reference.transformer, case.largest["transformer"], "fp8", tmp_path / "fp8"
    )
    repositories = {KLEIN: klein(tmp_path / "klein"), "wan/tiny": case.folder, "wan/fp8": quantized}
    with serving(repositories) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


@pytest.mark.parametrize(
    "name", [KLEIN, f"{KLEIN}/klein.safetensors", f"{KLEIN}@main", f"{KLEIN}@{COMMIT}"]
)
def test_inspecting_reads_headers_and_nothing_else(hub: Hub, name: str) -> None:
    report = inspect(name)
    assert report.family == "FLUX.2"
    assert report.files == ("klein.safetensors",)
    assert report.stored_bytes == 7_751_089_152
    assert hub.served[KLEIN, "klein.safetensors"] < 1e-4 * report.stored_bytes
    assert json.loads(json.dumps(report.to_dict()))["path"].startswith(KLEIN)


@pytest.mark.parametrize("name", sparse.FORMATS)
def test_of_every_format_only_headers_are_read(
    hub: Hub, data: Path, tmp_path: Path, name: str
) -> None:
    """The bytes of markers are read too, if the header does not contain their content."""
    hub.repositories["makers/full"] = sparse.FORMATS[name](tmp_path / "full", data)
    report = inspect("makers/full")
    if name not in sparse.WIDENED:
        assert report.problems == ()
    assert report.stored_bytes > 7e9
    marks = {
        (info.file, info.start, info.end)
        for key, info in read_header(tmp_path / "full").tensors.items()
        if key.endswith(MARKER)
    }
    ranges = [sent for sent in hub.sent if sent[0].suffix == ".safetensors"]
    asked = set(ranges) & marks
    assert all(end <= header_bytes(file) + FIRST_READ for file, _, end in set(ranges) - marks)
    assert asked == (marks if name == "comfy by markers" else set())
    assert len(ranges) <= 3 * len(report.files) + len(asked)


def header_bytes(file: Path) -> int:
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


@pytest.mark.parametrize(("case", "order"), [("nunchaku", "fragments"), ("row-major", "row_major")])
def test_what_only_numbers_tell_is_assumed_until_a_file_is_loaded(
    hub: Hub, data: Path, tmp_path: Path, case: str, order: str
) -> None:
    """A Nunchaku file without a statement of its order, and the same file in the other order."""
    hub.repositories["makers/svdq"] = tmp_path / "svdq"
    metadata = {"conversion": '{"layout": "row_major"}'} if case == "row-major" else {}
    tensors = load_file(golden(data, "nunchaku_zimage_int4_r32"))
    (tmp_path / "svdq").mkdir()
    save_file(tensors, tmp_path / "svdq/a.safetensors", metadata)
    checkpoint = Checkpoint.open("makers/svdq")
    assert "codes" in checkpoint.contents.assumed
    assert f"codes assumed {order.replace('_', '-')}" in checkpoint.evidence
    assert hub.served["makers/svdq", "a.safetensors"] < 100_000
    component = Component(
        "transformer", "diffusers", "ZImageTransformer2DModel", tmp_path / "transformer"
    )
    index = PipelineIndex(
        tmp_path, {}, ZImagePipeline, {"transformer": component}, ("transformer",), ()
    )
    config = json.loads(read_header(golden(data, "nunchaku_zimage_int4_r32")).metadata["config"])
    (tmp_path / "svdq/config.json").write_text(json.dumps(config))
    checkpoint = open_transformer("transformer", "makers/svdq", index)
    (planned, _) = plan_transformer("transformer", checkpoint, index)
    assert planned.checkpoint.detected.format.name == "nunchaku"
    assert planned.checkpoint.contents.assumed == frozenset()


def test_weights_cast_without_scales_are_taken_on_trust_until_they_are_loaded(
    hub: Hub, cases: Callable[[str], Case], tmp_path: Path
) -> None:
    case = cases("flux1")
    file = cast(case, tmp_path / "cast")
    hub.repositories |= {"makers/cast": file.parent, "makers/lost": tmp_path / "lost"}
    (tmp_path / "lost").mkdir()
    scaled = {
        name: (448 * value.float().sign()).to(value.dtype)
        for name, value in load_file(file).items()
    }
    save_file(scaled, tmp_path / "lost/a.safetensors")
    evidence = Checkpoint.open("makers/cast").evidence
    assert "because values on the Hub are not read" in evidence
    index = read_index(case.folder)
    checkpoint = open_transformer("transformer", "makers/cast", index)
    planned, _ = plan_transformer("transformer", checkpoint, index)
    assert "and not 448 as with a scale" in planned.checkpoint.evidence
    checkpoint = open_transformer("transformer", "makers/lost", index)
    with pytest.raises(MissingTensor, match="weight_scale is not there"):
        plan_transformer("transformer", checkpoint, index)


def test_statistics_are_not_taken_from_weights_on_the_hub(
    hub: Hub, data: Path, tmp_path: Path
) -> None:
    file = data / "comfy_qwenimage_mixed_nvfp4_fp8/checkpoint/qwen-image-mixed.safetensors"
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfy" / file.name).write_bytes(file.read_bytes())
    checkpoint = Checkpoint.of(read_header(tmp_path / "comfy"))
    remote = replace(checkpoint, header=replace(checkpoint.header, files=(hub_path(KLEIN),)))
    assert remote.detect_from_statistics() is remote
    assert "codes: numbers alone" in checkpoint.detect_from_statistics().evidence


def test_the_command_does_so_too_with_the_users_environment(hub: Hub, tmp_path: Path) -> None:
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_secret",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [
        sys.executable,
        "-c",
        "from mezzotint.cli import main; main()",
        "inspect",
        KLEIN,
        "--json",
    ]
    result = subprocess.run(command, check=True, capture_output=True, env=environment)
    assert json.loads(result.stdout)["family"] == "FLUX.2"
    assert hub.tokens == {"Bearer hf_secret"}
    assert (tmp_path / "home/hub/models--makers--klein").is_dir()
    assert hub.served[KLEIN, "klein.safetensors"] < 100_000


def test_one_tensor_is_one_range(hub: Hub) -> None:
    checkpoint = Checkpoint.open(KLEIN)
    before = hub.served.total()
    values = checkpoint.tensor("single_transformer_blocks.3.attn.norm_q.weight")
    assert torch.equal(values, torch.zeros(128, dtype=torch.bfloat16))
    assert hub.served.total() - before < 100_000


def test_a_pipeline_and_a_transformer_load_from_the_hub(
    hub: Hub, cases: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases("wan_ti2v")
    assert recommended_sampling("wan/tiny").num_frames == 121
    pipe = mezzotint.load("wan/tiny", transformer="wan/fp8", device="cpu")
    assert not any(name.endswith(WEIGHTS) and "transformer/" in name for _, name in hub.served), (
        "read by headers only"
    )
    local = mezzotint.load(case.folder, transformer=hub.repositories["wan/fp8"], device="cpu")
    there, here = (
        generate(p, PROMPTS, sampling=case.sampling, check_output=False).latents
        for p in (pipe, local)
    )
    assert torch.equal(there, here)
    assert str(pipe.load_report.path) == "wan/fp8@main"

    hub.served.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    again = mezzotint.load("wan/tiny", transformer="wan/fp8", device="cpu")
    assert torch.equal(
        generate(again, PROMPTS, sampling=case.sampling, check_output=False).latents, here
    )
    assert not hub.served


def test_a_pipelines_own_transformer_comes_from_the_hub(
    hub: Hub, cases: Callable[[str], Case]
) -> None:
    case = cases("wan_ti2v")
    pipe = mezzotint.load("wan/tiny", device="cpu")
    assert torch.equal(
        generate(pipe, PROMPTS, sampling=case.sampling, check_output=False).latents,
        case.result.latents,
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("makers/nothing", "the Hub says"),
        (f"{KLEIN}@no-such-branch", "the Hub says"),
        (f"{KLEIN}/other.safetensors", "no such file or folder"),
    ],
)
def test_a_missing_file_on_the_hub_is_an_error(hub: Hub, name: str, message: str) -> None:
    with pytest.raises(NotACheckpoint, match=message):
        Checkpoint.open(name)


def test_an_unreachable_hub_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="the Hub cannot be reached"):
        Checkpoint.open(KLEIN)


def test_offline_a_missing_cache_entry_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NotACheckpoint, match="HF_HUB_OFFLINE is set"):
        Checkpoint.open(KLEIN)


def test_a_server_without_ranges_is_not_read_to_its_end(hub: Hub) -> None:
    hub.ranges = False
    with pytest.raises(NotACheckpoint, match="range requests"):
        Checkpoint.open(KLEIN)


def test_a_truncated_file_on_the_hub_is_refused(hub: Hub, tmp_path: Path) -> None:
    os.truncate(tmp_path / "klein/klein.safetensors", 10**9)
    with pytest.raises(BrokenFile, match="is truncated"):
        Checkpoint.open(KLEIN)


@pytest.mark.parametrize(
    "name", ["name", "./a/b", "/a/b", "../a", "a/b/c.safetensors@x@y", "~/a", "a//b", ""]
)
def test_what_cannot_be_an_id_is_a_local_path(name: str) -> None:
    assert hub_path(name) is None


def test_a_local_folder_goes_before_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fp8: Path
) -> None:
    fp8.rename(tmp_path / "makers")
    (tmp_path / "owner").mkdir()
    (tmp_path / "makers").rename(tmp_path / "owner/name")
    monkeypatch.chdir(tmp_path)
    assert Checkpoint.open("owner/name").header.path == Path("owner/name")
