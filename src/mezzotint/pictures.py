"""Pictures as files: PNG with the parameters inside, and sheets of many pictures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from mezzotint.saving import whole_file

MARGIN = 8
LINE = 17
INK = (30, 30, 30)
PAPER = (250, 248, 244)


def save_png(picture: Image.Image, path: Path, parameters: dict[str, Any]) -> None:
    """Write a PNG whose text chunks hold the parameters: `mezzotint` as JSON, `parameters` as others write it."""
    info = PngImagePlugin.PngInfo()
    info.add_text("mezzotint", json.dumps(parameters, sort_keys=True))
    info.add_text("parameters", _as_others_write(parameters))
    with whole_file(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info)


def holds_parameters(file: Path) -> bool:
    """Whether a file is a PNG with the parameters that `save_png` writes."""
    try:
        with Image.open(file, formats=["PNG"]) as picture:
            return "mezzotint" in picture.info
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def sheet(
    rows: Sequence[Sequence[Image.Image]],
    row_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
    scale: int = 1,
) -> Image.Image:
    """One picture of rows and columns, with names to the left and above; `scale` enlarges each by whole pixels."""
    width, height = (side * scale for side in rows[0][0].size)
    font = ImageFont.load_default(size=13)
    left = MARGIN + max((int(font.getlength(name)) + MARGIN for name in row_names), default=0)
    wrapped = [_wrap(name, font, width) for name in column_names]
    top = MARGIN + max((LINE * len(lines) for lines in wrapped), default=0)
    columns = max(len(row) for row in rows)
    canvas = Image.new("RGB", (left + columns * (width + MARGIN), top + len(rows) * (height + MARGIN)), PAPER)
    draw = ImageDraw.Draw(canvas)
    for x, lines in enumerate(wrapped):
        draw.multiline_text((left + x * (width + MARGIN), MARGIN // 2), "\n".join(lines), INK, font)
    for y, row in enumerate(rows):
        if row_names:
            draw.text((MARGIN, top + y * (height + MARGIN) + height // 2), row_names[y], INK, font, anchor="lm")
        for x, picture in enumerate(row):
            place = (left + x * (width + MARGIN), top + y * (height + MARGIN))
            canvas.paste(picture.resize((width, height), Image.Resampling.NEAREST), place)
    return canvas


def _wrap(text: str, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _as_others_write(parameters: dict[str, Any]) -> str:
    """The one-line form that web interfaces read: prompt, then `Steps: 20, Seed: 0, ...`."""
    rest = ", ".join(
        f"{key.replace('_', ' ').capitalize()}: {value}" for key, value in parameters.items() if key != "prompt"
    )
    return f"{parameters.get('prompt', '')}\n{rest}"
