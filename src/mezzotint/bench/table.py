"""Measurements as a table, and what is to be said of them."""

from collections.abc import Iterator, Sequence
from typing import Any

from mezzotint.bench.measure import Measured
from mezzotint.bench.random_model import BF16

HEAD = ("model", "scheme", "attention", "ms", "p10-p90", "x BF16", "weights GB", "peak GB", "TFLOP/s", "first call s")


def row(measured: Measured, baseline: Measured | None) -> dict[str, Any]:
    """One line of benchmarks/results/*.jsonl."""
    ratio = {} if baseline is None else {"speedup": round(baseline.call_ms.median / measured.call_ms.median, 3)}
    return measured.to_dict() | ratio


def markdown(results: Sequence[Measured]) -> str:
    """A Markdown table; ratios are against the BF16 row of the same model, if there is one."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(_cells(measured, _baseline(measured, results))) + " |" for measured in results]
    return "\n".join(lines)


def warnings(results: Sequence[Measured]) -> Iterator[str]:
    """What must not be overlooked: a quantized model that is slower than BF16."""
    for measured in results:
        baseline = _baseline(measured, results)
        if baseline is not None and measured.call_ms.median >= baseline.call_ms.median:
            yield (
                f"{measured.case.model} {measured.case.scheme} is SLOWER than BF16: "
                f"{measured.call_ms.median:.1f} ms against {baseline.call_ms.median:.1f} ms"
            )


def _baseline(measured: Measured, results: Sequence[Measured]) -> Measured | None:
    if measured.case.scheme == BF16:
        return None
    return next((o for o in results if o.case.scheme == BF16 and o.case.model == measured.case.model), None)


def _cells(measured: Measured, baseline: Measured | None) -> Iterator[str]:
    case, spread = measured.case, measured.call_ms
    yield case.model
    yield case.scheme + ("" if case.resident == "stored" else f", resident {case.resident}")
    yield measured.attention
    yield f"{spread.median:.1f}"
    yield f"{spread.p10:.1f}-{spread.p90:.1f}"
    yield "" if baseline is None else f"{baseline.call_ms.median / spread.median:.2f}"
    yield f"{measured.resident_gb:.2f}"
    yield f"{(measured.memory.peak_allocated or 0) / 1e9:.2f}"
    yield f"{measured.tflops:.0f}"
    yield f"{measured.first_s:.1f}"
