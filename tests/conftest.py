"""Paths of the test data, and the transformer that its FLUX.1 cases share."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from cases import Case, make_case

DATA = Path(__file__).parent / "data"


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


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small products are faster, and the same on every machine, on one thread."""
    torch.set_num_threads(1)
