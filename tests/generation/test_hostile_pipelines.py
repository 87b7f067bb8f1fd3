"""Damaged and malicious pipelines raise a specific error before anything is built or generated."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mezzotint
from fuzz import fuzz_pipelines
from mezzotint.builtin import resolve
from mezzotint.errors import (
    BadRequest,
    BrokenFile,
    MezzotintError,
    MissingTensor,
    NotACheckpoint,
    ShapeMismatch,
    UnknownFormat,
    Unsupported,
)
from mezzotint.families import Sampling
from mezzotint.families.building import bounded, build_meta_model
from mezzotint.generation.component_loading import load_component
from mezzotint.generation.generate import generate
from mezzotint.generation.pipeline import recommended_sampling
from mezzotint.generation.pipeline_index import read_index
from mezzotint.generation.sampling_file import SamplingFile
from mezzotint.generation.source import PipelineSource
from mezzotint.quality.candidate import parse_sources
from mezzotint.quality.compare import compare
from mezzotint.quality.compare.runs import pipeline_hash
from support.cli_runner import run
from support.pipeline_cases import Case

INDEX = "model_index.json"
TEXT = ("transformers", "CLIPTextModel")
LIBRARIES_SAY = "cannot be loaded as a"


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A copy of the built-in pipeline."""
    return Path(shutil.copytree(resolve("demo"), tmp_path / "pipeline"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def load(folder: Path) -> Any:
    return mezzotint.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"[]", "expected an object"),
        (b"null", "expected an object"),
        (b'"FluxPipeline"', "expected an object"),
        (b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", "is not valid JSON|nests its values"),
        (b'{"_class_name": "\xff\xfe"}', "is not valid JSON"),
        (b"{}", "_class_name"),
        (b'{"_class_name": 5}', "_class_name"),
        (b'{"_class_name": ["pipeline", "MyPipeline"]}', "_class_name"),
        (b'{"_class_name": "../FluxPipeline"}', "_class_name"),
        (b'{"_class_name": "utils"}', "is not a class of diffusers"),
        (b'{"_class_name": "NoSuchPipeline"}', "not a class of diffusers .*newer one"),
        (b'{"_class_name": "FluxTransformer2DModel"}', "not a pipeline of diffusers"),
        (b'{"_class_name": "FluxModularPipeline"}', "not a pipeline of diffusers"),
        (b'{"_class_name": "FluxPipeline"}', "has no .*scheduler"),
    ],
)
def test_an_index_that_is_none_is_refused(demo: Path, content: bytes, message: str) -> None:
    (demo / INDEX).write_bytes(content)
    for read in (
        read_index,
        recommended_sampling,
        load,
        PipelineSource.open,
    ):
        with pytest.raises(MezzotintError, match=f"(?s){INDEX}.*({message})"):
            read(demo)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (5, "is 5, expected"),
        (None, "is None, expected"),
        ("CLIPTextModel", "expected"),
        ({"a": 1}, "expected"),
        ([], "expected"),
        (["transformers"], "expected"),
        (["transformers", 5], "expected"),
        ([None, "CLIPTextModel"], "expected"),
        (["transformers", "CLIPTextModel", "x"], "expected"),
        (["os", "system"], "of library os"),
        (
            ["diffusers_modules", "mine"],
            "of library diffusers_modules, .*code that comes with a pipeline is never run",
        ),
        (["diffusers", "utils"], "is not a class of diffusers"),
        (["transformers", "pipeline"], "is not a class of transformers"),
        (["transformers", "__file__"], "is not a class of transformers"),
        (["transformers", "NoSuchModel"], "is not a class of transformers"),
        (["transformers", "AutoModel"], "not a component"),
        (["diffusers", "AutoModel"], "not a component"),
        (["diffusers", "FluxPipeline"], "not a component"),
        (["transformers", "PreTrainedConfig"], "not a component"),
    ],
)
def test_a_component_that_is_no_class_is_refused(demo: Path, entry: Any, message: str) -> None:
    edit(demo / INDEX, text_encoder=entry)
    with pytest.raises(MezzotintError, match=f"(?s)text_encoder.*{message}"):
        load(demo)


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc", "/proc/self", "a/b", "..", ".", "", "a\\b", "\x00", "é", "x" * 300],
)
def test_the_name_of_a_component_is_a_folder_in_the_pipeline(demo: Path, name: str) -> None:
    (demo.parent / "outside").mkdir()
    edit(demo / INDEX, **{name: list(TEXT)})
    for read in (read_index, lambda folder: pipeline_hash(read_index(folder), ())):
        with pytest.raises(BrokenFile, match="is not a component's folder name"):
            read(demo)


def test_a_component_that_is_not_there_is_named(demo: Path) -> None:
    shutil.rmtree(demo / "vae")
    with pytest.raises(NotACheckpoint, match="has no component vae"):
        load(demo)


def test_compare_hashes_nothing_outside_the_pipeline(demo: Path, tmp_path: Path) -> None:
    before = pipeline_hash(read_index(demo), ())
    outside = Path(shutil.move(demo / "text_encoder", tmp_path / "elsewhere"))
    (demo / "text_encoder").symlink_to(outside)
    with pytest.raises(BrokenFile, match="text_encoder: is a link that leads out"):
        pipeline_hash(read_index(demo), ())
    (demo / "text_encoder").unlink()
    shutil.copytree(outside, demo / "text_encoder")
    assert pipeline_hash(read_index(demo), ()) == before


@pytest.mark.parametrize(
    "name",
    [INDEX, "sampling.json", "text_encoder/config.json", "vae/diffusion_pytorch_model.safetensors"],
)
def test_a_file_that_is_a_link_out_of_the_pipeline_is_refused(
    demo: Path, tmp_path: Path, name: str
) -> None:
    (demo / name).rename(tmp_path / "secret")
    (demo / name).symlink_to(tmp_path / "secret")
    with pytest.raises(BrokenFile, match="is a link that leads out"):
        (recommended_sampling if name == "sampling.json" else load)(demo)


def test_links_inside_a_pipeline_are_followed(demo: Path) -> None:
    shutil.rmtree(demo / "tokenizer_2")
    (demo / "tokenizer_2").symlink_to("tokenizer")
    assert load(demo).tokenizer_2 is not None


def test_the_cache_of_the_hub_is_a_pipeline_of_links(demo: Path, tmp_path: Path) -> None:
    """Snapshots are links into the blobs of the same repository, and into those alone."""
    snapshot = tmp_path / "models--a--b/snapshots/0123"
    blobs = tmp_path / "models--a--b/blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(file for file in demo.rglob("*") if file.is_file())):
        place = snapshot / file.relative_to(demo)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blobs / str(number))
        place.symlink_to(os.path.relpath(blobs / str(number), place.parent))
    assert load(snapshot).load_report.tensors_used > 0
    assert pipeline_hash(read_index(snapshot), ()) == pipeline_hash(read_index(demo), ())
    (snapshot / "vae/config.json").unlink()
    shutil.copy(demo / "vae/config.json", tmp_path / "models--a--b/config.json")
    (snapshot / "vae/config.json").symlink_to("../../../config.json")
    with pytest.raises(BrokenFile, match="leads out"):
        load(snapshot)


def test_a_pipe_in_the_place_of_a_file_is_refused(demo: Path) -> None:
    (demo / "tokenizer/tokenizer.json").unlink()
    os.mkfifo(demo / "tokenizer/tokenizer.json")
    with pytest.raises(BrokenFile, match="neither a file nor a folder"):
        load(demo)


@pytest.mark.parametrize(
    "file", ["text_encoder/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
)
@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"\xff", b'{"a":' * 100 + b"1" + b"}" * 100, b" " * (17 * 2**20)]
)
def test_a_configuration_that_is_no_object_is_refused(
    demo: Path, file: str, content: bytes
) -> None:
    (demo / file).write_bytes(content)
    with pytest.raises(BrokenFile, match=file):
        load(demo)


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        (
            "text_encoder/config.json",
            {"num_hidden_layers": 100_000},
            "num_hidden_layers is 100000, and no known model",
        ),
        (
            "text_encoder_2/config.json",
            {"num_layers": 10**9},
            "num_layers is 1000000000, and no known model",
        ),
        ("text_encoder/config.json", {"num_labels": 10**9}, "num_labels is"),
        (
            "text_encoder/config.json",
            {"text_config": {"num_hidden_layers": 10**6}},
            "num_hidden_layers is 1000000",
        ),
        ("text_encoder/config.json", {"vocab_size": 10**12}, "vocab_size is"),
        (
            "text_encoder/config.json",
            {"vocab_size": 2**20, "intermediate_size": 2**20},
            "asks for more than",
        ),
        ("text_encoder_2/config.json", {"d_ff": 2**20}, "asks for more than"),
        ("text_encoder_2/config.json", {"num_layers": 1000}, "asks for more than|not there"),
        ("text_encoder/config.json", {"hidden_size": "wide"}, LIBRARIES_SAY),
        ("text_encoder/config.json", {"hidden_act": "no_such"}, LIBRARIES_SAY),
        (
            "text_encoder/config.json",
            {"auto_map": {"AutoModel": "mine.Model"}},
            "auto_map requests code",
        ),
        (
            "text_encoder/config.json",
            {"trust_remote_code": True},
            "trust_remote_code requests code",
        ),
        ("text_encoder/config.json", {"attn_implementation": "someone/kernels"}, "requests code"),
        (
            "tokenizer/tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["a.B", None]}},
            "requests code",
        ),
        ("tokenizer/tokenizer_config.json", {"extra_ids": 10**8}, "extra_ids is"),
        (
            "scheduler/scheduler_config.json",
            {"num_train_timesteps": 10**10},
            "num_train_timesteps is",
        ),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "many"}, LIBRARIES_SAY),
        (
            "vae/config.json",
            {"encoder_block_out_channels": [2**20] * 3},
            LIBRARIES_SAY + "|asks for more",
        ),
        (
            "vae/config.json",
            {"num_decoder_blocks": [900] * 3},
            "not there|asks for more|cannot be loaded",
        ),
        ("transformer/config.json", {"num_layers": 10**6}, "num_layers is 1000000"),
        (
            "transformer/config.json",
            {"num_single_layers": 10**40},
            "a number of more than 20 digits",
        ),
        ("transformer/config.json", {"attention_head_dim": "x"}, "cannot build"),
    ],
)
def test_what_no_model_has_is_refused_before_it_is_allocated(
    demo: Path, file: str, entries: dict[str, Any], message: str
) -> None:
    edit(demo / file, **entries)
    with pytest.raises(MezzotintError, match=f"(?s){Path(file).parent}.*({message})"):
        load(demo)


def test_buffers_are_counted_before_they_are_allocated() -> None:
    """2**20 positions of 2**16 values each would be 256 GB."""
    config = {
        "rope_max_seq_len": 2**20,
        "attention_head_dim": 2**16,
        "num_attention_heads": 1,
        "num_layers": 1,
    }
    with pytest.raises(UnknownFormat, match="values in buffers"):
        build_meta_model("WanTransformer3DModel", config)


def test_modules_are_counted_while_they_are_built() -> None:
    """A thousand of Wan's blocks took 8 s."""
    with pytest.raises(UnknownFormat, match="more than 6,000 modules"):
        build_meta_model(
            "WanTransformer3DModel", {"num_layers": 1000, "num_attention_heads": 1, "ffn_dim": 64}
        )


def test_only_what_this_thread_builds_is_counted() -> None:
    with (
        bounded("here", parameters=0),
        pytest.raises(UnknownFormat, match="parameters"),
        torch.device("meta"),
    ):
        torch.nn.Linear(2**13, 2**13)
    torch.nn.Linear(2, 2)


def test_a_truncated_text_encoder_is_named_before_it_is_built(demo: Path) -> None:
    file = demo / "text_encoder/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BrokenFile, match=r"text_encoder/model.safetensors"):
        PipelineSource.open(demo).plan()


@pytest.mark.parametrize("component", ["text_encoder", "vae"])
def test_what_a_text_encoder_lacks_is_no_random_number(demo: Path, component: str) -> None:
    file = next((demo / component).glob("*.safetensors"))
    tensors = load_file(file)
    lost = next(name for name in tensors if name.endswith("weight"))
    del tensors[lost]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(MissingTensor, match="not there"):
        load(demo)


def test_without_weights_a_component_is_named(demo: Path) -> None:
    (demo / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(NotACheckpoint, match=r"vae: holds no diffusion_pytorch_model.safetensors"):
        load(demo)


def test_a_shard_outside_the_component_is_refused(demo: Path) -> None:
    (demo / "text_encoder/model.safetensors").rename(demo / "stray.safetensors")
    index = demo / "text_encoder/model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../stray.safetensors"}}')
    with pytest.raises(BrokenFile, match="outside its folder"):
        load(demo)
    index.write_text('{"weight_map": {"a": "lost.safetensors"}}')
    with pytest.raises(BrokenFile, match=r"names lost.safetensors, which is not there"):
        load(demo)


def test_weights_in_pytorchs_own_file_are_loaded(demo: Path) -> None:
    file = demo / "text_encoder/model.safetensors"
    expected = load(demo).text_encoder.state_dict()
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()
    found = load(demo).text_encoder.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("/tmp/mezzotint-was-here",))  # noqa: S108


def test_a_pickle_that_asks_for_code_is_refused(demo: Path) -> None:
    (demo / "text_encoder/model.safetensors").unlink()
    file = demo / "text_encoder/pytorch_model.bin"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"a": Bomb()}, protocol=2))
    with pytest.raises(BrokenFile, match=r"pytorch_model.bin.*mkdir"):
        load(demo)
    file.write_bytes(pickle.dumps({"a": Bomb()}))
    with pytest.raises(BrokenFile, match=r"is not a file of torch.save"):
        load(demo)
    assert not Path("/tmp/mezzotint-was-here").exists()  # noqa: S108


def test_a_tokenizer_that_is_none_is_named(demo: Path) -> None:
    (demo / "tokenizer/tokenizer.json").write_text(
        '{"version": "1.0", "model": {"type": "no such"}}'
    )
    with pytest.raises(
        UnknownFormat, match=f"tokenizer/tokenizer_config.json: tokenizer {LIBRARIES_SAY}"
    ):
        load(demo)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"steps": 10**9}, "steps: "),
        ({"steps": 1e9}, "steps: "),
        ({"steps": "8"}, "steps: "),
        ({"steps": True}, "steps: "),
        ({"steps": 0}, "steps: "),
        ({"height": 10**6}, "height: "),
        ({"width": -64}, "width: "),
        ({"guidance": float("inf")}, "guidance: "),
        ({"guidance": float("nan")}, "guidance: "),
        ({"guidance": -1.0}, "guidance: "),
        ({"guidance_2": float("nan")}, "guidance_2: "),
        ({"true_cfg_scale": "4"}, "true_cfg_scale: "),
        ({"negative_prompt": ["blur"]}, "negative_prompt: "),
        ({"negative_prompt": "blur " * 10_000}, "negative_prompt: "),
        ({"flow_shift": 0}, "flow_shift: "),
        ({"num_frames": 10**7}, "num_frames: "),
        ({"fps": 0}, "fps: "),
        ({"max_sequence_length": 10**9}, "max_sequence_length: "),
        ({"step": 8}, "step: .*(.|\n)*the entries are height, width, steps"),
    ],
)
def test_settings_of_a_pipeline_are_bounded(
    demo: Path, entries: dict[str, Any], message: str
) -> None:
    (demo / "sampling.json").write_text(json.dumps(entries))
    with pytest.raises(BrokenFile, match=f"sampling.json: {message}"):
        recommended_sampling(demo)


def test_settings_of_a_pipeline_stand_above_its_familys(demo: Path) -> None:
    (demo / "sampling.json").write_text('{"steps": 3, "guidance": 2}')
    assert (recommended_sampling(demo).steps, recommended_sampling(demo).guidance) == (3, 2.0)


def test_every_setting_of_a_pipeline_can_stand_in_its_file(demo: Path) -> None:
    settings = Sampling(
        height=32,
        width=64,
        steps=3,
        guidance=2.0,
        max_sequence_length=64,
        num_frames=5,
        fps=8,
        negative_prompt="blurred",
        true_cfg_scale=1.5,
        guidance_2=3.0,
        flow_shift=5.0,
    )
    (demo / "sampling.json").write_text(json.dumps(vars(settings)))
    assert recommended_sampling(demo) == settings
    assert set(SamplingFile.model_fields) == set(vars(settings))


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("is_distilled", "yes"),
        ("expand_timesteps", 1),
        ("boundary_ratio", 7),
        ("boundary_ratio", "a"),
    ],
)
def test_settings_in_an_index_have_types(demo: Path, entry: str, value: Any) -> None:
    edit(demo / INDEX, **{entry: value})
    with pytest.raises(BrokenFile, match=f"{INDEX}: {entry}: "):
        read_index(demo)


def test_a_missing_folder_is_called_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match="no such file or folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "file.safetensors").touch()
    with pytest.raises(NotACheckpoint, match="is a file, expected the folder"):
        load(tmp_path / "file.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotACheckpoint, match=r"model_index.json is missing"):
        load(tmp_path / "empty")
    with pytest.raises(NotACheckpoint, match="is too long to be a path"):
        mezzotint.load("x" * 5000)


def test_a_pipeline_that_fills_a_mask_is_an_error_on_the_command_line(
    demo: Path, tmp_path: Path
) -> None:
    edit(demo / INDEX, _class_name="FluxFillPipeline")
    for image in ((), ("--image", str(Path(__file__).parents[2] / "docs/strip.png"))):
        done = run("generate", "a cat", "--model", str(demo), *image, "-o", str(tmp_path / "a.png"))
        assert (done.returncode, "Traceback" in done.stderr) == (2, False)
        assert "FluxFillPipeline is called with mask_image=" in done.stderr
    with pytest.raises(Unsupported, match="mask_image"):
        generate(load(demo), ["a cat"], sampling=recommended_sampling(demo))


def test_without_a_text_encoder_nothing_is_generated_from_a_prompt(demo: Path) -> None:
    edit(demo / INDEX, text_encoder_2=[None, None])
    with pytest.raises(BadRequest, match="leaves out text_encoder_2"):
        PipelineSource.open(demo).check_source_image(False)
    assert load(demo).text_encoder_2 is None


def resized(case: Case, folder: Path, **changes: Any) -> Path:
    """A transformer of the same family whose configuration, and tensors, are of another size."""
    config = json.loads((case.folder / "transformer/config.json").read_text()) | changes
    model = build_meta_model(config["_class_name"], config).to_empty(device="cpu")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return folder


SIZES = {
    "flux1": [
        ({"joint_attention_dim": 64}, "joint_attention_dim"),
        ({"pooled_projection_dim": 64}, "pooled_projection"),
    ],
    "flux2_klein": [
        ({"joint_attention_dim": 96}, "joint_attention_dim"),
        ({"in_channels": 32}, "in_channels"),
    ],
    "wan_ti2v": [
        ({"text_dim": 64}, "text_dim"),
        ({"in_channels": 16, "out_channels": 16}, "out_channels"),
    ],
    "zimage": [({"cap_feat_dim": 32}, "cap_feat_dim"), ({"in_channels": 8}, "in_channels")],
    "qwenimage": [
        ({"joint_attention_dim": 32}, "joint_attention_dim"),
        ({"in_channels": 128}, "in_channels"),
    ],
}


@pytest.mark.parametrize(
    ("name", "number"), [(name, number) for name in SIZES for number in (0, 1)]
)
def test_a_transformer_of_another_size_is_refused_when_it_is_planned(
    cases: Callable[[str], Case], tmp_path: Path, name: str, number: int
) -> None:
    case, (changes, entry) = cases(name), SIZES[name][number]
    other = resized(case, tmp_path / "other", **changes)
    with pytest.raises(ShapeMismatch, match=entry):
        PipelineSource.open(case.folder, {"transformer": other}).plan()


def test_compare_refuses_another_size_before_anything_is_generated(
    cases: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases("flux2_klein")
    other = resized(case, tmp_path / "other", joint_attention_dim=96)
    monkeypatch.setattr(
        "mezzotint.generation.pipeline.load_model", lambda *_: pytest.fail("weights are read")
    )
    with pytest.raises(ShapeMismatch, match=r"48 .3 times its hidden_size of 16"):
        compare(str(case.folder), [str(other)], tmp_path / "report", device="cpu")
    assert not (tmp_path / "report").exists()


def test_a_pipeline_whose_own_parts_do_not_fit_is_refused(
    cases: Callable[[str], Case], tmp_path: Path
) -> None:
    case = cases("zimage")
    folder = Path(shutil.copytree(case.folder, tmp_path / "pipeline"))
    shutil.rmtree(folder / "transformer")
    resized(case, folder / "transformer", cap_feat_dim=32)
    _, candidate = parse_sources("demo", [str(folder)])
    with pytest.raises(ShapeMismatch, match=r"cap_feat_dim is 32, and text_encoder .* makes it 16"):
        candidate.check()


def test_a_pruned_transformer_of_the_same_widths_fits(
    cases: Callable[[str], Case], tmp_path: Path
) -> None:
    case = cases("flux1")
    other = resized(
        case, tmp_path / "other", num_layers=2, num_attention_heads=1, axes_dims_rope=[8, 12, 12]
    )
    assert PipelineSource.open(case.folder, {"transformer": other}).plan().keys() == {"transformer"}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("can't allocate memory: 9"),
    ],
)
def test_a_lack_of_memory_is_named_with_a_hint(
    monkeypatch: pytest.MonkeyPatch, demo: Path, error: BaseException
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    pipe = load(demo)
    pipe.transformer.forward = fail
    with pytest.raises(Unsupported, match=r"out of memory(.|\n)*smaller size"):
        generate(pipe, ["a cat"], sampling=recommended_sampling(demo))
    monkeypatch.setattr("mezzotint.generation.pipeline.load_model", fail)
    with pytest.raises(Unsupported, match="out of memory while loading transformer"):
        load(demo)


def test_what_a_pipeline_raises_is_one_error_and_what_a_caller_raises_is_the_callers(
    demo: Path,
) -> None:
    pipe = load(demo)
    pipe.text_encoder_2 = None
    with pytest.raises(Unsupported, match=r"FluxPipeline of .*generating failed"):
        generate(pipe, ["a cat"], sampling=recommended_sampling(demo))

    class Stop(Exception):
        pass

    def stop(_step: int, _latents: torch.Tensor) -> None:
        raise Stop

    with pytest.raises(Stop):
        generate(load(demo), ["a cat"], sampling=recommended_sampling(demo), on_step=stop)


def test_a_forbidden_fusion_does_not_change_the_model() -> None:
    pipe = mezzotint.load("demo", transformer="demo-fp8", device="cpu")
    model = pipe.transformer
    before = [name for name, _ in model.named_modules()]
    attention = model.transformer_blocks[0].attn
    for fuse in (model.fuse_qkv_projections, attention.fuse_projections):
        with pytest.raises(Unsupported, match=r"cannot fuse the quantized layers"):
            fuse()
    assert [name for name, _ in model.named_modules()] == before
    assert not attention.fused_projections


def test_an_unquantized_model_is_fused_as_ever(demo: Path) -> None:
    model = load(demo).transformer
    model.fuse_qkv_projections()
    assert model.transformer_blocks[0].attn.fused_projections


def test_mutated_pipelines_are_read_or_refused(demo: Path, tmp_path: Path) -> None:
    """Three hundred; `tests/fuzz/fuzz_pipelines.py` has tried a hundred thousand."""
    (tmp_path / "copies").mkdir()
    figures = fuzz_pipelines.fuzz([demo], tmp_path / "copies", 300, seed=1)
    assert figures["read"] > 30
    assert figures["UnknownFormat"] + figures["BrokenFile"] > 50


def test_a_component_can_be_loaded_by_itself() -> None:
    vae = load_component(read_index(resolve("demo")).components["vae"], torch.float32)
    assert (type(vae).__name__, vae.dtype) == ("AutoencoderTiny", torch.float32)
