"""Image files: PNG with embedded parameters, and contact sheets."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from mezzotint.saving import atomic_write

MARGIN = 8
LINE_HEIGHT, LINES = 17, 8
"""Pixels per line of a name, and maximum lines of a column's name."""
LABEL = 220
"""Maximum width of a row's name in pixels."""
DOTS = "…"
TEXT_COLOR = (30, 30, 30)
BACKGROUND_COLOR = (250, 248, 244)


def save_png(image: Image.Image, path: Path, parameters: dict[str, Any]) -> None:
    """Write a PNG with the parameters in two text chunks.

    The chunk `mezzotint` has them as JSON, `parameters` in the form that web interfaces read.
    """
    info = PngImagePlugin.PngInfo()
    info.add_text("mezzotint", json.dumps(parameters, sort_keys=True))
    info.add_text("parameters", _encodable(_webui_parameters(parameters)))
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def holds_parameters(file: Path) -> bool:
    """Return whether a file is a PNG with the parameters that `save_png` writes."""
    try:
        with Image.open(file, formats=["PNG"]) as image:
            return "mezzotint" in image.info
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    row_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
    scale: int = 1,
) -> Image.Image:
    """Arrange images in a grid, with row names at the left and column names above.

    Names are wrapped to LABEL or to the width of their column, and cut after LINES or at the height
    of their row.

    scale   enlarges each image by whole pixels
    """
    width, height = (side * scale for side in rows[0][0].size)
    font = ImageFont.load_default(size=13)
    labels = [_wrap(name, font, LABEL, max(1, height // LINE_HEIGHT)) for name in row_names]
    wrapped = [_wrap(name, font, width, LINES) for name in column_names]
    left = MARGIN + max(
        (int(font.getlength(line)) + MARGIN for lines in labels for line in lines), default=0
    )
    top = MARGIN + max((LINE_HEIGHT * len(lines) for lines in wrapped), default=0)
    columns = max(len(row) for row in rows)
    canvas = Image.new(
        "RGB",
        (left + columns * (width + MARGIN), top + len(rows) * (height + MARGIN)),
        BACKGROUND_COLOR,
    )
    draw = ImageDraw.Draw(canvas)
    for x, lines in enumerate(wrapped):
        _write(draw, (left + x * (width + MARGIN), MARGIN // 2), lines, font)
    for y, row in enumerate(rows):
        if row_names:
            middle = (height - LINE_HEIGHT * len(labels[y])) // 2
            _write(draw, (MARGIN, top + y * (height + MARGIN) + middle), labels[y], font)
        for x, image in enumerate(row):
            corner = (left + x * (width + MARGIN), top + y * (height + MARGIN))
            canvas.paste(image.resize((width, height), Image.Resampling.NEAREST), corner)
    return canvas


def _write(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[str], font: Any
) -> None:
    """Draw lines LINE_HEIGHT pixels apart; PIL's own distance depends on the font."""
    for number, line in enumerate(lines):
        draw.text((corner[0], corner[1] + number * LINE_HEIGHT), line, TEXT_COLOR, font)


def _wrap(text: str, font: Any, width: int, most: int) -> list[str]:
    """Wrap text into at most `most` lines of `width` pixels; end with dots if text is left over."""
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
    """Split a word into pieces of at most `width` pixels."""
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def _encodable(text: str) -> str:
    """Escape surrogates, which represent bytes of file names that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _webui_parameters(parameters: dict[str, Any]) -> str:
    """Format parameters as web interfaces read them: prompt, then `Steps: 20, Seed: 0, ...`."""
    rest = ", ".join(
        f"{key.replace('_', ' ').capitalize()}: {value}"
        for key, value in parameters.items()
        if key != "prompt"
    )
    return f"{parameters.get('prompt', '')}\n{rest}"
