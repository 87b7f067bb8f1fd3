"""The tables of a report, as rows of text, from report.json alone; the page and the Markdown print the same."""

from collections.abc import Mapping, Sequence
from typing import Any

from mezzotint.errors import listed
from mezzotint.quality.floor import Level, NoiseFloor
from mezzotint.quality.gate import Limit
from mezzotint.quality.metrics import LAST, METRICS, Metric

HIDDEN = {f"latent_{name}{LAST}" for name in ("mae", "max_abs", "l2")}
"""Latent metrics that say the same as the cosine and the RMSE, and are left to report.json."""
Report = Mapping[str, Any]


def shown(report: Report) -> list[str]:
    """Names of the metrics that a table has a column for."""
    asked = {*report["settings"]["metrics"]} | {name for name in METRICS if name.endswith(LAST)}
    return [name for name in METRICS if name in asked and name not in HIDDEN]


def number(name: str, value: float | None) -> str:
    """A metric's value as it is printed; a dash where there is none."""
    return "–" if value is None else f"{value:.{METRICS[name].digits}f}"


def title(name: str) -> str:
    """A metric's column heading, with an arrow to where the reference is."""
    metric: Metric = METRICS[name]
    unit = f" {metric.unit}" if metric.unit else ""
    return f"{metric.title}{unit} {'↑' if metric.higher else '↓'}"


def interval(name: str, candidate: Mapping[str, Any]) -> str:
    """The confidence interval of a mean, or nothing."""
    bounds = candidate["intervals"].get(name)
    return "" if bounds is None else f"{number(name, bounds[0])}–{number(name, bounds[1])}"


def failing(candidate: Mapping[str, Any]) -> dict[str, str]:
    """{metric whose mean breaks a limit of the candidate's gate: why}."""
    return _broken(candidate, candidate["metrics"], candidate["drift"])


def failing_alone(report: Report, candidate: Mapping[str, Any], metrics: Mapping[str, float | None]) -> dict[str, str]:
    """{metric: why} of one picture, that would break a limit if it were the mean of all."""
    floor = NoiseFloor(**{end: Level(**level) for end, level in report["noise_floor"].items()})
    return _broken(candidate, metrics, {name: floor.drift(name, value) for name, value in metrics.items()})


def _broken(
    candidate: Mapping[str, Any], metrics: Mapping[str, float | None], drift: Mapping[str, float | None]
) -> dict[str, str]:
    limits = [Limit(**limit) for limit in candidate["gate"]["limits"]]
    reasons = {one.metric: one.broken_by(metrics.get(one.metric), drift.get(one.metric)) for one in reversed(limits)}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def too_many_bits(model: Mapping[str, Any]) -> bool:
    """Whether more bits a weight are resident than the model's gate allows; a reference has no gate."""
    most = model.get("gate", {}).get("max_bits_per_weight")
    return most is not None and model["resident"]["quantized_bits"] > most


def drift(name: str, candidate: Mapping[str, Any]) -> str:
    """The drift of a metric beside the largest that the gate allows, or nothing where it has no such limit."""
    most = [one["bound"] for one in candidate["gate"]["limits"] if (one["metric"], one["kind"]) == (name, "max_drift")]
    found = candidate["drift"].get(name)
    return f"drift {found:.2f} of {min(most):.2f}" if most and found is not None else ""


def floor_rows(report: Report) -> list[tuple[str, Mapping[str, float | None]]]:
    """The noise floor as rows beside the candidates': (name, {metric: value})."""
    floor = report["noise_floor"]
    return [
        ("reference, other kernels", floor["other_kernels"]["metrics"]),
        ("reference, another seed", floor["other_seed"]["metrics"]),
    ]


BITS = "bits / weight"
COST_TITLES = (
    "s / picture",
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
    """One model's numbers under COST_TITLES. The peak is PyTorch's, or the driver's where PyTorch has none."""
    cost = model["cost"]
    picture, expected = (one["cost"]["seconds_per_picture"]["median"] for one in (model, reference))
    painted = cost["memory"][1]
    peak = painted["peak_allocated"] if painted["peak_allocated"] is not None else painted["driver"]
    return [
        f"{picture:.2f}",
        f"{expected / picture:.2f}",
        f"{cost['seconds_per_step']['median']:.3f}",
        f"{cost['load_seconds']:.1f}",
        _mib(sum(model["resident"]["bytes"].values())),
        f"{model['resident']['bits_per_weight']:.1f}",
        _mib(cost["activation_bytes"]),
        _mib(peak),
        _mib(painted["driver"]),
    ]


def held(model: Mapping[str, Any]) -> str:
    """What a model's transformers hold, by dtype."""
    return ", ".join(f"{dtype} {_mib(size)} MiB" for dtype, size in model["resident"]["bytes"].items())


def driver_source(model: Mapping[str, Any]) -> str:
    """Who counted the driver's memory, and for whom."""
    return str(model["cost"]["memory"][1]["driver_source"])


def verdict_sentence(report: Report) -> str:
    """The verdict in one sentence."""
    names: Sequence[str] = [c["name"] for c in report["candidates"] if c["verdict"] == "pass"]
    total = len(report["candidates"])
    pictures = len(report["settings"]["prompts"]) * len(report["settings"]["seeds"])
    kept = (
        "every candidate keeps its gate"
        if len(names) == total
        else f"{len(names)} of {total} candidates keep their gate"
    )
    return f"{kept} over {pictures} picture{'s' if pictures > 1 else ''} each".capitalize()


def judged_by(candidate: Mapping[str, Any]) -> str:
    """The gate that a candidate was held to, and what came of its weights, which pass silently else."""
    skipped = [METRICS[name].title for name in candidate["gate"]["skipped"]]
    gate = f"gate {candidate['gate']['name']}{f' less its limit on {listed(skipped)}' if skipped else ''}"
    weights = candidate["weights"]
    if weights is None:
        return f"{gate}, weights not checked: the reference has other tensors"
    return f"{gate}, {weights['checked']} weights checked, {weights['wrong'] or 'none'} wrong"


def reference_problems(report: Report) -> str:
    """What the output guard saw in the reference's own pictures."""
    problems = report["reference"]["problems"]
    total = len(report["settings"]["prompts"]) * len(report["settings"]["seeds"])
    return f"{len(problems)} of {total} cannot be pictures, such as {problems[0]['seen'][0]}"


def _mib(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**20:,.1f}"
