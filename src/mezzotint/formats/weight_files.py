"""The files in a folder that make up one component: a single file, or the shards of an index."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from mezzotint.containers import checkpoint_suffixes, safetensors, unread_suffixes
from mezzotint.containers.shard_index import index_of, single_of, weight_map
from mezzotint.errors import BrokenFile, NotACheckpoint, NotSafetensors, join_names
from mezzotint.hub import AnyPath

NUNCHAKU_FOLDER = ("transformer_blocks.safetensors", "unquantized_layers.safetensors")
"""The two files of one component in Nunchaku's older folders, which have no index."""


def weight_files(folder: AnyPath) -> tuple[list[AnyPath], list[str]]:
    """Return the component's weight files in `folder`, and notes on what is odd about them.

    Raises  NotACheckpoint, BrokenFile if shards are missing
    """
    present, notes = without_variants(list_weight_files(folder))
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
    """Return a folder's weight files: those of safetensors, or if there are none, all others.

    diffusers prefers safetensors in the same way, where a folder holds a model twice.
    """
    preferred = sorted(_files_ending(folder, safetensors.CONTAINER.suffixes))
    return preferred or sorted(_files_ending(folder, checkpoint_suffixes()))


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


def without_variants(present: Sequence[AnyPath]) -> tuple[list[AnyPath], list[str]]:
    """Drop variants of files that are present, such as STEM.fp16.SUFFIX; return a note on each."""
    stems = {Path(file.name).stem: file.name for file in present}
    kept, notes = [], []
    for file in present:
        original = stems.get(Path(file.name).stem.rpartition(".")[0])
        if original is None:
            kept.append(file)
        else:
            notes.append(f"ignored {file.name}: a variant of {original}, which is used")
    return kept, notes


def _no_weights(folder: AnyPath) -> NotACheckpoint:
    """Return the error for a folder without weight files."""
    if (folder / "model_index.json").is_file():
        return NotACheckpoint(
            f"{folder}: is a whole pipeline, not one component",
            f"name a component, such as {folder / 'transformer'}.",
        )
    expected = " or ".join(checkpoint_suffixes())
    unread = [file.name for file in _files_ending(folder, unread_suffixes())]
    if unread:
        return NotSafetensors(
            f"{folder}: holds no {expected} file, only {join_names(unread)}",
            "use the safetensors version of the model.",
        )
    return NotACheckpoint(
        f"{folder}: holds no {expected} file",
        f"name a {expected} file, or the folder of a diffusers component.",
    )
