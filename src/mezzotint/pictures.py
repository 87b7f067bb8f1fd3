"""Pictures as files: PNG with the parameters inside, and sheets of many pictures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from mezzotint.saving import whole_file

MARGIN = 8
LINE, LINES = 17, 8
"""Pixels from one line of a name to the next, and how many lines a column's name may take."""
LABEL = 220
"""Pixels that the names of rows may take."""
DOTS = "…"
INK = (30, 30, 30)
PAPER = (250, 248, 244)


def save_png(picture: Image.Image, path: Path, parameters: dict[str, Any]) -> None:
    """Write a PNG whose text chunks hold the parameters: `mezzotint` as JSON, `parameters` as others write it."""
    info = PngImagePlugin.PngInfo()
    info.add_text("mezzotint", json.dumps(parameters, sort_keys=True))
    info.add_text("parameters", _encodable(_as_others_write(parameters)))
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
    """One picture of rows and columns, with names to the left and above; `scale` enlarges each by whole pixels.

    Names are wrapped to LABEL or the width of their column, and cut after LINES or the height of their row.
    """
    width, height = (side * scale for side in rows[0][0].size)
    font = ImageFont.load_default(size=13)
    labels = [_wrap(name, font, LABEL, max(1, height // LINE)) for name in row_names]
    wrapped = [_wrap(name, font, width, LINES) for name in column_names]
    left = MARGIN + max((int(font.getlength(line)) + MARGIN for lines in labels for line in lines), default=0)
    top = MARGIN + max((LINE * len(lines) for lines in wrapped), default=0)
    columns = max(len(row) for row in rows)
    canvas = Image.new("RGB", (left + columns * (width + MARGIN), top + len(rows) * (height + MARGIN)), PAPER)
    draw = ImageDraw.Draw(canvas)
    for x, lines in enumerate(wrapped):
        _write(draw, (left + x * (width + MARGIN), MARGIN // 2), lines, font)
    for y, row in enumerate(rows):
        if row_names:
            middle = (height - LINE * len(labels[y])) // 2
            _write(draw, (MARGIN, top + y * (height + MARGIN) + middle), labels[y], font)
        for x, picture in enumerate(row):
            place = (left + x * (width + MARGIN), top + y * (height + MARGIN))
            canvas.paste(picture.resize((width, height), Image.Resampling.NEAREST), place)
    return canvas


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], lines: Sequence[str], font: Any) -> None:
    """Write lines LINE pixels apart; PIL's own distance depends on the font."""
    for number, line in enumerate(lines):
        draw.text((place[0], place[1] + number * LINE), line, INK, font)


def _wrap(text: str, font: Any, width: int, most: int) -> list[str]:
    """Lines that are no wider than `width` pixels, at most so many; the last one ends in dots if there is more."""
    lines = [""]
    for piece in (piece for word in text.split() for piece in _pieces(word, font, width)):
        longer = f"{lines[-1]} {piece}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(piece)
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(last + DOTS) > width:
        last = last[:-1]
    return [*lines[: most - 1], last + DOTS]


def _pieces(word: str, font: Any, width: int) -> list[str]:
    """A word in pieces that are no wider than `width` pixels."""
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def _encodable(text: str) -> str:
    """The text with surrogates spelled out, which stand for bytes of file names that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _as_others_write(parameters: dict[str, Any]) -> str:
    """The one-line form that web interfaces read: prompt, then `Steps: 20, Seed: 0, ...`."""
    rest = ", ".join(
        f"{key.replace('_', ' ').capitalize()}: {value}" for key, value in parameters.items() if key != "prompt"
    )
    return f"{parameters.get('prompt', '')}\n{rest}"
