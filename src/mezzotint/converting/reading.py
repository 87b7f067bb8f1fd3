"""Which files a conversion reads: they are held open from before their headers are read until the output is there."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from mezzotint.builtin import component_folder, is_pipeline
from mezzotint.checkpoint import Checkpoint
from mezzotint.formats.supplement import BACKBONE, hf_folder
from mezzotint.hub import AnyPath, local_copy

READ = (".safetensors", ".json")
CONFIGS = ("config.json", "hf_quant_config.json")


def files_read(place: AnyPath, component: str | None) -> list[Path]:
    """The files that opening a checkpoint at `place` may read; none of what is on the Hub, where a commit stays."""
    if place.is_file():
        files: Iterable[AnyPath] = (place, *(place.parent / name for name in CONFIGS))
    else:
        files = _in_folder(place, component)
    return [file for file in files if isinstance(file, Path) and file.is_file()]


def _in_folder(place: AnyPath, component: str | None) -> Iterator[AnyPath]:
    inside = place / component if component and (place / component).is_dir() else place
    folder = component_folder(inside) if is_pipeline(inside) else inside
    for home in {folder, hf_folder(folder)}:
        yield from (file for file in home.glob("*") if file.name.endswith(READ))
    yield folder / BACKBONE


def tensor_files(checkpoints: Iterable[Checkpoint | None]) -> set[Path]:
    """The files here in which a checkpoint's tensors lie, those of a sister file included."""
    opened = [checkpoint for checkpoint in checkpoints if checkpoint is not None]
    return {local_copy(info.file) for checkpoint in opened for info in checkpoint.header.tensors.values()}
