"""Tables of the report as rows of text, built from report.json, for HTML, Markdown and console."""

from collections.abc import Mapping
from typing import Any

from mezzotint.errors import join_names
from mezzotint.quality.compare.floor import NoiseFloor, NoiseLevel
from mezzotint.quality.compare.gate import Limit
from mezzotint.quality.metrics.image import LAST_STEP_SUFFIX, METRICS, Metric

HIDDEN = {f"latent_{name}{LAST_STEP_SUFFIX}" for name in ("mae", "max_abs", "l2")}
"""Latent metrics that are redundant with cosine and RMSE. They appear only in report.json."""
Report = Mapping[str, Any]


def shown_metrics(report: Report) -> list[str]:
    """Return the names of the metrics that have a column in a table."""
    computed = {*report["settings"]["metrics"]} | {
        name for name in METRICS if name.endswith(LAST_STEP_SUFFIX)
    }
    return [name for name in METRICS if name in computed and name not in HIDDEN]


def number(name: str, value: float | None) -> str:
    """Return a metric's value as text, or a dash for None."""
    return "–" if value is None else f"{value:.{METRICS[name].digits}f}"


def title(name: str) -> str:
    """Return a metric's column heading. An arrow shows the direction of better values."""
    metric: Metric = METRICS[name]
    unit = f" {metric.unit}" if metric.unit else ""
    return f"{metric.title}{unit} {'↑' if metric.higher_is_better else '↓'}"


def interval(name: str, candidate: Mapping[str, Any]) -> str:
    """Return the confidence interval of a mean as text, or an empty string."""
    bounds = candidate["intervals"].get(name)
    return "" if bounds is None else f"{number(name, bounds[0])}–{number(name, bounds[1])}"


def failing(candidate: Mapping[str, Any]) -> dict[str, str]:
    """Return {metric: reason} for means that exceed a limit of the candidate's gate."""
    return _failures(candidate, candidate["metrics"], candidate["drift"])


def failing_alone(
    report: Report, candidate: Mapping[str, Any], metrics: Mapping[str, float | None]
) -> dict[str, str]:
    """Return {metric: reason} for values of one image that would fail as the mean of all."""
    floor = NoiseFloor(**{end: NoiseLevel(**level) for end, level in report["noise_floor"].items()})
    return _failures(
        candidate, metrics, {name: floor.drift(name, value) for name, value in metrics.items()}
    )


def _failures(
    candidate: Mapping[str, Any],
    metrics: Mapping[str, float | None],
    drift: Mapping[str, float | None],
) -> dict[str, str]:
    limits = [Limit(**limit) for limit in candidate["gate"]["limits"]]
    reasons = {
        limit.metric: limit.failure(metrics.get(limit.metric), drift.get(limit.metric))
        for limit in reversed(limits)
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


def too_many_bits(model: Mapping[str, Any]) -> bool:
    """Return whether the resident bits per weight exceed the gate. A reference has no gate."""
    limit = model.get("gate", {}).get("max_bits_per_weight")
    return limit is not None and model["resident"]["quantized_bits"] > limit


def drift(name: str, candidate: Mapping[str, Any]) -> str:
    """Return the drift of a metric and its limit as text, or an empty string without a limit."""
    limits = [
        limit["value"]
        for limit in candidate["gate"]["limits"]
        if (limit["metric"], limit["kind"]) == (name, "max_drift")
    ]
    value = candidate["drift"].get(name)
    return f"drift {value:.2f} of {min(limits):.2f}" if limits and value is not None else ""


def floor_rows(report: Report) -> list[tuple[str, Mapping[str, float | None]]]:
    """Return the noise floor as (row title, {metric: value})."""
    floor = report["noise_floor"]
    return [
        ("reference, other kernels", floor["other_kernels"]["metrics"]),
        ("reference, another seed", floor["other_seed"]["metrics"]),
    ]


BITS = "bits / weight"
COST_TITLES = (
    "s / image",
    "speed-up",
    "s / step",
    "load s",
    "weights MiB",
    BITS,
    "activations MiB",
    "peak MiB",
    "driver MiB",
)


def cost_row(model: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    """Return one model's values for COST_TITLES.

    The peak is PyTorch's figure, or the driver's where PyTorch reports none.
    """
    cost = model["cost"]
    seconds, reference_seconds = (
        each["cost"]["seconds_per_image"]["median"] for each in (model, reference)
    )
    memory = cost["memory"][1]
    peak = memory["peak_allocated"] if memory["peak_allocated"] is not None else memory["driver"]
    return [
        f"{seconds:.2f}",
        f"{reference_seconds / seconds:.2f}",
        f"{cost['seconds_per_step']['median']:.3f}",
        f"{cost['load_seconds']:.1f}",
        _mib(sum(model["resident"]["bytes"].values())),
        f"{model['resident']['bits_per_weight']:.1f}",
        _mib(cost["activation_bytes"]),
        _mib(peak),
        _mib(memory["driver"]),
    ]


def resident_text(model: Mapping[str, Any]) -> str:
    """Return the resident size of a model's transformers by dtype, as text."""
    return ", ".join(
        f"{dtype} {_mib(size)} MiB" for dtype, size in model["resident"]["bytes"].items()
    )


def driver_source(model: Mapping[str, Any]) -> str:
    """Return the source and scope of the driver's memory figure."""
    return str(model["cost"]["memory"][1]["driver_source"])


def verdict_sentence(report: Report) -> str:
    """Return the verdict in one sentence."""
    passed = sum(candidate["verdict"] == "pass" for candidate in report["candidates"])
    total = len(report["candidates"])
    images = _image_count(report)
    meets = (
        "every candidate meets its gate"
        if passed == total
        else f"{passed} of {total} candidates meet their gate"
    )
    return f"{meets} over {images} image{'s' if images > 1 else ''} each".capitalize()


def gate_text(candidate: Mapping[str, Any]) -> str:
    """Return a candidate's gate and the result of its weight check, as text."""
    skipped = [METRICS[name].title for name in candidate["gate"]["skipped"]]
    without = f" without its limit on {join_names(skipped)}" if skipped else ""
    gate = f"gate {candidate['gate']['name']}{without}"
    weights = candidate["weights"]
    if weights is None:
        return f"{gate}, weights not checked: the reference has different tensors"
    return f"{gate}, {weights['checked']} weights checked, {weights['wrong'] or 'none'} wrong"


def reference_problems(report: Report) -> str:
    """Return the number of the reference's invalid images, with an example, as text."""
    problems = report["reference"]["problems"]
    example = problems[0]["messages"][0]
    total = _image_count(report)
    return f"{len(problems)} of {total} outputs are not valid images, for example {example}"


def _image_count(report: Report) -> int:
    return len(report["settings"]["prompts"]) * len(report["settings"]["seeds"])


def _mib(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**20:,.1f}"
