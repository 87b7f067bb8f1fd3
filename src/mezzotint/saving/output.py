"""Write an output atomically, and resume it after a killed run.

Everything is written into a hidden folder next to the output, `.NAME.partial-PLAN`. PLAN is a hash
of everything that decides the bytes. Each finished shard is synced, then recorded with its SHA-256
in `.NAME.partial-PLAN.journal`. The last step renames the folder. A later run of the same plan
keeps the journal's shards whose checksums still match, and removes leftovers of other plans.
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
from mezzotint.saving.places import FindForeign, check_replaceable, other_files
from mezzotint.saving.publishing import publish, recover, replaced_path
from mezzotint.saving.shards import Shard, ShardRecord
from mezzotint.saving.stream import hash_file, write_shard

FREE_SPACE_MARGIN = 0.05
"""Fraction of free space that is required in addition to the bytes still to be written."""
PLAN = "[0-9a-f]{12}"
"""Regular expression of a plan in file names."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def everything(path: Path) -> list[str]:
    """Return every file at a path, as none is known to belong to an earlier output."""
    return other_files(path, set()) if path.is_dir() else [path.name]


@dataclass(frozen=True)
class Output:
    """What to write to `path`.

    path           the output: a folder, or with `file` a single file that is the only shard
    plan           12 hex digits that stand for everything that decides the bytes
    shards         the large files; their names are paths inside the folder
    finish         writes the small files, given the folder and {shard: record}
    copies         {path inside the folder: file to copy there unchanged}
    find_foreign   returns the files at a path that belong to no earlier output
    check_inputs   raises if a file that is read has changed meanwhile
    measured       {what: value} that writing a shard adds; the journal keeps it for a later run
    """

    path: Path
    plan: str
    shards: Sequence[Shard]
    finish: Callable[[Path, Mapping[str, ShardRecord]], None]
    file: bool = False
    copies: Mapping[str, Path] = field(default_factory=dict)
    find_foreign: FindForeign = everything
    check_inputs: Callable[[], None] = lambda: None
    measured: dict[str, float] = field(default_factory=dict)

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
        """Bytes of the shards and the copied files."""
        return self.nbytes + sum(file.stat().st_size for file in self.copies.values())

    def check_replaceable(self, overwrite: bool) -> None:
        check_replaceable(self.path, overwrite, self.file, self.find_foreign)


def write_output(output: Output, overwrite: bool, on_bytes: Callable[[int], None]) -> list[str]:
    """Write the output and return the names of the shards that an earlier run had already finished.

    on_bytes   called with the number of bytes just written, `output.total` in all
    Raises     BadRequest if the output exists and `overwrite` is not set, if foreign files are
               there, or if another run is writing it; CannotWrite if the disk is full or fails;
               the error of `output.check_inputs`. The message says if an old output has changed.
    """
    placed = False
    try:
        output.path.parent.mkdir(parents=True, exist_ok=True)
        recover(output.path, output.find_foreign)
        with _partial_folder(output, overwrite):
            resumed = _fill(output, on_bytes)
            with locked(output.path.parent, wait=True):
                output.check_replaceable(overwrite)
                old = publish(_finished(output), output.path)
                placed = True
                _remove_remains(output, old)
    except OSError as error:
        if not placed:
            _check_inputs(output)
        raise _cannot_write(output, error, placed) from error
    return resumed


@contextmanager
def _partial_folder(output: Output, overwrite: bool) -> Iterator[None]:
    """Create and lock the partial folder, and remove the leftovers of killed runs."""
    with ExitStack() as lock:
        # The parent's lock keeps out a run that is between the two steps of a replacement.
        with locked(output.path.parent, wait=True):
            output.check_replaceable(overwrite)
            output.partial.mkdir(exist_ok=True)
            lock.enter_context(locked(output.partial))
            _remove_stale(output)
        yield


def _fill(output: Output, on_bytes: Callable[[int], None]) -> list[str]:
    """Write and sync everything in the partial folder, and return the shards of an earlier run."""
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
    _check_inputs(output)
    return resumed


def _check_inputs(output: Output) -> None:
    """Call `output.check_inputs`; if it raises, remove what was made from the changed files."""
    try:
        output.check_inputs()
    except MezzotintError:
        output.journal.unlink(missing_ok=True)
        if output.partial.is_dir():
            shutil.rmtree(output.partial)
        raise


def _uncloned(output: Output, on_bytes: Callable[[int], None]) -> dict[str, Path]:
    """Clone the files to copy, and return those that could not be cloned."""
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
    """Write and sync one shard, then record it in the journal."""
    path = output.partial / shard.name
    path.parent.mkdir(parents=True, exist_ok=True)
    before = set(output.measured)
    record = write_shard(path, shard, on_bytes)
    fsync(path.parent)
    _check_inputs(output)
    measured = {what: value for what, value in output.measured.items() if what not in before}
    entry = {"shard": shard.name, **asdict(record)} | ({"measured": measured} if measured else {})
    with output.journal.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    return record


def _finished_shards(output: Output) -> dict[str, ShardRecord]:
    """Return the intact shards of an earlier run, and remove its other files."""
    planned = {shard.name: shard.nbytes for shard in output.shards}
    kept: dict[str, ShardRecord] = {}
    for name, record, measured in _journal(output.journal):
        path = output.partial / name
        if planned.get(name) == record.size and path.is_file() and hash_file(path) == record:
            kept[name] = record
            output.measured.update(measured)
    for path in _files(output.partial):
        if str(path.relative_to(output.partial)) not in kept:
            path.unlink()
    _remove_empty_folders(output.partial)
    return kept


def _remove_empty_folders(folder: Path) -> None:
    """Remove the empty folders inside, the deepest first."""
    for place, _, _ in os.walk(folder, topdown=False):
        if Path(place) != folder and not any(Path(place).iterdir()):
            Path(place).rmdir()


def _journal(path: Path) -> Iterator[tuple[str, ShardRecord, dict[str, float]]]:
    """Yield (shard, record, what was measured) of each line, except one that a kill cut short."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            record = ShardRecord(int(entry["size"]), str(entry["sha256"]))
            yield str(entry["shard"]), record, dict(entry.get("measured", {}))


def _remove_stale(output: Output) -> None:
    """Remove the leftovers of earlier plans for the same output."""
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
    """Sync every file and folder to disk."""
    for path in [*_files(folder), folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        fsync(path)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]


def _finished(output: Output) -> Path:
    """Return the file or folder to rename to the output."""
    return output.partial / output.shards[0].name if output.file else output.partial


def _remove_remains(output: Output, old: Path | None) -> None:
    """Sync the rename, then remove the old output and the temporary files of this run."""
    fsync(output.path.parent)
    output.journal.unlink(missing_ok=True)
    for left in {output.partial, old or output.partial}:
        if left.exists():
            shutil.rmtree(left)


def _cannot_write(output: Output, error: OSError, placed: bool) -> CannotWrite:
    """Return the error that says what failed, and what is at the output now."""
    what = f"{error.strerror or error} ({error.filename or output.partial})"
    old = replaced_path(output.path)
    if placed:
        return CannotWrite(
            f"{output.path}: is written and complete, but temporary files remain: {what}",
            f"remove {output.partial.name} and {old.name} in the same folder, if they exist.",
        )
    hint = "nothing at the output has changed; "
    if old.is_dir() and not os.path.lexists(output.path):
        hint = f"the previous output is at {old}, and the next run moves it back; "
    hint += "finished shards are kept, and the same command continues from there."
    if error.errno in FULL:
        hint = f"free some space; {hint}"
    return CannotWrite(f"{output.path}: could not be written: {what}", hint)
