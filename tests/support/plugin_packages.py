"""Temporary distributions that declare plugins, as `pip install` would leave them on the path."""

from pathlib import Path

import pytest


def install_plugin(
    folder: Path, monkeypatch: pytest.MonkeyPatch, group: str, value: str, source: str
) -> None:
    """Put a distribution of one module on the path.

    group    the entry point group, such as mezzotint.families
    value    what the entry point names, as module:ATTRIBUTE
    source   text of the module
    """
    module = value.partition(":")[0]
    (folder / f"{module}.py").write_text(source)
    metadata = folder / f"{module}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{module} = {value}\n")
    monkeypatch.syspath_prepend(folder)
