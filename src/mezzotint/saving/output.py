"""An output that appears whole or not at all, and that a killed run can go on with.

Everything is written into a hidden folder beside the output, `.NAME.partial-PLAN`, where PLAN stands for everything
that decides the bytes. Each finished shard is synced, then recorded with its SHA-256 in `.NAME.partial-PLAN.journal`.
The last step gives the folder its name. A later run of the same plan keeps the shards that the journal names and that
still have their checksum; leftovers of other plans for the same output are removed.
"""

import ctypes
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mezzotint.errors import BadRequest, CannotWrite
from mezzotint.saving.files import sync
from mezzotint.saving.shards import Shard, ShardRecord
from mezzotint.saving.stream import record_of, write_shard

SPARE = 0.05
"""Free space asked for beyond the bytes that are still to be written."""
AT_FDCWD = -100
RENAME_EXCHANGE = 2


@dataclass(frozen=True)
class Output:
    """What is to stand at `path` in the end.

    path      the output: a folder, or with `file` a single file that is the only shard
    plan      a short name for everything that decides the bytes; equal plans give equal bytes
    shards    the large files; their names are paths inside the folder
    finish    called with the folder and {shard: record} once all shards are there; writes the small files beside them
    """

    path: Path
    plan: str
    shards: Sequence[Shard]
    finish: Callable[[Path, Mapping[str, ShardRecord]], None]
    file: bool = False

    @property
    def partial(self) -> Path:
        return self.path.with_name(f".{self.path.name}.partial-{self.plan}")

    @property
    def journal(self) -> Path:
        return self.partial.with_name(f"{self.partial.name}.journal")

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


def write_output(output: Output, overwrite: bool, on_bytes: Callable[[int], None]) -> list[str]:
    """Write the output; returns the names of the shards that an earlier run had already finished.

    Raises   BadRequest if the output is there and `overwrite` is not set, or if another run is writing it;
             CannotWrite if there is no room, or the disk refuses. What was there before is then untouched.
    """
    check_replaceable(output.path, overwrite, output.file)
    try:
        output.path.parent.mkdir(parents=True, exist_ok=True)
        output.partial.mkdir(exist_ok=True)
        with _locked(output.partial):
            _sweep(output)
            records = _kept(output)
            resumed = list(records)
            _check_space(output, records)
            for shard in output.shards:
                if shard.name in resumed:
                    on_bytes(shard.nbytes)
                else:
                    records[shard.name] = _write(output, shard, on_bytes)
            output.finish(output.partial, records)
            _sync_tree(output.partial)
            _publish(output)
    except OSError as error:
        raise _cannot_write(output, error) from error
    return resumed


def check_replaceable(path: Path, overwrite: bool, file: bool) -> None:
    """Raise BadRequest unless nothing is at `path`, or something that may be replaced by a file or a folder."""
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise BadRequest(f"{path}: is there already", "--overwrite replaces it once the new one is complete.")
    if path.is_symlink() or path.is_file() != file:
        kind = "a symbolic link" if path.is_symlink() else "a file" if path.is_file() else "a folder"
        raise BadRequest(f"{path}: is {kind}, and the output is {'a file' if file else 'a folder'}")


def _write(output: Output, shard: Shard, on_bytes: Callable[[int], None]) -> ShardRecord:
    """Write one shard and record it; both are on the disk afterwards, the shard first."""
    path = output.partial / shard.name
    path.parent.mkdir(parents=True, exist_ok=True)
    record = write_shard(path, shard, on_bytes)
    sync(path.parent)
    with output.journal.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"shard": shard.name} | asdict(record)) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    return record


def _kept(output: Output) -> dict[str, ShardRecord]:
    """Shards of an earlier run that are finished and undamaged; everything else in the partial folder is removed."""
    planned = {shard.name: shard.nbytes for shard in output.shards}
    kept: dict[str, ShardRecord] = {}
    for name, record in _journal(output.journal):
        path = output.partial / name
        if planned.get(name) == record.size and path.is_file() and record_of(path) == record:
            kept[name] = record
    for path in _files(output.partial):
        if str(path.relative_to(output.partial)) not in kept:
            path.unlink()
    return kept


def _journal(path: Path) -> Iterator[tuple[str, ShardRecord]]:
    """The journal's lines; one that was cut short by a kill is no line."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            yield str(entry["shard"]), ShardRecord(int(entry["size"]), str(entry["sha256"]))


def _sweep(output: Output) -> None:
    """Remove what earlier plans for the same output have left."""
    for path in output.path.parent.glob(f".{_literal(output.path.name)}.partial-*"):
        if path in (output.partial, output.journal):
            continue
        if path.is_dir():
            with _locked(path):
                shutil.rmtree(path)
        else:
            path.unlink()


def _literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the lock goes with the process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadRequest(f"{folder}: another run is writing this output", "wait until it has ended.") from error
        yield
    finally:
        os.close(handle)


def _check_space(output: Output, records: Mapping[str, ShardRecord]) -> None:
    needed = int((output.nbytes - sum(record.size for record in records.values())) * (1 + SPARE))
    free = shutil.disk_usage(output.partial).free
    if needed > free:
        raise CannotWrite(
            f"{output.path.parent}: {needed:,} bytes are needed and {free:,} are free",
            "free some space, or name an output on another disk.",
        )


def _sync_tree(folder: Path) -> None:
    """Bring every file that is not a hard link to something older, and every folder, to the disk."""
    for path in _files(folder):
        if path.stat().st_nlink == 1:
            sync(path)
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync(path)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]


def _publish(output: Output) -> None:
    """Give the finished output its name; the old one is in place until the very step that replaces it."""
    if output.file:
        (output.partial / output.shards[0].name).replace(output.path)
        output.partial.rmdir()
    elif not output.path.exists():
        output.partial.rename(output.path)
    else:
        _exchange(output.partial, output.path)
    sync(output.path.parent)
    output.journal.unlink(missing_ok=True)
    if output.partial.exists():
        shutil.rmtree(output.partial)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders' names in one step (Linux: renameat2); where that is not to be had, in two."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        if rename(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            raise OSError(code, os.strerror(code), str(old))
    aside = old.with_name(f".{old.name}.replaced")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)


def _cannot_write(output: Output, error: OSError) -> CannotWrite:
    hint = "nothing at the output has changed; "
    hint += "finished shards are kept and the same command goes on from there."
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        hint = f"free some space; {hint}"
    where = error.filename or output.partial
    return CannotWrite(f"{output.path}: could not be written: {error.strerror or error} ({where})", hint)
