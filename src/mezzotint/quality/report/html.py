"""A comparison as one page: styles, script and drawings are inside it, and so are images while there is room."""

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from mezzotint.escaping import printable
from mezzotint.quality.comparison import Comparison
from mezzotint.quality.metrics import LAST, METRICS
from mezzotint.quality.report import plots, tables
from mezzotint.quality.report.album import Album
from mezzotint.quality.report.gallery import gallery, is_small
from mezzotint.quality.report.tables import Report

COLOURS = 6


def render(comparison: Comparison, report: Report, folder: Path) -> str:
    """Return the page; what it has no room for is written beside it, into `folder`."""
    environment = Environment(
        loader=FunctionLoader(_part),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalized,
    )
    kinds = {candidate["name"]: f"c{i % COLOURS}" for i, candidate in enumerate(report["candidates"])}
    return environment.get_template("report.html.j2").render(
        report=report,
        tables=tables,
        metrics=METRICS,
        names=[name for name in tables.shown(report) if name not in report["settings"]["unavailable"]],
        kinds=kinds,
        plots=list(_plots(report, kinds)),
        gallery=list(gallery(comparison, Album(folder))),
        small=is_small(comparison),
    )


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _finalized(value: object) -> object:
    """Return a template's value as `printable` has it; Jinja escapes HTML afterwards, unless it is Markup."""
    if isinstance(value, Markup):
        return Markup(printable(value, keep="\n"))  # noqa: S704  which adds nothing that HTML knows
    return printable(value) if isinstance(value, str) else value


def _plots(report: Report, kinds: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(caption, SVG)"""
    for name, caption in (("latent_cosine", "1 − cosine of the latents"), ("latent_rmse", "RMSE of the latents")):
        lines = {c["name"]: (kinds[c["name"]], _plotted(name, c["trajectory"][name])) for c in report["candidates"]}
        for level, label in (("other_kernels", "other kernels"), ("other_seed", "another seed")):
            values = report["noise_floor"][level]["trajectory"][name]
            lines[f"reference, {label}"] = (f"floor {level}", _plotted(name, values))
        yield f"{caption} after each step", plots.steps_plot(caption, lines)
    rows = {
        METRICS[name].title: {c["name"]: (kinds[c["name"]], c["drift"].get(name)) for c in report["candidates"]}
        for name in tables.shown(report)
        if any(c["drift"].get(name) is not None for c in report["candidates"])
    }
    yield "Drift: from the reference itself (0) to another seed's picture (1)", plots.drift_plot("Drift", rows)


def _plotted(name: str, values: Any) -> list[float | None]:
    metric = METRICS[name + LAST]
    return [None if value is None else metric.distance(value) for value in values]
