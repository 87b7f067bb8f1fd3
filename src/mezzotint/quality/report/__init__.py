"""A comparison as files: report.html, report.json, report.md and sheet.png, and what the page shows beside it."""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mezzotint.escaping import printable
from mezzotint.pictures import save_png, sheet
from mezzotint.quality.comparison import Comparison
from mezzotint.quality.report import html, markdown
from mezzotint.saving import whole_file

SHEET_SIDE = 256
"""Longest side of a picture on the contact sheet, in pixels; small ones are enlarged by whole pixels up to it."""


def write_report(comparison: Comparison, output: str | Path) -> tuple[Path, ...]:
    """Write the four files into a folder, and `pictures/` beside them; return their paths, the page first."""
    output = Path(output)
    report = comparison.to_dict()
    texts = {
        "report.html": html.render(comparison, report, output),
        "report.json": json.dumps(report, indent=2, allow_nan=False) + "\n",
        "report.md": markdown.render(report),
    }
    for name, text in texts.items():
        with whole_file(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    save_png(contact_sheet(comparison), output / "sheet.png", {"prompt": "mezzotint compare"})
    return (*(output / name for name in texts), output / "sheet.png")


def contact_sheet(comparison: Comparison) -> Image.Image:
    """Rows are models, columns the prompts, first seed; of a video its first frame."""
    shots = [shot for (_, seed), shot in comparison.settings.shots().items() if seed == comparison.settings.seeds[0]]
    runs = [comparison.reference, *(candidate.run for candidate in comparison.candidates)]
    rows = [[_small(run.frames(shot)) for shot in shots] for run in runs]
    names, prompts = (
        [printable(text) for text in texts]
        for texts in (
            [run.candidate.name for run in runs],
            [shot.prompt for shot in shots],
        )
    )
    return sheet(rows, names, prompts, scale=max(1, SHEET_SIDE // max(rows[0][0].size)))


def _small(frames: Sequence[Image.Image]) -> Image.Image:
    picture = frames[0]
    longest = max(picture.size)
    if longest <= SHEET_SIDE:
        return picture
    width, height = (max(1, side * SHEET_SIDE // longest) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)
