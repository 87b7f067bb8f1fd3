"""Write a shard to disk and compute its SHA-256 at the same time."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from mezzotint.errors import BrokenFile, CannotWrite
from mezzotint.saving.shards import Block, FileRange, Shard, ShardRecord

READ_BYTES = 2**19
"""Small enough to stay in a core's cache between reading and hashing."""
COPY_UNSUPPORTED = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""Error codes of `copy_file_range` where the kernel or the file system cannot do it."""


def write_shard(path: Path, shard: Shard, on_bytes: Callable[[int], None]) -> ShardRecord:
    """Write the file, sync it, and return its size and SHA-256.

    Raises   CannotWrite if a group yields more or fewer bytes than its entries have;
             BrokenFile if an input file is truncated
    """
    with path.open("wb", buffering=0) as stream, _Sink(stream.fileno()) as sink:
        for block in _blocks(shard):
            on_bytes(sink.write(block))
        os.fsync(stream.fileno())
    return ShardRecord(sink.size, sink.digest.hexdigest())


def _blocks(shard: Shard) -> Iterator[Block]:
    yield memoryview(shard.header())
    for group in shard.groups:
        size = 0
        for block in group.blocks():
            size += block.nbytes
            yield block
        if size != group.nbytes:
            names = ", ".join(entry.key for entry in group.entries)
            raise CannotWrite(
                f"{shard.name}: {names} yielded {size:,} bytes, expected {group.nbytes:,}"
            )


class _Sink(ExitStack):
    """Writes blocks to a file descriptor and hashes them on a second thread."""

    def __init__(self, handle: int) -> None:
        super().__init__()
        self.handle = handle
        self.digest = hashlib.sha256()
        self.size = 0
        self.sources: dict[Path, int] = {}
        self.hasher = self.enter_context(ThreadPoolExecutor(1))

    def write(self, block: Block) -> int:
        """Write and hash one block, and return its size when both are done."""
        if isinstance(block, FileRange):
            source = self._source(block.file)
            hashed = self.hasher.submit(self._hash_range, source, block)
            self._copy(source, block)
        else:
            hashed = self.hasher.submit(self.digest.update, block)
            self._write(block)
        hashed.result()
        self.size += block.nbytes
        return block.nbytes

    def _source(self, file: Path) -> int:
        """Return a descriptor of the file, which is opened once per shard."""
        if file not in self.sources:
            self.sources[file] = os.open(file, os.O_RDONLY)
            self.callback(os.close, self.sources[file])
        return self.sources[file]

    def _write(self, block: memoryview) -> None:
        while block.nbytes:  # an unbuffered write may take fewer bytes than it is given
            block = block[os.write(self.handle, block) :]

    def _copy(self, source: int, block: FileRange) -> None:
        """Copy in the kernel where the system can, as `cp` does, else through memory."""
        done = 0
        while done < block.nbytes:
            try:
                copied = os.copy_file_range(
                    source, self.handle, block.nbytes - done, block.start + done
                )
            except OSError as error:
                if error.errno not in COPY_UNSUPPORTED:
                    raise
                for data in _read_chunks(source, block, done):
                    self._write(data)
                return
            if not copied:
                raise _truncated(block)
            done += copied

    def _hash_range(self, source: int, block: FileRange) -> None:
        for data in _read_chunks(source, block, 0):
            self.digest.update(data)


def _read_chunks(source: int, block: FileRange, done: int) -> Iterator[memoryview]:
    """Yield the range's bytes from offset `done` on; each chunk overwrites the one before."""
    buffer = memoryview(bytearray(READ_BYTES))
    while done < block.nbytes:
        size = os.preadv(source, [buffer[: block.nbytes - done]], block.start + done)
        if not size:
            raise _truncated(block)
        done += size
        yield buffer[:size]


def _truncated(block: FileRange) -> BrokenFile:
    return BrokenFile(
        f"{block.file}: ended before byte {block.start + block.nbytes:,}; "
        "it was truncated while it was read"
    )


def hash_file(path: Path) -> ShardRecord:
    """Return the size and SHA-256 of an existing file."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            digest.update(buffer[:size])
    return ShardRecord(path.stat().st_size, digest.hexdigest())
