"""The report of a comparison: report.html, report.json, report.md and sheet.png."""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mezzotint.generation.image_io import contact_sheet, save_png
from mezzotint.quality.compare import Comparison
from mezzotint.quality.report import html, markdown
from mezzotint.saving import atomic_write
from mezzotint.untrusted.escaping import printable

SHEET_SIDE = 256
"""Longest side of an image on the contact sheet, in pixels. Smaller images are enlarged by an
integer factor, so that every pixel stays visible."""


def write_report(comparison: Comparison, output: str | Path) -> tuple[Path, ...]:
    """Write the four files and a folder `images/` into `output`.

    Return the paths of the four files, report.html first.
    """
    output = Path(output)
    report = comparison.to_dict()
    texts = {
        "report.html": html.render(comparison, report, output),
        "report.json": json.dumps(report, indent=2, allow_nan=False) + "\n",
        "report.md": markdown.render(report),
    }
    for name, text in texts.items():
        with atomic_write(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    save_png(comparison_sheet(comparison), output / "sheet.png", {"prompt": "mezzotint compare"})
    return (*(output / name for name in texts), output / "sheet.png")


def comparison_sheet(comparison: Comparison) -> Image.Image:
    """Return a sheet with one row per model and one column per prompt, for the first seed.

    A video is represented by its first frame.
    """
    requests = [
        request
        for (_, seed), request in comparison.settings.requests().items()
        if seed == comparison.settings.seeds[0]
    ]
    runs = [comparison.reference, *(candidate.run for candidate in comparison.candidates)]
    rows = [[_thumbnail(run.frames(request)) for request in requests] for run in runs]
    names, prompts = (
        [printable(text) for text in texts]
        for texts in (
            [run.candidate.name for run in runs],
            [request.prompt for request in requests],
        )
    )
    return contact_sheet(rows, names, prompts, scale=max(1, SHEET_SIDE // max(rows[0][0].size)))


def _thumbnail(frames: Sequence[Image.Image]) -> Image.Image:
    image = frames[0]
    longest = max(image.size)
    if longest <= SHEET_SIDE:
        return image
    width, height = (max(1, side * SHEET_SIDE // longest) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)
