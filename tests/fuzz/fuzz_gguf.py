"""Read mutated GGUF headers: each is refused by a named error or read, within limits.

A header that is accepted must describe bytes of the file, and its tensors can be read.
"""

import random
import struct
from pathlib import Path

from fuzz.hostile import Figures, run_from_command_line
from fuzz.hostile import fuzz as fuzz_files
from mezzotint.containers import read_container
from mezzotint.containers.gguf import ORIGINAL_SHAPE
from mezzotint.containers.gguf_types import BLOCKS, NUMBERS
from mezzotint.errors import CheckpointError
from mezzotint.formats import detect_format, read_header
from support import gguf_files
from support.gguf_files import Stored

NUMBERS_TRIED = (0, 1, 2, 3, 7, 8, 9, 12, 31, 32, 33, 64, 255, 2**16, 2**31, 2**32 - 1)
LENGTHS_TRIED = (*NUMBERS_TRIED, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
TEXTS = ("", "a", "general.alignment", "general.architecture", "split.count", "a" * 300, "\0")


def seed_file(chance: random.Random) -> bytes:
    """Return a sound file."""
    tensors, metadata = {}, {}
    if chance.random() < 0.5:
        metadata["general.architecture"] = chance.choice(("wan", "flux", "t5", "pig", ""))
    for i in range(chance.randint(0, 3)):
        metadata[f"key.{i}"] = chance.choice((7, "text", [1, 2, 3], []))
    for i in range(chance.randint(0, 5)):
        name, rows = f"blocks.{i}.weight", chance.randint(0, 3)
        if chance.random() < 0.5:
            number = chance.choice(list(BLOCKS))
            block = BLOCKS[number]
            tensors[name] = Stored(
                number, (block.block_elements, rows), bytes(rows * block.block_bytes)
            )
        else:
            number = chance.choice(list(NUMBERS))
            tensors[name] = Stored(number, (4, rows), bytes(rows * 4 * NUMBERS[number].itemsize))
            if chance.random() < 0.2:
                metadata[ORIGINAL_SHAPE + name] = chance.choice(([rows, 2, 2], [4], [-1, -4]))
    return gguf_files.content(tensors, metadata, version=chance.choice((2, 3)))


def mutate(chance: random.Random) -> bytes:
    """Return a whole file with a few things wrong in it, or none."""
    content = seed_file(chance)
    for _ in range(chance.choice((0, 1, 1, 2, 3))):
        content = mutate_once(content, chance)
    if chance.random() < 0.15:
        content = content[: chance.randrange(len(content) + 1)]
    return content


def mutate_once(content: bytes, chance: random.Random) -> bytes:
    """Overwrite a number, or change, drop, repeat or insert some bytes of the header."""
    position = chance.randrange(min(len(content), 400) + 1)
    kind = chance.random()
    if kind < 0.35:
        changed = struct.pack("<Q", chance.choice(LENGTHS_TRIED))
        return content[:position] + changed + content[position + 8 :]
    if kind < 0.6:
        changed = struct.pack("<I", chance.choice(NUMBERS_TRIED))
        return content[:position] + changed + content[position + 4 :]
    if kind < 0.7:
        start = chance.choice((4, 8, 16))
        changed = struct.pack("<Q", chance.choice((0, 1, 2, 3, 10**6, 2**63)))
        return content[:start] + changed + content[start + 8 :]
    length = chance.choice((0, 1, 1, 2, 8, 24))
    middle = chance.choice(
        (
            b"",
            gguf_files.text(chance.choice(TEXTS)),
            content[position : position + length] * 2,
            bytes([chance.randrange(256)]),
        )
    )
    return content[:position] + middle + content[position + length :]


def accepts(file: Path) -> bool:
    """Whether Mezzotint reads the header; any error that is not one of its own passes through."""
    try:
        header = read_container(file)
    except CheckpointError:
        return False
    size = file.stat().st_size
    for info in header.tensors.values():
        assert 0 <= info.start <= info.end <= size or not info.nbytes
        assert info.read().nbytes == info.nbytes
    try:
        found = read_header(file)
        detect_format(found).format.contents(found)
    except CheckpointError:
        pass
    return True


def fuzz(file: Path, number: int, seed: int) -> Figures:
    """Try `number` files; raises AssertionError for the first that breaks a promise."""
    return fuzz_files(file, number, seed, mutate, accepts)


def main() -> None:
    run_from_command_line(__doc__, "mutated GGUF headers", mutate, accepts)


if __name__ == "__main__":
    main()
