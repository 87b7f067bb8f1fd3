"""A comparison as one HTML page with embedded styles, script, plots and images."""

from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from mezzotint.quality.compare import Comparison
from mezzotint.quality.metrics.image import LAST_STEP_SUFFIX, METRICS
from mezzotint.quality.report import plots, tables
from mezzotint.quality.report.album import Album
from mezzotint.quality.report.gallery import gallery, is_small
from mezzotint.quality.report.tables import Report
from mezzotint.untrusted.escaping import printable

COLORS = 6


def render(comparison: Comparison, report: Report, folder: Path) -> str:
    """Return the page. Media that are not embedded are written into `folder`, next to the page."""
    environment = Environment(
        loader=FunctionLoader(_read_template),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    kinds = {
        candidate["name"]: f"c{i % COLORS}" for i, candidate in enumerate(report["candidates"])
    }
    return environment.get_template("report.html.j2").render(
        report=report,
        tables=tables,
        metrics=METRICS,
        names=[
            name
            for name in tables.shown_metrics(report)
            if name not in report["settings"]["unavailable"]
        ],
        kinds=kinds,
        plots=list(_plots(report, kinds)),
        gallery=list(gallery(comparison, Album(folder))),
        small=is_small(comparison),
    )


def _read_template(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _finalize(value: object) -> object:
    """Replace control characters in a template value. Jinja escapes HTML afterwards."""
    if isinstance(value, Markup):
        # `printable` adds no character that HTML interprets, so the result is still safe markup.
        return Markup(printable(value, keep="\n"))  # noqa: S704
    return printable(value) if isinstance(value, str) else value


def _plots(report: Report, kinds: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield (caption, SVG)."""
    yield from _step_plots(report, kinds)
    rows = {
        METRICS[name].title: {
            c["name"]: (kinds[c["name"]], c["drift"].get(name)) for c in report["candidates"]
        }
        for name in tables.shown_metrics(report)
        if any(c["drift"].get(name) is not None for c in report["candidates"])
    }
    yield (
        "Drift: position between the noise floor's bounds, other kernels (0) and another seed (1)",
        plots.drift_plot("Drift", rows),
    )


def _step_plots(report: Report, kinds: dict[str, str]) -> Iterator[tuple[str, str]]:
    for name, caption in (
        ("latent_cosine", "1 − cosine of the latents"),
        ("latent_rmse", "RMSE of the latents"),
    ):
        lines = {
            c["name"]: (kinds[c["name"]], _distances(name, c["trajectory"][name]))
            for c in report["candidates"]
        }
        for level, label in (("other_kernels", "other kernels"), ("other_seed", "another seed")):
            values = report["noise_floor"][level]["trajectory"][name]
            lines[f"reference, {label}"] = (f"floor {level}", _distances(name, values))
        yield f"{caption} after each step", plots.steps_plot(caption, lines)


def _distances(name: str, values: Sequence[float | None]) -> list[float | None]:
    metric = METRICS[name + LAST_STEP_SUFFIX]
    return [None if value is None else metric.distance(value) for value in values]
