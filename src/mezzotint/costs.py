"""Measure time with a synchronized device, and memory as counted by PyTorch and by the driver.

`compare` and `bench` share these functions, so that their numbers are comparable.
"""

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

PROCESS_STATUS = Path("/proc/self/status")
RESET_PEAK = Path("/proc/self/clear_refs")
"""Writing 5 to this file resets VmHWM to the current resident set; see proc_pid_clear_refs(5)."""


@dataclass(frozen=True)
class Percentiles:
    """Median, 10th and 90th percentile of `count` measurements."""

    median: float
    p10: float
    p90: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Percentiles":
        p10, median, p90 = (float(value) for value in np.percentile(values, (10, 50, 90)))
        return cls(median, p10, p90, len(values))


@dataclass(frozen=True)
class Memory:
    """Memory at one moment, in bytes.

    allocated, reserved             current values of PyTorch's allocator; None on a CPU
    peak_allocated, peak_reserved   their largest values since `reset_peak_memory`
    driver                          counted by the driver; on a CPU, the largest resident set since
                                    `reset_peak_memory`
    driver_source                   the counter, and the process or device that it counts
    """

    moment: str
    allocated: int | None
    reserved: int | None
    peak_allocated: int | None
    peak_reserved: int | None
    driver: int | None
    driver_source: str


@dataclass(frozen=True)
class StageTimes:
    """Durations of the stages of one generation, in seconds.

    encode   from the call to the transformer's first forward: text encoders, noise
    steps    each denoising step: transformer and scheduler
    decode   from the last step to the image
    """

    encode: float
    steps: tuple[float, ...]
    decode: float

    @property
    def total(self) -> float:
        return self.encode + sum(self.steps) + self.decode


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all submitted work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def synchronized_time(device: torch.device) -> float:
    """Return seconds on a monotonic clock, once the device has finished all submitted work."""
    synchronize(device)
    return time.perf_counter()


class StageTimer:
    """Record when the stages of one generation begin and end. Pass `on_step` to `generate`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.started = synchronized_time(device)
        self.step_times: list[float] = []
        self.ended: float | None = None

    def on_forward(self, _module: nn.Module, _arguments: Any) -> None:
        """Record the start of denoising at the first forward of a transformer."""
        if not self.step_times:
            self.step_times.append(synchronized_time(self.device))

    def on_step(self, _step: int, _latents: Any) -> None:
        self.step_times.append(synchronized_time(self.device))

    @property
    def stages(self) -> StageTimes:
        """Return the durations, after the generation has ended."""
        assert self.ended is not None  # noqa: S101
        steps = tuple(float(step) for step in np.diff(self.step_times))
        return StageTimes(
            self.step_times[0] - self.started, steps, self.ended - self.step_times[-1]
        )


@contextmanager
def time_stages(device: torch.device, transformers: Iterable[nn.Module]) -> Iterator[StageTimer]:
    """Time one generation by these transformers. `stages` of the timer is valid after the block.

    >>> with time_stages(device, [pipe.transformer]) as timer:
    ...     generate(pipe, ["a cat"], on_step=timer.on_step)
    >>> timer.stages.steps
    """
    clock = StageTimer(device)
    handles = [
        transformer.register_forward_pre_hook(clock.on_forward) for transformer in transformers
    ]
    try:
        yield clock
    finally:
        for handle in handles:
            handle.remove()
    clock.ended = synchronized_time(device)


def resident_bytes(modules: Iterable[nn.Module]) -> dict[str, int]:
    """{dtype: bytes} of the parameters and buffers of these modules, shared ones counted once."""
    sizes: Counter[str] = Counter()
    tensors = {
        id(tensor): tensor
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    }
    for tensor in tensors.values():
        sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    return dict(sorted(sizes.items()))


def reset_peak_memory(device: torch.device) -> None:
    """Free PyTorch's cached memory and reset the peak counters."""
    if device.type != "cpu":
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(device)
    elif RESET_PEAK.exists():
        RESET_PEAK.write_text("5")


def memory(device: torch.device, at: str) -> Memory:
    """Return current memory, and peak memory since `reset_peak_memory`.

    PyTorch's allocator returns no memory to the driver by itself. The driver's count after a run is
    therefore the run's peak, unless `reset_peak_memory` is called in between.
    """
    if device.type == "cpu":
        return Memory(at, None, None, None, None, *_resident_set())
    counters = torch.accelerator
    return Memory(
        at,
        counters.memory_allocated(device),
        counters.memory_reserved(device),
        counters.max_memory_allocated(device),
        counters.max_memory_reserved(device),
        *_driver_memory(device),
    )


def _resident_set() -> tuple[int | None, str]:
    """Return this process's largest resident set in bytes, if Linux reports it, and its source."""
    if not PROCESS_STATUS.exists():
        return None, "not reported by this system"
    line = next(
        line for line in PROCESS_STATUS.read_text().splitlines() if line.startswith("VmHWM:")
    )
    return int(line.split()[1]) * 1024, "Linux, resident set of this process"


def _driver_memory(device: torch.device) -> tuple[int | None, str]:
    """Return the memory of this process by NVML, or else of the whole device, and its source.

    In a container, NVML may not know the process.
    """
    if device.type == "cuda":
        used = _nvml_process_memory(device)
        if used is not None:
            return used, "NVML, this process"
    free, total = torch.accelerator.get_memory_info(device)
    return total - free, "the driver, whole device"


def _nvml_process_memory(device: torch.device) -> int | None:
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(
            f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        )
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return None
    return next(
        (process.usedGpuMemory for process in processes if process.pid == os.getpid()), None
    )
