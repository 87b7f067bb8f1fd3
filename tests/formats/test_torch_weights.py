"""Weights in files of torch.save, and names that begin with what a training script adds."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import mezzotint
from mezzotint.checkpoint import Checkpoint
from mezzotint.errors import BadRequest, BrokenFile
from mezzotint.formats import read_header
from mezzotint.loading import Placement, load, plan
from support import tiny_pipelines as tiny

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def weights() -> Tensors:
    torch.manual_seed(0)
    return dict(tiny.qwenimage().transformer.bfloat16().state_dict())


def under(prefix: str, weights: Tensors) -> Tensors:
    return {prefix + name: value for name, value in weights.items()}


def saved(value: object, file: Path) -> Path:
    torch.save(value, file)
    return file


def assert_holds(path: Path, weights: Tensors) -> None:
    """Check that a file loads as the model of these weights, and converts to them."""
    mezzotint.convert(path, path.parent / "written", to="bf16")
    for source in (path, path.parent / "written"):
        checkpoint = Checkpoint.open(source)
        model = checkpoint.model()
        load(plan(checkpoint, model), model, Placement(torch.device("cpu")), torch.bfloat16)
        assert model.state_dict().keys() == weights.keys()
        for name, value in model.state_dict().items():
            assert torch.equal(value, weights[name]), name
    assert mezzotint.verify(path).exit_code == 0


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "bin"])
def test_weights_of_torch_save_are_read(weights: Tensors, tmp_path: Path, suffix: str) -> None:
    assert_holds(saved(weights, tmp_path / f"model.{suffix}"), weights)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: {"state_dict": under("model.diffusion_model.", w)},
        lambda w: {"model": w, "optimizer": {"state": {0: torch.ones(3)}}, "step": 7},
        lambda w: {"generator_ema": under("model.", w)},
        lambda w: under("module._orig_mod.", w),
        lambda w: under("transformer.transformer.", w),
        lambda w: under("model.diffusion_model.model.diffusion_model.", w),
    ],
)
def test_wrappers_are_dropped(weights: Tensors, tmp_path: Path, wrap: Any) -> None:
    file = saved(wrap(weights), tmp_path / "model.pt")
    assert_holds(file, weights)
    report = mezzotint.inspect(file)
    assert any("names are read without" in note for note in report.notes)
    assert set(report.ignored.values()) <= {"is stored outside the model's weights"}


def test_wrappers_in_safetensors_are_dropped_too(weights: Tensors, tmp_path: Path) -> None:
    save_file(under("model.model.diffusion_model.", weights), tmp_path / "model.safetensors")
    assert_holds(tmp_path / "model.safetensors", weights)


def test_two_sets_of_weights_need_a_choice(weights: Tensors, tmp_path: Path) -> None:
    both = {"generator": weights, "generator_ema": {n: 2 * w for n, w in weights.items()}}
    file = saved(both, tmp_path / "model.pt")
    with pytest.raises(BadRequest, match="2 sets of weights") as caught:
        Checkpoint.open(file)
    assert "--rename '^generator\\.=transformer.'" in caught.value.hint
    chosen = Checkpoint.open(file, rename={r"^generator_ema\.": "transformer."})
    assert torch.equal(chosen.tensor("proj_out.bias"), 2 * weights["proj_out.bias"])


def test_fp8_weights_of_torch_save_keep_their_bytes(tmp_path: Path) -> None:
    codes = torch.randn(4, 8).to(torch.float8_e4m3fn)
    header = read_header(saved({"a": codes, "b": torch.ones(2)}, tmp_path / "model.pt"))
    assert torch.equal(header.tensors["a"].read().view(torch.uint8), codes.view(torch.uint8))


def test_a_training_state_with_objects_is_refused_by_name(weights: Tensors, tmp_path: Path) -> None:
    file = saved({"state_dict": weights, "args": argparse.Namespace(lr=1)}, tmp_path / "a.ckpt")
    with pytest.raises(BrokenFile, match=r"argparse.*no code in the file was run"):
        Checkpoint.open(file)


def test_a_folder_prefers_safetensors(weights: Tensors, tmp_path: Path) -> None:
    saved({"a": torch.ones(2)}, tmp_path / "diffusion_pytorch_model.bin")
    assert list(read_header(tmp_path).tensors) == ["a"]
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    assert read_header(tmp_path).tensors.keys() == weights.keys()
