"""The index of a component's safetensors shards: how it is named, and what it lists.

An index is STEM.safetensors.index.json. If it is for a variant, such as fp16, it is
STEM.safetensors.index.VARIANT.json, and its shards are STEM.VARIANT-00001-of-0000N.safetensors.
Source: https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/utils/hub_utils.py
"""

from collections.abc import Sequence
from pathlib import Path

from mezzotint.containers.container import MAX_TENSORS
from mezzotint.errors import BrokenFile
from mezzotint.hub import AnyPath
from mezzotint.untrusted.json import read_object

SUFFIX = ".safetensors"
INDEX = f"{SUFFIX}.index"
INDEX_SUFFIX = f"{INDEX}.json"
MAX_FILE_NAME = 255
"""Bytes in the name of a file; Linux, macOS and Windows file systems allow no more."""
DOWNLOAD_INDEX = "download the index again."


def index_of(folder: AnyPath, present: Sequence[AnyPath] = ()) -> AnyPath | None:
    """Return the index of a component's shards, None if there is none.

    An index without a variant comes first. The index of a variant is ignored if the complete file
    STEM.safetensors is among the `present` ones.
    """
    indexes: list[AnyPath] = sorted(folder.glob(f"*{INDEX}*.json"))
    plain = [index for index in indexes if index.name.endswith(INDEX_SUFFIX)]
    complete = {file.name for file in present}
    variants = [
        index
        for index in indexes
        if index not in plain and f"{index.name.partition(INDEX)[0]}{SUFFIX}" not in complete
    ]
    return next(iter([*plain, *variants]), None)


def single_of(index: AnyPath) -> str:
    """Return the name of the one file that would hold what an index's shards hold."""
    stem, _, rest = index.name.partition(INDEX)
    variant = rest.removesuffix(".json")
    return f"{stem}{variant}{SUFFIX}"


def weight_map(index: AnyPath) -> dict[str, str]:
    """Return an index's {tensor: name of the shard that holds it}.

    Raises  BrokenFile if it has no map, names too many tensors, or names a path outside its folder
    """
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise BrokenFile(f"{index}: has no weight_map", DOWNLOAD_INDEX)
    if len(names) > MAX_TENSORS:
        raise BrokenFile(
            f"{index}: names {len(names):,} tensors, over the limit of {MAX_TENSORS:,}",
            DOWNLOAD_INDEX,
        )
    if any(not isinstance(shard, str) for shard in names.values()):
        raise BrokenFile(
            f"{index}: its weight_map names a shard by a value that is not a string", DOWNLOAD_INDEX
        )
    if any(not is_file_name(shard) for shard in names.values()):
        raise BrokenFile(f"{index}: names a shard outside its folder", DOWNLOAD_INDEX)
    return names


def is_file_name(name: str) -> bool:
    """Return whether a string can name a file in a folder: one path segment, and no "..".

    The names come from a file that anyone may have written; a path could leave the folder.
    """
    return (
        bool(name)
        and Path(name).name == name != ".."
        and "\0" not in name
        and len(name.encode()) <= MAX_FILE_NAME
    )
