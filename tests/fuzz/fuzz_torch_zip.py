"""Read mutated files of torch.save: each is refused by a named error or read, and none is run.

Half of the mutations change the pickle, the others the zip archive around it. Some pickles call
`os.system` to create a file, which must not exist afterwards.
"""

import io
import random
import struct
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from fuzz.hostile import Figures, run_from_command_line
from fuzz.hostile import fuzz as fuzz_files
from mezzotint.containers import read_container
from mezzotint.containers.torch_zip import MAGIC
from mezzotint.errors import BrokenFile, MezzotintError

PAYLOAD = "mezzotint-was-executed"
"""Name of the file that a payload creates in the working folder."""
CALL = b"cposix\nsystem\n(X" + struct.pack("<I", 6 + len(PAYLOAD)) + f"touch {PAYLOAD}".encode()
CALL += b"tR."
OPCODES = b"}]()NRtbqhXKMJ.ceuas\x85\x86\x87\x88\x89Q\x80"
LENGTHS = (0, 1, 2, 255, 2**16 - 1, 2**31 - 1, 2**32 - 1)
SEEDS = 24


@cache
def seed_files() -> Sequence[tuple[bytes, tuple[tuple[str, bytes], ...]]]:
    """Return (whole file, its entries) of sound files with various contents."""
    torch.manual_seed(0)
    seeds = []
    for number in range(SEEDS):
        stored = io.BytesIO()
        torch.save(_content(number), stored)
        with zipfile.ZipFile(stored) as archive:
            entries = tuple((name, archive.read(name)) for name in archive.namelist())
        seeds.append((stored.getvalue(), entries))
    return seeds


def _content(number: int) -> object:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)
    tensors = {
        f"layer.{i}.weight": torch.randn(i, 2).to(dtypes[(number + i) % len(dtypes)])
        for i in range(number % 4)
    }
    shared = torch.zeros(4)
    return (
        tensors,
        {"state_dict": tensors, "epoch": 3, "lr": 0.5, "name": "a"},
        {"model": torch.nn.Linear(2, 2).state_dict(), "a": shared, "b": shared[1:]},
        [tensors, None, True],
    )[number % 4]


def mutate(chance: random.Random) -> bytes:
    """Return a whole file with a few things wrong in it, or none."""
    content, entries = chance.choice(seed_files())
    if chance.random() < 0.5:
        content = _zipped([_changed_entry(name, data, chance) for name, data in entries])
    if chance.random() < 0.6:
        for _ in range(chance.choice((1, 1, 2, 4))):
            content = _changed_archive(content, chance)
    if chance.random() < 0.1:
        content = content[: chance.randrange(len(content) + 1)]
    return content


def _zipped(entries: Sequence[tuple[str, bytes]]) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, data in entries:
            archive.writestr(zipfile.ZipInfo(name), data)
    return written.getvalue()


def _changed_entry(name: str, data: bytes, chance: random.Random) -> tuple[str, bytes]:
    if not name.endswith("data.pkl"):
        return name, data[: chance.randrange(len(data) + 1)] if chance.random() < 0.05 else data
    for _ in range(chance.choice((0, 1, 1, 2, 4))):
        data = _changed_pickle(data, chance)
    return name, data


def _changed_pickle(data: bytes, chance: random.Random) -> bytes:
    """Change, drop, repeat or insert some bytes or instructions; sometimes add a call."""
    position = chance.randrange(len(data) + 1)
    length = chance.choice((0, 1, 1, 2, 5, 40))
    middle = chance.choice(
        (
            b"",
            bytes([chance.choice(OPCODES)]),
            bytes([chance.randrange(256)]),
            data[position : position + length] * 2,
            struct.pack("<I", chance.choice(LENGTHS)),
            CALL,
        )
    )
    return data[:position] + middle + data[position + length :]


def _changed_archive(content: bytes, chance: random.Random) -> bytes:
    """Overwrite a number or a byte of the archive, most often in its directory at the end."""
    size = len(content)
    near_end = chance.random() < 0.6
    position = chance.randrange(max(size - 400, 0), size) if near_end else chance.randrange(size)
    changed = chance.choice(
        (
            struct.pack("<I", chance.choice(LENGTHS)),
            struct.pack("<H", chance.choice(LENGTHS[:5])),
            bytes([chance.randrange(256)]),
        )
    )
    return content[:position] + changed + content[position + len(changed) :]


def accepts(file: Path) -> bool:
    """Return whether Mezzotint reads the file; errors of other classes are raised."""
    with file.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            return False
    try:
        tensors = read_container(file).tensors
    except MezzotintError:
        return False
    size = file.stat().st_size
    for name in tensors:
        try:
            info = tensors[name]
        except BrokenFile:
            continue
        assert 0 <= info.start <= info.end <= size or not info.nbytes
        assert info.read().nbytes == info.nbytes
    return True


def fuzz(file: Path, number: int, seed: int) -> Figures:
    """Try `number` files; raises AssertionError for the first that breaks a promise."""
    figures = fuzz_files(file, number, seed, mutate, accepts)
    assert not Path(PAYLOAD).exists(), "a file was executed"
    return figures


def main() -> None:
    run_from_command_line(__doc__, "mutated files of torch.save", mutate, accepts)
    assert not Path(PAYLOAD).exists(), "a file was executed"


if __name__ == "__main__":
    main()
