"""Format measurements as a table, and warn about slow ones."""

from collections.abc import Iterator, Sequence
from typing import Any

from mezzotint.bench.measure import Measurement
from mezzotint.bench.random_model import BASELINE

HEAD = (
    "model",
    "scheme",
    "attention",
    "ms",
    "p10-p90",
    "x BF16",
    "weights GB",
    "peak GB",
    "TFLOP/s",
    "first call s",
)


def row(measurement: Measurement, baseline: Measurement | None) -> dict[str, Any]:
    """Return one line of benchmarks/results/*.jsonl."""
    ratio = (
        {}
        if baseline is None
        else {"speedup": round(baseline.call_ms.median / measurement.call_ms.median, 3)}
    )
    return measurement.to_dict() | ratio


def markdown(results: Sequence[Measurement]) -> str:
    """Return a Markdown table. Ratios are to the BF16 row of the same model, if there is one."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += [
        "| " + " | ".join(_cells(measurement, _baseline(measurement, results))) + " |"
        for measurement in results
    ]
    return "\n".join(lines)


def warnings(results: Sequence[Measurement]) -> Iterator[str]:
    """Yield a warning for each quantized model that is slower than BF16."""
    for measurement in results:
        baseline = _baseline(measurement, results)
        if baseline is not None and measurement.call_ms.median >= baseline.call_ms.median:
            yield (
                f"{measurement.case.model} {measurement.case.scheme} is SLOWER than BF16: "
                f"{measurement.call_ms.median:.1f} ms against {baseline.call_ms.median:.1f} ms"
            )


def _baseline(measurement: Measurement, results: Sequence[Measurement]) -> Measurement | None:
    if measurement.case.scheme == BASELINE:
        return None
    return next(
        (
            result
            for result in results
            if result.case.scheme == BASELINE and result.case.model == measurement.case.model
        ),
        None,
    )


def _cells(measurement: Measurement, baseline: Measurement | None) -> Iterator[str]:
    case, call_ms = measurement.case, measurement.call_ms
    yield case.model
    yield case.scheme + ("" if case.resident == "stored" else f", resident {case.resident}")
    yield measurement.attention
    yield f"{call_ms.median:.1f}"
    yield f"{call_ms.p10:.1f}-{call_ms.p90:.1f}"
    yield "" if baseline is None else f"{baseline.call_ms.median / call_ms.median:.2f}"
    yield f"{measurement.resident_gb:.2f}"
    yield f"{(measurement.memory.peak_allocated or 0) / 1e9:.2f}"
    yield f"{measurement.tflops:.0f}"
    yield f"{measurement.first_s:.1f}"
