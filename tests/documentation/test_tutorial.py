"""The tutorial shows what `inspect` prints for a header of full size."""

import re
from pathlib import Path

from support import sparse_checkpoints as sparse
from support.cli_runner import run
from support.header_fixtures import read_fixture

PAGE = Path(__file__).parents[2] / "docs/tutorial.md"


def test_inspect_prints_what_the_tutorial_shows(tmp_path: Path) -> None:
    tensors, config, metadata = sparse.nvfp4(sparse.full_size("flux1-dev", "diffusers"), "modelopt")
    fixture = read_fixture("flux1-dev")["config"]
    folder = sparse.write(tmp_path / "flux1-dev-nvfp4", tensors, fixture | config, metadata)
    printed = [line.rstrip() for line in run("inspect", str(folder)).stdout.splitlines()]
    (shown,) = re.findall(r"\n\n```\n(format.*?)```", PAGE.read_text(), re.S)
    assert not set(shown.splitlines()) - set(printed)
