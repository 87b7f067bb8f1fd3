"""Write GGUF files byte by byte, right or wrong, without gguf-py.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mezzotint.containers.gguf_types import NUMBER_OF
from mezzotint.schemes import schemes

ALIGNMENT = 32
TEXT, ARRAY = 8, 9
INT32, UINT32 = 5, 4
SMALL = 1024
"""Elements of tensors that converters leave in F32."""


@dataclass(frozen=True)
class Stored:
    """A tensor as the file has it; `sides` are in GGUF's order, the reverse of PyTorch's."""

    kind: int
    sides: Sequence[int]
    data: bytes


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, value: str | int | Sequence[int]) -> bytes:
    """Return a metadata entry: a text, a uint32, or an array of int32."""
    if isinstance(value, str):
        return text(key) + struct.pack("<I", TEXT) + text(value)
    if isinstance(value, int):
        return text(key) + struct.pack("<II", UINT32, value)
    numbers = struct.pack(f"<{len(value)}i", *value)
    return text(key) + struct.pack("<IIQ", ARRAY, INT32, len(value)) + numbers


def padded(data: bytes, alignment: int = ALIGNMENT) -> bytes:
    return data + bytes(-len(data) % alignment)


def content(
    tensors: Mapping[str, Stored],
    metadata: Mapping[str, str | int | Sequence[int]] | None = None,
    alignment: int = ALIGNMENT,
    version: int = 3,
) -> bytes:
    """Return a whole file."""
    entries = [entry(key, value) for key, value in (metadata or {}).items()]
    descriptions, data = b"", b""
    for name, stored in tensors.items():
        rank = len(stored.sides)
        descriptions += text(name) + struct.pack(f"<I{rank}Q", rank, *stored.sides)
        descriptions += struct.pack("<IQ", stored.kind, len(data))
        data += padded(stored.data, alignment)
    counts = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(entries))
    return padded(counts + b"".join(entries) + descriptions, alignment) + data


def numbers(values: Tensor) -> Stored:
    """Return a tensor of ordinary numbers."""
    raw = values.contiguous().reshape(-1).view(torch.uint8)
    return Stored(NUMBER_OF[str(values.dtype)], values.shape[::-1], bytes(raw.tolist()))


def blocks(values: Tensor, kind: str = "Q8_0") -> Stored:
    """Return a matrix in blocks, encoded by Mezzotint's scheme."""
    encode = schemes()[f"gguf_{kind.lower()}"].encode
    assert encode is not None
    codes = encode(values.float().reshape(-1, values.shape[-1]))["codes"]
    return Stored(NUMBER_OF[kind], values.shape[::-1], codes.numpy().tobytes())


def as_converted(tensors: Mapping[str, Tensor], kind: str = "Q8_0") -> dict[str, Stored]:
    """Return the tensors as ComfyUI-GGUF's converters leave them.

    Matrices in blocks of the model are quantized; 1-D and small tensors are F32, others BF16.
    """
    return {
        name: blocks(value, kind)
        if _is_quantized(name, value)
        else numbers(value.float() if value.ndim == 1 or value.numel() <= SMALL else value)
        for name, value in tensors.items()
    }


def _is_quantized(name: str, value: Tensor) -> bool:
    return (
        name.endswith(".weight")
        and ".0." in name
        and value.ndim == 2
        and value.shape[1] % 32 == 0
        and value.numel() > SMALL
    )


def write(
    file: Path,
    tensors: Mapping[str, Stored],
    metadata: Mapping[str, str | int | Sequence[int]] | None = None,
) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content(tensors, metadata))
    return file


def q4_k(rows: int, columns: int, chance: torch.Generator) -> Stored:
    """Return a matrix of random Q4_K blocks, whose scales are small and finite."""
    numbers_of_blocks = rows * columns // 256
    raw = torch.randint(0, 256, (numbers_of_blocks, 144), generator=chance, dtype=torch.uint8)
    scales = torch.rand(numbers_of_blocks, 2, generator=chance) * 9e-4 + 1e-4
    raw[:, :4] = scales.half().view(torch.uint8)
    return Stored(NUMBER_OF["Q4_K"], (columns, rows), raw.numpy().tobytes())
