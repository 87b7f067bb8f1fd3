"""Timing one case, and BF16 as a diffusers user would run it, on the same device in the same process."""

import gc
import platform
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from mezzotint._version import VERSION
from mezzotint.bench.random_model import BF16, Case, Steps, build, calibrate, example
from mezzotint.bench.shapes import shape_of
from mezzotint.costs import Memory, Spread, forget_peak, memory, now, resident_bytes
from mezzotint.families.building import meta_model
from mezzotint.nn import QuantLinear
from mezzotint.speed import speed_up
from mezzotint.speed.modulation import Ahead
from mezzotint.speed.refining import Refined

WARM_UP = 5
PROFILED = 3
KINDS = (
    ("fused elementwise", ("triton_",)),
    ("attention", ("flash", "fmha", "cudnn_generated", "sdpa")),
    ("norm and rotation", ("_norm_rope",)),
    ("4 bits to FP8", ("_expand",)),
    ("activation and rounding", ("_activation_round", "_round_into")),
    ("product with one row", ("_gemv",)),
    ("product", ("nvjet", "gemm", "cutlass", "cublas", "splitK", "product")),
)
"""Kinds of kernel, by marks in their names; the first that fits."""


@dataclass(frozen=True)
class Measured:
    """One way of running one model.

    call_ms       one call of the transformer, by CUDA events
    first_s       the first call, compiling included; `build_s` is making the model
    resident      {dtype: bytes} of all parameters and buffers
    memory        after the timed calls, with their peak
    tflops        TFLOP/s: the BF16 model's products and attention, done in the median time
    backends      {backend: how many products it runs}
    kernels_ms    {kind of kernel: GPU time in one call}
    modulation_ms what a painting spends once on the modulation of all its steps and on its text, besides its calls
    """

    case: Case
    call_ms: Spread
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
def measure(case: Case, device: torch.device, calls: int = 20, trace: Path | None = None) -> Measured:
    """Build the case on a GPU and time its calls after a warm-up.

    BF16 is what a user of diffusers has: repeated blocks compiled, cuDNN's attention, nothing else.

    trace    where to write a Chrome trace of a few calls
    """
    forget_peak(device)
    began = now(device)
    model, inputs = build(case, device), example(case, device)
    if case.scheme == BF16:
        report = speed_up(model, case.attention or "cudnn", plain=True)
    else:
        if not case.svdquant:  # such files have no static scales of inputs
            calibrate(model, inputs)
        report = speed_up(model, case.attention, scheduler=Steps.of(case))
    gc.collect()
    forget_peak(device)
    built = now(device)
    model(**inputs)
    compiled = now(device)
    forget_peak(device)
    spread = _timed(lambda: model(**inputs), calls, device)
    held = memory(device, "after the timed calls")
    measured = Measured(
        case=case,
        call_ms=spread,
        build_s=built - began,
        first_s=compiled - built,
        resident=resident_bytes([model]),
        memory=held,
        tflops=flops(case) / spread.median / 1e9,
        backends=_backends(model),
        attention=report.attention,
        kernels_ms=_kernels(lambda: model(**inputs), device, trace),
        modulation_ms=_once(model, inputs, device),
    )
    _forget(model, device)
    return measured


def _forget(model: nn.Module, device: torch.device) -> None:
    """Free what a case held, recorded graphs and compiled code included."""
    model.forward = type(model).forward.__get__(model)
    torch._dynamo.reset()
    model.to("meta")
    gc.collect()
    forget_peak(device)


def _timed(call: Callable[[], Any], calls: int, device: torch.device) -> Spread:
    for _ in range(WARM_UP):
        call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]  # type: ignore[no-untyped-call]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize(device)
    return Spread.of([before.elapsed_time(after) for before, after in pairwise(marks)])


def _once(model: nn.Module, inputs: Mapping[str, Any], device: torch.device) -> float:
    """Milliseconds of what is worked out once a painting, the median of some."""
    ahead: Any = getattr(model.forward, "function", None)
    if not isinstance(ahead, Ahead):
        return 0.0
    text: Any = ahead.function if isinstance(ahead.function, Refined) else None
    times = []
    for _ in range(PROFILED):
        ahead.tables.clear()
        began = now(device)
        ahead.prepare(**inputs)
        if text is not None:
            text.texts.forget()
            text.refined(text.signature.bind(**inputs))
        times.append((now(device) - began) * 1e3)
    return Spread.of(times).median


def _backends(model: nn.Module) -> dict[str, int]:
    return dict(Counter(layer.selection.backend.name for layer in model.modules() if isinstance(layer, QuantLinear)))


def flops(case: Case) -> float:
    """Floating-point operations of one call of the BF16 model, counted on the meta device."""
    shape = shape_of(case.model)
    meta = torch.device("meta")
    model = meta_model(shape.transformer, shape.config)
    for parameter in model.parameters():  # not model.to, which warns of what diffusers keeps in float32
        parameter.data = parameter.data.bfloat16()
    model = model.to(meta)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**example(case, meta))
    return float(counter.get_total_flops())


def _kernels(call: Callable[[], Any], device: torch.device, trace: Path | None) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            call()
        torch.cuda.synchronize(device)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    kinds: Counter[str] = Counter()
    for event in profiler.key_averages():
        kind = next((kind for kind, marks in KINDS if any(mark in event.key for mark in marks)), "other")
        kinds[kind] += event.self_device_time_total / 1e3 / PROFILED
    return {kind: round(ms, 3) for kind, ms in kinds.most_common()}


def machine(device: torch.device) -> dict[str, str]:
    """What a figure depends on besides the code."""
    return {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
        "mezzotint": VERSION,
    }
