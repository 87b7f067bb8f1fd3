"""A comparison as one page that needs nothing else: styles, drawings and pictures are inside it."""

import base64
import io
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image

from mezzotint.escaping import printable
from mezzotint.quality.comparison import Comparison
from mezzotint.quality.metrics import LAST, METRICS, flip_picture, stack
from mezzotint.quality.report import plots, tables
from mezzotint.quality.report.tables import Report
from mezzotint.quality.scores import Score

LARGEST = 512
"""Longest side of a picture in the page; larger ones are shown smaller, as JPEG. The runs hold the originals."""
SMALL = 128
"""Up to this side a picture is shown enlarged by whole pixels."""
COLOURS = 6


def render(comparison: Comparison, report: Report) -> str:
    """The page."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_without_controls
    )
    template = environment.from_string(files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        tables=tables,
        metrics=METRICS,
        names=tables.shown(report),
        kinds={candidate["name"]: f"c{i % COLOURS}" for i, candidate in enumerate(report["candidates"])},
        plots=list(_plots(report)),
        gallery=list(_gallery(comparison)),
        small=_is_small(comparison),
    )


def _without_controls(value: Any) -> Any:
    """What the page prints: names from files and servers may hold characters that turn or hide text."""
    return printable(value, keep="\n") if type(value) is str else value


def _plots(report: Report) -> Iterator[tuple[str, str]]:
    """(caption, SVG)"""
    kinds = {candidate["name"]: f"c{i % COLOURS}" for i, candidate in enumerate(report["candidates"])}
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


def _is_small(comparison: Comparison) -> bool:
    shot = next(iter(comparison.settings.shots().values()))
    return max(comparison.reference.frames(shot)[0].size) <= SMALL


def _gallery(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """One entry a prompt and seed, those with the largest FLIP (or else MAE) of any candidate first."""
    by_shot = [
        {c.name: c.scores[i] for c in comparison.candidates} for i in range(len(comparison.candidates[0].scores))
    ]
    shots = list(comparison.settings.shots().items())
    order = sorted(range(len(shots)), key=lambda i: -max(_badness(one) for one in by_shot[i].values()))
    for i in order:
        (prompt, seed), shot = shots[i]
        reference = comparison.reference.frames(shot)
        cells: list[dict[str, Any]] = []
        for candidate in comparison.candidates:
            one = candidate.scores[i]
            frame = one.worst_frame
            r, c = reference[frame], candidate.run.frames(shot)[frame]
            heat = Image.fromarray(flip_picture(stack([r])[0], stack([c])[0]))
            cells.append(
                {
                    "name": candidate.name,
                    "score": one,
                    "problems": candidate.run.problems(shot),
                    "picture": data_uri(c),
                    "heat": data_uri(heat),
                    "frame": frame,
                }
            )
        yield {
            "prompt": comparison.settings.prompts[prompt],
            "seed": seed,
            "source": data_uri(shot.image.picture) if shot.image else None,
            "size": reference[0].size,
            "video": len(reference) > 1,
            "references": {frame: data_uri(reference[frame]) for frame in {cell["frame"] for cell in cells}},
            "cells": cells,
        }


def _badness(score: Score) -> float:
    worst = score.worst.get("flip", score.worst.get("mae"))
    return np.inf if worst is None else worst


def data_uri(picture: Image.Image) -> str:
    """A picture as it stands in the page: small ones exactly, larger ones reduced to LARGEST as JPEG."""
    buffer = io.BytesIO()
    longest = max(picture.size)
    if longest <= SMALL:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        width, height = (max(1, round(side * min(1.0, LARGEST / longest))) for side in picture.size)
        picture.resize((width, height), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
