"""Paths of the test data, shared pipelines, and a record of what passing tests have shown."""

import atexit
import gc
import os
import shutil
import tempfile

from support import environment

gc.disable()  # imports make a million objects that stay; `only_new_objects_are_collected` ends it

HUGGING_FACE = tempfile.mkdtemp(prefix="mezzotint-tests-")
atexit.register(shutil.rmtree, HUGGING_FACE, ignore_errors=True)
environment.isolate(os.environ, HUGGING_FACE)  # before anything reads it
os.environ.setdefault(
    "TRITON_INTERPRET", "0" if shutil.which("nvidia-smi") else "1"
)  # before PyTorch imports Triton

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezzotint.checkpoint import Checkpoint
from mezzotint.generation import component_loading
from mezzotint.generation.pipeline_index import Component
from support.pipeline_cases import Case, make_case
from support.support_table import Fact, append_facts

DATA = Path(__file__).parent / "data"
PROVED = pytest.StashKey[set[Fact]]()
CLAIMS = pytest.StashKey[set[Fact]]()
DESELECTED = pytest.StashKey[bool]()
RecordSupport = Callable[[str, Checkpoint], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--readme",
        action="store_true",
        help="write the tables of docs/support.md",
    )
    parser.addoption(
        "--proved",
        type=Path,
        metavar="FOLDER",
        help="save or read what tests have shown in this folder, "
        "to run tests/documentation/test_readme.py alone",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[PROVED], config.stash[DESELECTED] = set(), False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The README is held against what all the other tests have shown."""
    items.sort(key=lambda item: item.path.name == "test_readme.py")


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        item.config.stash[DESELECTED] |= is_proof(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.when == "call" and report.passed and (claims := item.stash.get(CLAIMS, set())):
        item.config.stash[PROVED] |= claims
        if folder := item.config.getoption("--proved"):
            append_facts(folder, os.environ.get("PYTEST_XDIST_WORKER", "main"), claims)
    return report


@pytest.fixture(autouse=True, scope="session")
def only_new_objects_are_collected() -> Iterator[None]:
    """Spare the garbage collector what imports and the collection of tests have made."""
    gc.freeze()
    gc.enable()
    yield
    gc.unfreeze()  # or libraries report leaks when the process ends


@pytest.fixture(autouse=True, scope="session")
def fast_convolutions() -> Iterator[None]:
    """Add up BF16 convolutions in float32, a hundred times faster than PyTorch 2.13 does.

    A CPU without BF16 instructions has no fast kernel for them. The other order of sums changes
    the last bit of some pixels, in every image alike.
    """

    def in_float32(convolve: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if not x.dtype == weight.dtype == torch.bfloat16 or x.device.type != "cpu":
                return convolve(module, x, weight, bias)
            bias = None if bias is None else bias.float()
            return convolve(module, x.float(), weight.float(), bias).to(x.dtype)

        return forward

    with pytest.MonkeyPatch.context() as patch:
        for layer in (nn.Conv2d, nn.Conv3d):
            patch.setattr(layer, "_conv_forward", in_float32(layer._conv_forward))
        yield


@pytest.fixture(scope="session")
def loaded_encoders() -> dict[Any, nn.Module]:
    """Return {files and options: text encoder or autoencoder} of `encoders_loaded_once`."""
    return {}


@pytest.fixture(scope="module")
def encoders_loaded_once(loaded_encoders: dict[Any, nn.Module]) -> Iterator[None]:
    """Share text encoders and autoencoders between pipelines; tests must not change them.

    An encoder whose files have changed is loaded again.
    """

    def load_model(component: Component, **options: Any) -> nn.Module:
        stats = [(file, file.stat()) for file in component.folder.iterdir()]
        stamps = sorted((str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats)
        key = (component.class_name, *stamps, *sorted(options.items()))
        if key not in loaded_encoders:
            loaded_encoders[key] = loaded(component, **options)
        return loaded_encoders[key]

    loaded = component_loading._load_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(component_loading, "_load_model", load_model)
        yield


@pytest.fixture
def record_support(request: pytest.FixtureRequest) -> RecordSupport:
    """Record what a test shows of a checkpoint: "golden", "load", "run" or "convert".

    The record counts if the test passes.
    """
    claims = request.node.stash.setdefault(CLAIMS, set())
    return lambda shown, checkpoint: claims.add(Fact.of(shown, checkpoint))


def is_proof(item: pytest.Item) -> bool:
    return "record_support" in getattr(item, "fixturenames", ())


def proves_all(session: pytest.Session) -> bool:
    """Return whether this run includes every test that records support."""
    files = {
        file
        for file in Path(__file__).parent.rglob("test_*.py")
        if "record_support: RecordSupport" in file.read_text()
    }
    whole = not any("::" in argument for argument in session.config.args)
    return (
        whole
        and files <= {item.path for item in session.items}
        and not session.config.stash[DESELECTED]
    )


@pytest.fixture
def data() -> Path:
    return DATA


@pytest.fixture
def nvfp4(tmp_path: Path) -> Path:
    """A writable copy of ModelOpt's NVFP4 export."""
    return Path(shutil.copytree(DATA / "modelopt_flux1_nvfp4/checkpoint", tmp_path / "nvfp4"))


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    """A writable copy of ModelOpt's FP8 export."""
    return Path(shutil.copytree(DATA / "modelopt_flux1_fp8/checkpoint/hf", tmp_path / "fp8"))


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """A tiny pipeline of the family, made when it is first asked for."""
    return cache(lambda name: make_case(name, tmp_path_factory.mktemp("tiny") / name))


@pytest.fixture
def runnable_edit_pipelines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tiny edit pipelines run.

    Kontext and Qwen-Image-Edit would scale an image to 1024 x 1024, which is 65,536 tokens with the
    tiny autoencoder. Wan needs ftfy and Qwen-Image-Edit needs torchvision, which are not installed.
    Random weights generate noise, which the output check would reject.
    """
    monkeypatch.setattr("mezzotint.generation.pipeline_selection.find_spec", lambda _library: True)
    qwen = "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit"
    monkeypatch.setattr(f"{qwen}.calculate_dimensions", lambda _area, _ratio: (96, 64, None))
    monkeypatch.setattr(f"{qwen}_plus.calculate_dimensions", lambda _area, _ratio: (96, 64))
    monkeypatch.setattr(
        "diffusers.pipelines.flux.pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS", [(96, 64)]
    )
    monkeypatch.setattr("mezzotint.generation.generate.find_problems", lambda _frames, _latents: ())
    ftfy = SimpleNamespace(
        fix_text=lambda text: text
    )  # it mends mojibake, of which the prompts have none
    monkeypatch.setattr("diffusers.pipelines.wan.pipeline_wan_i2v.ftfy", ftfy, raising=False)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small products are faster, and the same on every machine, on one thread."""
    torch.set_num_threads(1)
