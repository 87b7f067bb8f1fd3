"""An output that appears whole or not at all, and that a killed run can go on with.

Everything is written into a hidden folder beside the output, `.NAME.partial-PLAN`, where PLAN stands for everything
that decides the bytes. Each finished shard is synced, then recorded with its SHA-256 in `.NAME.partial-PLAN.journal`.
The last step gives the folder its name. A later run of the same plan keeps the shards that the journal names and that
still have their checksum; leftovers of other plans for the same output are removed.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mezzotint.errors import CannotWrite, MezzotintError
from mezzotint.saving.copies import clone_file, copy_bytes
from mezzotint.saving.files import PARTIAL, fsync, locked
from mezzotint.saving.places import Strangers, check_replaceable, other_files
from mezzotint.saving.publishing import aside, put_in_place, recover
from mezzotint.saving.shards import Shard, ShardRecord
from mezzotint.saving.stream import hash_file, write_shard

FREE_SPACE_MARGIN = 0.05
"""Free space asked for beyond the bytes that are still to be written."""
PLAN = "[0-9a-f]{12}"
"""What a plan is called in the names of files."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def everything(path: Path) -> list[str]:
    """All that is at a path: nothing of it is known to be an earlier output."""
    return other_files(path, set()) if path.is_dir() else [path.name]


@dataclass(frozen=True)
class Output:
    """What is to stand at `path` in the end.

    path        the output: a folder, or with `file` a single file that is the only shard
    plan        a short name for everything that decides the bytes, 12 hex digits; equal plans give equal bytes
    shards      the large files; their names are paths inside the folder
    finish      called with the folder and {shard: record} once all shards are there; writes the small files beside them
    copies      {path inside the folder: file that is copied there as it is}
    strangers   what at a path is no part of an earlier output, and may not be replaced
    unchanged   raises if a file that is read was changed meanwhile
    """

    path: Path
    plan: str
    shards: Sequence[Shard]
    finish: Callable[[Path, Mapping[str, ShardRecord]], None]
    file: bool = False
    copies: Mapping[str, Path] = field(default_factory=dict)
    strangers: Strangers = everything
    unchanged: Callable[[], None] = lambda: None

    @property
    def partial(self) -> Path:
        return self.path.with_name(f".{self.path.name}{PARTIAL}{self.plan}")

    @property
    def journal(self) -> Path:
        return self.partial.with_name(f"{self.partial.name}.journal")

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def total(self) -> int:
        """Bytes of the shards and of everything that is copied beside them."""
        return self.nbytes + sum(file.stat().st_size for file in self.copies.values())

    def check_replaceable(self, overwrite: bool) -> None:
        check_replaceable(self.path, overwrite, self.file, self.strangers)


def write_output(output: Output, overwrite: bool, on_bytes: Callable[[int], None]) -> list[str]:
    """Write the output; returns the names of the shards that an earlier run had already finished.

    on_bytes   called with numbers of bytes that are done, `output.total` in all
    Raises     BadRequest if the output is there and `overwrite` is not set, if more than an earlier output is there,
               or if another run is writing it; CannotWrite if there is no room, or the disk refuses; what
               `output.unchanged` raises. The message says so if what was there before is not untouched.
    """
    placed = False
    try:
        output.path.parent.mkdir(parents=True, exist_ok=True)
        recover(output.path, output.strangers)
        with _begun(output, overwrite):
            resumed = _fill(output, on_bytes)
            with locked(output.path.parent, wait=True):
                output.check_replaceable(overwrite)
                old = put_in_place(_finished(output), output.path)
                placed = True
                _clear(output, old)
    except OSError as error:
        if not placed:
            _check_unchanged(output)
        raise _cannot_write(output, error, placed) from error
    return resumed


@contextmanager
def _begun(output: Output, overwrite: bool) -> Iterator[None]:
    """Hold the partial folder, made now, with what killed runs have left behind cleared away.

    The folder around it is held meanwhile, so that no other run is between two steps of a replacement.
    """
    with ExitStack() as held:
        with locked(output.path.parent, wait=True):
            output.check_replaceable(overwrite)
            output.partial.mkdir(exist_ok=True)
            held.enter_context(locked(output.partial))
            _remove_stale(output)
        yield


def _fill(output: Output, on_bytes: Callable[[int], None]) -> list[str]:
    """Bring everything into the partial folder and to the disk; returns the shards that were there already."""
    records = _finished_shards(output)
    resumed = list(records)
    left = _uncloned(output, on_bytes)
    _check_space(output, records, left)
    for shard in output.shards:
        if shard.name in resumed:
            on_bytes(shard.nbytes)
        else:
            records[shard.name] = _write(output, shard, on_bytes)
    for name, file in left.items():
        on_bytes(copy_bytes(file, output.partial / name))
    output.finish(output.partial, records)
    _sync_tree(output.partial)
    _check_unchanged(output)
    return resumed


def _check_unchanged(output: Output) -> None:
    """Raise what `output.unchanged` raises, and drop what was made of files that changed meanwhile."""
    try:
        output.unchanged()
    except MezzotintError:
        output.journal.unlink(missing_ok=True)
        if output.partial.is_dir():
            shutil.rmtree(output.partial)
        raise


def _uncloned(output: Output, on_bytes: Callable[[int], None]) -> dict[str, Path]:
    """Clone the files that stand beside the shards; returns those that have to be copied byte by byte."""
    left = {}
    for name, file in output.copies.items():
        target = output.partial / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if clone_file(file, target):
            on_bytes(target.stat().st_size)
        else:
            left[name] = file
    return left


def _write(output: Output, shard: Shard, on_bytes: Callable[[int], None]) -> ShardRecord:
    """Write one shard and record it; both are on the disk afterwards, the shard first."""
    path = output.partial / shard.name
    path.parent.mkdir(parents=True, exist_ok=True)
    record = write_shard(path, shard, on_bytes)
    fsync(path.parent)
    _check_unchanged(output)
    with output.journal.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"shard": shard.name} | asdict(record)) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    return record


def _finished_shards(output: Output) -> dict[str, ShardRecord]:
    """Shards of an earlier run that are finished and undamaged; everything else in the partial folder is removed."""
    planned = {shard.name: shard.nbytes for shard in output.shards}
    kept: dict[str, ShardRecord] = {}
    for name, record in _journal(output.journal):
        path = output.partial / name
        if planned.get(name) == record.size and path.is_file() and hash_file(path) == record:
            kept[name] = record
    for path in _files(output.partial):
        if str(path.relative_to(output.partial)) not in kept:
            path.unlink()
    _remove_empty_folders(output.partial)
    return kept


def _remove_empty_folders(folder: Path) -> None:
    """Remove the folders inside in which no file is, the deepest first."""
    for place, _, _ in os.walk(folder, topdown=False):
        if Path(place) != folder and not any(Path(place).iterdir()):
            Path(place).rmdir()


def _journal(path: Path) -> Iterator[tuple[str, ShardRecord]]:
    """The journal's lines; one that was cut short by a kill is no line."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            yield str(entry["shard"]), ShardRecord(int(entry["size"]), str(entry["sha256"]))


def _remove_stale(output: Output) -> None:
    """Remove what earlier plans for the same output have left."""
    ours = re.compile(re.escape(f".{output.path.name}{PARTIAL}") + PLAN + r"(\.journal)?")
    for path in sorted(output.path.parent.iterdir()):
        if not ours.fullmatch(path.name) or path in (output.partial, output.journal):
            continue
        if path.is_dir():
            with locked(path):
                shutil.rmtree(path)
        else:
            path.unlink()


def _check_space(
    output: Output, records: Mapping[str, ShardRecord], left: Mapping[str, Path]
) -> None:
    needed = output.nbytes - sum(record.size for record in records.values())
    needed += sum(file.stat().st_size for file in left.values())
    needed = int(needed * (1 + FREE_SPACE_MARGIN))
    free = shutil.disk_usage(output.partial).free
    if needed > free:
        raise CannotWrite(
            f"{output.path.parent}: {needed:,} bytes are needed and {free:,} are free",
            "free some space, or name an output on another disk.",
        )


def _sync_tree(folder: Path) -> None:
    """Bring every file and every folder to the disk."""
    for path in [*_files(folder), folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        fsync(path)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]


def _finished(output: Output) -> Path:
    """What gets the output's name."""
    return output.partial / output.shards[0].name if output.file else output.partial


def _clear(output: Output, old: Path | None) -> None:
    """Bring the new name to the disk, and remove the old output and everything of this run that is left."""
    fsync(output.path.parent)
    output.journal.unlink(missing_ok=True)
    for left in {output.partial, old or output.partial}:
        if left.exists():
            shutil.rmtree(left)


def _cannot_write(output: Output, error: OSError, placed: bool) -> CannotWrite:
    """What failed, and what is at the output now."""
    what = f"{error.strerror or error} ({error.filename or output.partial})"
    old = aside(output.path)
    if placed:
        return CannotWrite(
            f"{output.path}: is written and complete, but not everything could be cleared away: {what}",
            f"remove {output.partial.name} and {old.name} beside it, if they are there.",
        )
    hint = "nothing at the output has changed; "
    if old.is_dir() and not os.path.lexists(output.path):
        hint = f"what was at the output is at {old}, and the next run with this output gives it its name back; "
    hint += "finished shards are kept and the same command goes on from there."
    if error.errno in FULL:
        hint = f"free some space; {hint}"
    return CannotWrite(f"{output.path}: could not be written: {what}", hint)
