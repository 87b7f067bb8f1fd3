"""What a tensor's values are like, in one pass over blocks of them: a tensor may be larger than the memory."""

import errno
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from mezzotint.formats.safetensors_file import TensorInfo

BLOCK_BYTES = 2**24
E4M3_MAGNITUDE = 0x7F


@dataclass
class Numbers:
    """Numbers that have been looked at.

    finite, lowest, highest   of all of them; lowest and highest of those that are finite
    count, zeros              how many there are, and how many are zero
    log_sum, log_squares      sums over log2 of the sizes of those that are neither zero nor infinite, `with_logs`
    """

    with_logs: bool = True
    count: int = 0
    zeros: int = 0
    finite: bool = True
    lowest: float = float("inf")
    highest: float = float("-inf")
    log_sum: float = 0.0
    log_squares: float = 0.0

    def add(self, values: Tensor) -> None:
        values = values.float().reshape(-1)
        self.count += len(values)
        if not bool(torch.isfinite(values).all()):
            self.finite = False
            values = values[torch.isfinite(values)]
        self.zeros += len(values) - int(values.count_nonzero())
        if len(values):
            low, high = values.aminmax()
            self.lowest, self.highest = min(self.lowest, float(low)), max(self.highest, float(high))
        if self.with_logs:
            sizes = values[values != 0].abs().double().log2()
            self.log_sum += float(sizes.sum())
            self.log_squares += float(sizes.square().sum())

    def add_zeros(self, count: int) -> None:
        self.count, self.zeros = self.count + count, self.zeros + count
        self.lowest, self.highest = min(self.lowest, 0.0), max(self.highest, 0.0)

    @property
    def are_zero(self) -> bool:
        """Whether there are some, and all of them are zero."""
        return 0 < self.count == self.zeros

    @property
    def middle(self) -> float:
        """Mean of log2 of the sizes that are not zero; 0 if there are none."""
        return self.log_sum / max(self._sized, 1)

    @property
    def spread(self) -> float:
        """Standard deviation of log2 of the sizes that are not zero."""
        return math.sqrt(max(self.log_squares / max(self._sized, 1) - self.middle**2, 0.0))

    @property
    def _sized(self) -> int:
        return self.count - self.zeros

    def examples(self) -> Tensor:
        """Return a few numbers that are finite, negative or zero where some of all are; one if there is only one."""
        if not self.count:
            return torch.empty(0)
        if not self.finite:
            return torch.full((min(self.count, 2),), torch.nan)
        ends = [self.lowest, self.highest, *([0.0] if self.zeros else [])]
        return torch.tensor(ends if self.count > 1 else ends[:1])


@dataclass
class Codes:
    """Bytes of quantized weights that have been looked at: how often each occurs, and the first of them."""

    counts: Tensor = field(default_factory=lambda: torch.zeros(256, dtype=torch.int64))
    first: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))

    def add(self, codes: Tensor) -> None:
        raw = codes.reshape(-1).view(torch.uint8)
        self.first = raw.clone() if not len(self.first) else self.first
        self.counts += torch.bincount(raw, minlength=256)

    def add_zeros(self, count: int) -> None:
        self.first = self.first if len(self.first) else torch.zeros(min(count, BLOCK_BYTES), dtype=torch.uint8)
        self.counts[0] += count

    @property
    def only(self) -> int | None:
        """The one byte that all of them are, None if they differ or there are fewer than two."""
        used = self.counts.nonzero().flatten().tolist()
        return used[0] if len(used) == 1 and int(self.counts.sum()) > 1 else None

    def holds_e4m3_nan(self) -> bool:
        return bool(self.counts[E4M3_MAGNITUDE] or self.counts[0x80 | E4M3_MAGNITUDE])


def look(info: TensorInfo, seen: Numbers | Codes) -> None:
    """Add all values of a tensor; holes of a file, which are zeros, are not read."""
    for piece, is_hole in _pieces(info):
        if is_hole:
            seen.add_zeros(piece.nbytes if isinstance(seen, Codes) else piece.shape[0])
        else:
            seen.add(piece.read())


def _pieces(info: TensorInfo) -> Iterator[tuple[TensorInfo, bool]]:
    """(a part of the tensor as a vector of whole values, whether it lies in a hole of the file)"""
    step = BLOCK_BYTES // info.dtype.itemsize * info.dtype.itemsize
    start = info.start
    while start < info.end:
        data = min(_next_data(info, start), info.end)
        data -= (data - info.start) % info.dtype.itemsize
        end = data if data > start else min(start + step, info.end)
        count = (end - start) // info.dtype.itemsize
        yield replace(info, shape=(count,), start=start, end=end), data > start
        start = end


def _next_data(info: TensorInfo, start: int) -> int:
    """The first byte from `start` on that is on the disk, `start` where the file system does not tell."""
    if not isinstance(info.file, Path):
        return start
    handle = os.open(info.file, os.O_RDONLY)
    try:
        return os.lseek(handle, start, os.SEEK_DATA)
    except OSError as error:
        return info.end if error.errno == errno.ENXIO else start
    finally:
        os.close(handle)
