"""The files that a conversion reads.

They are kept open from before their headers are read until the output is complete.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from mezzotint.builtin import component_folder, is_pipeline
from mezzotint.checkpoint import Checkpoint
from mezzotint.containers import checkpoint_suffixes
from mezzotint.formats.companion_files import BACKBONE, hf_folder
from mezzotint.hub import AnyPath, local_copy

CONFIGS = ("config.json", "hf_quant_config.json")


def files_read(path: AnyPath, component: str | None) -> list[Path]:
    """Return the local files that opening a checkpoint at `path` may read.

    Files on the Hub are not included, because the files of a commit do not change.
    """
    if path.is_file():
        files: Iterable[AnyPath] = (path, *(path.parent / name for name in CONFIGS))
    else:
        files = _in_folder(path, component)
    return [file for file in files if isinstance(file, Path) and file.is_file()]


def _in_folder(path: AnyPath, component: str | None) -> Iterator[AnyPath]:
    inside = path / component if component and (path / component).is_dir() else path
    folder = component_folder(inside) if is_pipeline(inside) else inside
    suffixes = (*checkpoint_suffixes(), ".json")
    for weights_folder in {folder, hf_folder(folder)}:
        yield from (file for file in weights_folder.glob("*") if file.name.endswith(suffixes))
    yield folder / BACKBONE


def tensor_files(checkpoints: Iterable[Checkpoint | None]) -> set[Path]:
    """Return the local files with the tensors of checkpoints, including companion files."""
    opened = [checkpoint for checkpoint in checkpoints if checkpoint is not None]
    return {
        local_copy(info.file)
        for checkpoint in opened
        for info in checkpoint.header.tensors.values()
    }
