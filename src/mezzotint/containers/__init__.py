"""File formats that store tensors, one module per container, and their detection."""

from functools import cache

from mezzotint.containers import safetensors
from mezzotint.containers.container import (
    MAX_TENSORS,
    BlockType,
    Container,
    ContainerHeader,
    DType,
    TensorInfo,
    read_all,
)
from mezzotint.containers.unread import SNIFF_BYTES, UNREAD_SUFFIXES, refuse_unread
from mezzotint.discover import collect
from mezzotint.hub import AnyPath

__all__ = [
    "MAX_TENSORS",
    "BlockType",
    "Container",
    "ContainerHeader",
    "DType",
    "TensorInfo",
    "checkpoint_suffixes",
    "containers",
    "read_all",
    "read_container",
    "unread_suffixes",
]


@cache
def containers() -> dict[str, Container]:
    """Return {name: container}, discovered from the modules of this package."""
    return collect("mezzotint.containers", "CONTAINER")


def checkpoint_suffixes() -> tuple[str, ...]:
    """Return the suffixes of files that may hold a model's weights."""
    return tuple(suffix for known in containers().values() for suffix in known.suffixes)


def unread_suffixes() -> tuple[str, ...]:
    """Return the suffixes of weight files that are not read."""
    return tuple(suffix for suffix in UNREAD_SUFFIXES if suffix not in checkpoint_suffixes())


def read_container(file: AnyPath) -> ContainerHeader:
    """Read the header of a file in any container.

    Raises  BrokenFile, NotACheckpoint, NotSafetensors
    """
    return container_of(file).read(file)


def container_of(file: AnyPath) -> Container:
    """Return the container that the file's first bytes show.

    An unrecognized file is taken as safetensors, whose reader then names the damage.

    Raises  NotACheckpoint, NotSafetensors for a known kind of file that is not read
    """
    found = next((known for known in containers().values() if known.sniff(file)), None)
    # An .npz file is a zip archive as a .pt file is, and only its name tells them apart.
    if found is None or file.name.endswith(unread_suffixes()):
        with file.open("rb") as stream:
            refuse_unread(file, stream.read(SNIFF_BYTES))
    return safetensors.CONTAINER if found is None else found
