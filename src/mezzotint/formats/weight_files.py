"""The files in a folder that make up one component: a single file, or the shards of an index."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from mezzotint.containers import MAX_TENSORS, checkpoint_suffixes, unread_suffixes
from mezzotint.errors import BrokenFile, NotACheckpoint, NotSafetensors, join_names
from mezzotint.hub import AnyPath
from mezzotint.untrusted.json import read_object

SAFETENSORS = ".safetensors"
INDEX = f"{SAFETENSORS}.index"
INDEX_SUFFIX = f"{INDEX}.json"
MAX_FILE_NAME = 255
"""Bytes in the name of a file; Linux, macOS and Windows file systems allow no more."""
DOWNLOAD_INDEX = "download the index again."
NUNCHAKU_FOLDER = ("transformer_blocks.safetensors", "unquantized_layers.safetensors")
"""The two files of one component in Nunchaku's older folders, which have no index."""


def weight_files(folder: AnyPath) -> tuple[list[AnyPath], list[str]]:
    """Return the component's weight files in `folder`, and notes on what is odd about them.

    Raises  NotACheckpoint, BrokenFile if shards are missing
    """
    present, notes = usual_files(list_weight_files(folder))
    index = index_of(folder, present)
    if index is not None:
        files, more = _indexed_files(folder, index, present)
        return files, [*notes, *more]
    if [file.name for file in present] == list(NUNCHAKU_FOLDER):
        return present, []
    if len(present) > 1:
        names = ", ".join(file.name for file in present[:4])
        raise NotACheckpoint(
            f"{folder}: {len(present)} weight files and no index that joins them ({names})",
            "name one file.",
        )
    if not present:
        raise _no_weights(folder)
    return present, notes


def list_weight_files(folder: AnyPath) -> list[AnyPath]:
    """Return the files in a folder whose names end as those of weights do."""
    return sorted(_files_ending(folder, checkpoint_suffixes()))


def _files_ending(folder: AnyPath, suffixes: Iterable[str]) -> list[AnyPath]:
    return [file for suffix in suffixes for file in folder.glob(f"*{suffix}")]


def _indexed_files(
    folder: AnyPath, index: AnyPath, present: Sequence[AnyPath]
) -> tuple[list[AnyPath], list[str]]:
    """Return the shards that an index names, or the complete file that a stale index hides."""
    shards: list[AnyPath] = [folder / name for name in sorted(set(weight_map(index).values()))]
    missing = [file.name for file in shards if not file.is_file()]
    single: AnyPath = folder / single_of(index)
    if missing and single in present:
        note = (
            f"ignored {index.name}: it names {missing[0]}, which is not there, "
            f"and {single.name} is complete"
        )
        return [single], [note]
    if missing:
        raise BrokenFile(
            f"{index}: names {len(missing)} shard(s) that are not there: {', '.join(missing[:4])}",
            "download the missing files again.",
        )
    indexed = {file.name for file in shards}
    extra = [file.name for file in present if file.name not in indexed]
    return shards, [f"ignored {name}: the index does not name it" for name in extra]


def index_of(folder: AnyPath, present: Sequence[AnyPath] = ()) -> AnyPath | None:
    """Return the index of a component's shards; None if a complete file takes precedence.

    An index without a variant comes first. That of a variant is STEM.safetensors.index.VARIANT.json;
    its shards are STEM.VARIANT-00001-of-...
    Source: https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/utils/hub_utils.py
    """
    indexes: list[AnyPath] = sorted(folder.glob(f"*{INDEX}*.json"))
    plain = [index for index in indexes if index.name.endswith(INDEX_SUFFIX)]
    complete = {file.name for file in present}
    variants = [
        index
        for index in indexes
        if index not in plain and f"{index.name.partition(INDEX)[0]}.safetensors" not in complete
    ]
    return next(iter([*plain, *variants]), None)


def single_of(index: AnyPath) -> str:
    """Return the name of the one file that would hold what an index's shards hold."""
    stem, _, rest = index.name.partition(INDEX)
    variant = rest.removesuffix(".json")
    return f"{stem}{variant}.safetensors"


def without_variants(present: Sequence[AnyPath]) -> tuple[list[AnyPath], list[str]]:
    """Drop variants, STEM.VARIANT.safetensors, of files that are present; return a note on each."""
    stems = {Path(file.name).stem: file.name for file in present}
    kept, notes = [], []
    for file in present:
        original = stems.get(Path(file.name).stem.rpartition(".")[0])
        if original is None:
            kept.append(file)
        else:
            notes.append(f"ignored {file.name}: a variant of {original}, which is used")
    return kept, notes


def usual_files(present: Sequence[AnyPath]) -> tuple[list[AnyPath], list[str]]:
    """Drop variants, and other containers beside safetensors files; return a note on each."""
    components = [file for file in present if file.name.endswith(SAFETENSORS)]
    kept, notes = without_variants(components or present)
    others = [] if not components else [file for file in present if file not in components]
    return kept, notes + [f"ignored {file.name}: safetensors files are there" for file in others]


def _no_weights(folder: AnyPath) -> NotACheckpoint:
    """Return the error for a folder without weight files."""
    if (folder / "model_index.json").is_file():
        return NotACheckpoint(
            f"{folder}: is a whole pipeline, not one component",
            f"name a component, such as {folder / 'transformer'}.",
        )
    unread = [file.name for file in _files_ending(folder, unread_suffixes())]
    if unread:
        return NotSafetensors(
            f"{folder}: holds no .safetensors file, only {join_names(unread)}",
            "use the safetensors version of the model.",
        )
    return NotACheckpoint(
        f"{folder}: holds no .safetensors file",
        "name a safetensors file, or the folder of a diffusers component.",
    )


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
