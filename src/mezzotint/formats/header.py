"""What the files of one component say before any tensor is read.

Tensors, metadata and configuration of all shards are merged, whatever container they come in.
The containers have checked every claim about tensors, so that later code can trust a `Header`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mezzotint.containers import TensorInfo, read_container
from mezzotint.errors import BrokenFile, NotACheckpoint, UnexpectedTensor
from mezzotint.formats.weight_files import weight_files
from mezzotint.hub import AnyPath, HubPath
from mezzotint.untrusted.json import parse_object, read_object


@dataclass(frozen=True)
class Header:
    """The headers of one component's files.

    path             what the caller named
    tensors          {key: TensorInfo} over all files
    metadata         the metadata of all files, merged
    config           the diffusers configuration in the metadata, else in config.json, else {}
    notes            oddities that do not stop a load, for the report
    hf_quant_config  the content of hf_quant_config.json in the same folder, or {}
    skipped          {tensor of another component: reason}; `tensors` is without these
    """

    path: AnyPath
    files: tuple[AnyPath, ...]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    hf_quant_config: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def local(self) -> bool:
        """Whether every file is on this machine; values on the Hub are not read for detection."""
        return all(isinstance(file, Path) for file in self.files)

    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def fetch(self) -> None:
        """Download files on the Hub, before many of their tensors are read one by one."""
        for file in self.files:
            if isinstance(file, HubPath):
                file.fetch()


def read_header(path: str | AnyPath) -> Header:
    """Read the header of a file, or of a folder that holds one component's file or shards.

    Raises  NotACheckpoint, BrokenFile, UnexpectedTensor
    """
    path = Path(path) if isinstance(path, str) else path
    if path.is_file():
        return header_of_files(path, [path], path.parent)
    if not path.is_dir():
        raise NotACheckpoint(f"{path}: no such file or folder")
    files, notes = weight_files(path)
    return header_of_files(path, files, path, notes)


def header_of_files(
    path: AnyPath, files: Iterable[AnyPath], config_folder: AnyPath, notes: Iterable[str] = ()
) -> Header:
    """Read and merge the headers of exactly these files.

    Raises  UnexpectedTensor if two files hold one tensor; BrokenFile, NotACheckpoint
    """
    files = tuple(files)
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for file in files:
        contained = read_container(file)
        _merge(tensors, contained.tensors)
        metadata |= contained.metadata
    config = _config_in(metadata) or _read_config(config_folder / "config.json")
    quant_config = _read_config(config_folder / "hf_quant_config.json")
    return Header(path, files, tensors, metadata, config, tuple(notes), quant_config)


def _merge(tensors: dict[str, TensorInfo], added: Mapping[str, TensorInfo]) -> None:
    """Add the tensors of one more file."""
    for name, info in added.items():
        if name in tensors:
            raise UnexpectedTensor(
                f"tensor {name} is stored twice: "
                f"in {tensors[name].file.name} and in {info.file.name}",
                "one of the shards is from another export; download the whole folder again.",
            )
        tensors[name] = info


def _config_in(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the diffusers configuration in the metadata; a `config` of another tool is ignored."""
    try:
        config = parse_object(metadata.get("config", "{}"), "config")
    except BrokenFile:
        return {}
    return config if "_class_name" in config else {}


def _read_config(file: AnyPath) -> dict[str, Any]:
    return read_object(file) if file.is_file() else {}
