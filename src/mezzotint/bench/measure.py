"""Time a model on a GPU: quantized, or in BF16 as a diffusers user would run it."""

import gc
import platform
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from mezzotint._version import VERSION
from mezzotint.bench.random_model import (
    BASELINE,
    BenchCase,
    FixedSchedule,
    build,
    calibrate,
    example,
)
from mezzotint.bench.shapes import published_model
from mezzotint.costs import (
    Memory,
    Percentiles,
    memory,
    reset_peak_memory,
    resident_bytes,
    synchronized_time,
)
from mezzotint.families.building import build_meta_model
from mezzotint.fast import FastTransformer, speed_up
from mezzotint.nn import QuantLinear

WARM_UP = 5
PROFILED_CALLS = 3
KERNEL_KINDS = (
    ("fused elementwise", ("triton_",)),
    ("attention", ("flash", "fmha", "cudnn_generated", "sdpa")),
    ("norm and rotation", ("_norm_rope",)),
    ("4 bits to FP8", ("_dequant_fp8",)),
    ("codes to BF16", ("_dequant_gguf", "_dequant_groups")),
    ("4 bits to INT8", ("_unpack_int8",)),
    ("rotation and rounding", ("quantize_int8",)),
    ("activation and rounding", ("_activation_quantize", "_quantize_into")),
    ("product with one row", ("_gemv",)),
    ("product", ("nvjet", "gemm", "cutlass", "cublas", "splitK")),
)
"""(kind, substrings of kernel names). The first kind that matches counts.

Kinds are keys in benchmarks/results/*.jsonl, so they keep their names.
"""


@dataclass(frozen=True)
class Measurement:
    """Time and memory of one model in one scheme. Field names are keys of
    benchmarks/results/*.jsonl.

    call_ms        one call of the transformer, by CUDA events
    build_s        building the model
    first_s        the first call, including compilation
    resident       {dtype: bytes} of all parameters and buffers
    memory         after the timed calls, with their peak
    tflops         TFLOP/s: GEMMs and attention of the BF16 model, divided by the median time
    backends       {backend: number of linears that it runs}
    kernels_ms     {kind of kernel: GPU time in one call}
    modulation_ms  time per generation, besides its calls, for modulation of all steps and for text
    """

    case: BenchCase
    call_ms: Percentiles
    build_s: float
    first_s: float
    resident: Mapping[str, int]
    memory: Memory
    tflops: float
    backends: Mapping[str, int]
    attention: str
    kernels_ms: Mapping[str, float]
    modulation_ms: float = 0.0

    @property
    def resident_gb(self) -> float:
        return sum(self.resident.values()) / 1e9

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def measure(
    case: BenchCase, device: torch.device, calls: int = 20, trace: Path | None = None
) -> Measurement:
    """Build a case on a GPU, warm up, and time calls.

    BF16 runs as diffusers documents it: compiled repeated blocks, cuDNN attention, nothing else.

    calls   number of timed calls
    trace   file for a Chrome trace of a few calls, or None
    """
    reset_peak_memory(device)
    started = synchronized_time(device)
    model, inputs = build(case, device), example(case, device)
    fast = _speed_up(case, model, inputs)
    gc.collect()
    reset_peak_memory(device)
    built = synchronized_time(device)
    model(**inputs)
    compiled = synchronized_time(device)
    reset_peak_memory(device)
    call_ms = _timed(lambda: model(**inputs), calls, device)
    memory_after = memory(device, "after the timed calls")
    measurement = Measurement(
        case=case,
        call_ms=call_ms,
        build_s=built - started,
        first_s=compiled - built,
        resident=resident_bytes([model]),
        memory=memory_after,
        tflops=flops(case) / call_ms.median / 1e9,
        backends=_backends(model),
        attention=fast.report.attention,
        kernels_ms=_kernels(lambda: model(**inputs), device, trace),
        modulation_ms=_precompute_ms(fast, inputs, device),
    )
    _release(fast, device)
    return measurement


def _speed_up(case: BenchCase, model: nn.Module, inputs: Mapping[str, Any]) -> FastTransformer:
    if case.scheme == BASELINE:
        return speed_up(model, case.attention or "cudnn", compile_only=True)
    if not case.svdquant:  # SVDQuant checkpoints have no static input scales
        calibrate(model, inputs)
    return speed_up(model, case.attention, scheduler=FixedSchedule.of(case))


def _release(fast: FastTransformer, device: torch.device) -> None:
    """Free the memory of a case, including recorded graphs and compiled code."""
    fast.restore().to("meta")
    torch._dynamo.reset()
    gc.collect()
    reset_peak_memory(device)


def _timed(call: Callable[[], Any], calls: int, device: torch.device) -> Percentiles:
    for _ in range(WARM_UP):
        call()
    new_event = partial(torch.cuda.Event, enable_timing=True)
    events = [new_event() for _ in range(calls + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize(device)
    return Percentiles.of([start.elapsed_time(end) for start, end in pairwise(events)])


def _precompute_ms(fast: FastTransformer, inputs: Mapping[str, Any], device: torch.device) -> float:
    """Return the median time in ms of what is computed once per generation."""
    if not fast.precomputes:
        return 0.0
    times = []
    for _ in range(PROFILED_CALLS):
        fast.reset_caches()
        started = synchronized_time(device)
        fast.precompute(**inputs)
        times.append((synchronized_time(device) - started) * 1e3)
    return Percentiles.of(times).median


def _backends(model: nn.Module) -> dict[str, int]:
    return dict(
        Counter(
            layer.selection.backend.name
            for layer in model.modules()
            if isinstance(layer, QuantLinear)
        )
    )


def flops(case: BenchCase) -> float:
    """Count the floating-point operations of one call of the BF16 model, on the meta device."""
    published = published_model(case.model)
    meta = torch.device("meta")
    model = build_meta_model(published.transformer, published.config)
    # Not model.to, which warns about modules that diffusers keeps in float32.
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model = model.to(meta)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**example(case, meta))
    return float(counter.get_total_flops())


def _kernels(call: Callable[[], Any], device: torch.device, trace: Path | None) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED_CALLS):
            call()
        torch.cuda.synchronize(device)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    kinds: Counter[str] = Counter()
    for event in profiler.key_averages():
        kind = next(
            (kind for kind, names in KERNEL_KINDS if any(name in event.key for name in names)),
            "other",
        )
        kinds[kind] += event.self_device_time_total / 1e3 / PROFILED_CALLS
    return {kind: round(ms, 3) for kind, ms in kinds.most_common()}


def machine(device: torch.device) -> dict[str, str]:
    """Return what a measurement depends on besides the code."""
    return {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
        "mezzotint": VERSION,
    }
