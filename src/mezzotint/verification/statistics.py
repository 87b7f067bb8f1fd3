"""Statistics of a tensor in one pass over blocks, because a tensor may be larger than memory."""

import errno
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from mezzotint.containers import TensorInfo

BLOCK_BYTES = 2**24
E4M3_MAGNITUDE = 0x7F
E5M2_INFINITY = 0x7C


@dataclass
class Numbers:
    """Statistics of numbers.

    count, zeros           number of values, and of zeros
    finite                 whether all values are finite
    lowest, highest        extreme finite values
    log_sum, log_squares   sums over log2 of nonzero finite magnitudes, if `with_logs`
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
        """Add values of any shape."""
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
            logs = values[values != 0].abs().double().log2()
            self.log_sum += float(logs.sum())
            self.log_squares += float(logs.square().sum())

    def add_zeros(self, count: int) -> None:
        """Add zeros without a tensor."""
        self.count, self.zeros = self.count + count, self.zeros + count
        self.lowest, self.highest = min(self.lowest, 0.0), max(self.highest, 0.0)

    @property
    def are_zero(self) -> bool:
        """Return whether there is at least one value and all values are zero."""
        return 0 < self.count == self.zeros

    @property
    def mean_log2(self) -> float:
        """Return the mean of log2 of nonzero magnitudes; 0 if there are none."""
        return self.log_sum / max(self._nonzeros, 1)

    @property
    def spread(self) -> float:
        """Return the standard deviation of log2 of nonzero magnitudes."""
        return math.sqrt(max(self.log_squares / max(self._nonzeros, 1) - self.mean_log2**2, 0.0))

    @property
    def _nonzeros(self) -> int:
        return self.count - self.zeros

    def examples(self) -> Tensor:
        """Return values for `Scheme.check_values`: non-finite, extreme and zero ones if present."""
        if not self.count:
            return torch.empty(0)
        if not self.finite:
            return torch.full((min(self.count, 2),), torch.nan)
        ends = [self.lowest, self.highest, *([0.0] if self.zeros else [])]
        return torch.tensor(ends if self.count > 1 else ends[:1])


@dataclass
class Codes:
    """Statistics of the code bytes of a quantized weight.

    counts   int64 [256], number of occurrences of each byte
    first    uint8, the first block of bytes
    dtype    of the codes that were added; None for bytes of a file
    """

    counts: Tensor = field(default_factory=lambda: torch.zeros(256, dtype=torch.int64))
    first: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    dtype: torch.dtype | None = None

    def add(self, codes: Tensor) -> None:
        """Add codes of any shape and dtype."""
        self.dtype = codes.dtype
        raw = codes.reshape(-1).view(torch.uint8)
        self.first = raw.clone() if not len(self.first) else self.first
        self.counts += torch.bincount(raw, minlength=256)

    def add_zeros(self, count: int) -> None:
        """Add zero bytes without a tensor."""
        if not len(self.first):
            self.first = torch.zeros(min(count, BLOCK_BYTES), dtype=torch.uint8)
        self.counts[0] += count

    @property
    def only(self) -> int | None:
        """Return the value of all bytes; None if they differ or there are fewer than two."""
        used = self.counts.nonzero().flatten().tolist()
        return used[0] if len(used) == 1 and int(self.counts.sum()) > 1 else None

    def holds_e4m3_nan(self) -> bool:
        """Return whether a byte is a NaN in E4M3."""
        return bool(self.counts[E4M3_MAGNITUDE] or self.counts[0x80 | E4M3_MAGNITUDE])

    def holds_e5m2_nan(self) -> bool:
        """Return whether a byte is infinite or a NaN in E5M2."""
        return bool(self.counts.reshape(2, 128)[:, E5M2_INFINITY:].any())


def add_tensor(info: TensorInfo, statistics: Numbers | Codes) -> None:
    """Add all values of a tensor. Holes of a sparse file count as zeros and are not read."""
    for block, is_hole in _blocks(info):
        if is_hole:
            is_codes = isinstance(statistics, Codes)
            statistics.add_zeros(block.nbytes if is_codes else block.shape[0])
        else:
            statistics.add(block.read())


def _blocks(info: TensorInfo) -> Iterator[tuple[TensorInfo, bool]]:
    """Yield (block of the tensor as a vector, whether the block is a hole of the file)."""
    dtype = info.storage_dtype
    step = BLOCK_BYTES // dtype.itemsize * dtype.itemsize
    start = info.start
    while start < info.end:
        data = min(_next_data(info, start), info.end)
        # A hole can end inside a value, which then belongs to the data.
        data -= (data - info.start) % dtype.itemsize
        end = data if data > start else min(start + step, info.end)
        count = (end - start) // dtype.itemsize
        yield replace(info, dtype=dtype, shape=(count,), start=start, end=end), data > start
        start = end


def _next_data(info: TensorInfo, start: int) -> int:
    """Return the offset of the next data after `start`; `start` if the file system cannot tell."""
    if info.file_range is None or not isinstance(info.file, Path):
        return start
    handle = os.open(info.file, os.O_RDONLY)
    try:
        return os.lseek(handle, start, os.SEEK_DATA)
    except OSError as error:
        return info.end if error.errno == errno.ENXIO else start
    finally:
        os.close(handle)
