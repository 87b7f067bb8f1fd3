"""Plots of the report as inline SVG. The page's CSS classes give them their colors."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 34
ROW_HEIGHT, NAME_WIDTH = 26, 160
MIN_VALUE = 1e-9
"""Smallest value that the logarithmic axis shows."""

Lines = Mapping[str, tuple[str, Sequence[float | None]]]
"""{label: (CSS class, one value per step)}"""


def steps_plot(title: str, lines: Lines) -> str:
    """Plot values over the steps on a logarithmic axis. Values below MIN_VALUE are omitted."""
    drawn = {
        name: [v if v is not None and v > MIN_VALUE else None for v in values]
        for name, (_, values) in lines.items()
    }
    visible = [value for values in drawn.values() for value in values if value is not None]
    if not visible:
        return ""
    low, high = math.floor(math.log10(min(visible))), math.ceil(math.log10(max(visible)))
    high += high == low
    count = max(len(values) for values in drawn.values())
    body = [*_decades(low, high), *_step_labels(count)]
    for name, values in drawn.items():
        points = [
            (_x(step, count), _y((math.log10(value) - low) / (high - low)))
            for step, value in enumerate(values)
            if value is not None
        ]
        body += _line(name, escape(lines[name][0]), points)
    return _svg(title, WIDTH, HEIGHT, body)


def _line(name: str, css_class: str, points: Sequence[tuple[float, float]]) -> Iterator[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    yield f'<polyline class="line {css_class}" points="{path}">'
    yield f"<title>{escape(name)}</title></polyline>"
    for x, y in points:
        yield f'<circle class="dot {css_class}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>'


def drift_plot(title: str, rows: Mapping[str, Mapping[str, tuple[str, float | None]]]) -> str:
    """Plot the drift, 0 to 1, with one row per metric and one dot per candidate.

    Values outside 0..1 are drawn at the edge.

    rows   {metric: {candidate: (CSS class, drift)}}
    """
    width = WIDTH - NAME_WIDTH - 2 * RIGHT
    bottom = TOP + ROW_HEIGHT * len(rows)
    body = [*_drift_axis(width, bottom)]
    for row, (metric, dots) in enumerate(rows.items()):
        y = TOP + ROW_HEIGHT * (row + 0.5)
        body.append(_text(NAME_WIDTH - 10, y + 4, "end", escape(metric)))
        for name, (css_class, drift) in dots.items():
            if drift is not None:
                x = NAME_WIDTH + min(max(drift, 0.0), 1.0) * width
                body.append(
                    f'<circle class="dot {escape(css_class)}" cx="{x:.1f}" cy="{y:.1f}" r="5">'
                    f"<title>{escape(f'{name}: {drift:.2f}')}</title></circle>"
                )
    return _svg(title, WIDTH, bottom + BOTTOM, body)


def _drift_axis(width: float, bottom: float) -> Iterator[str]:
    for tick, label in ((0.0, "0"), (0.25, "0.25"), (0.5, "0.5"), (0.75, "0.75"), (1.0, "≥ 1")):
        x = NAME_WIDTH + tick * width
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>'
        yield _text(x, bottom + 16, "middle", label)


def _text(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _decades(low: int, high: int) -> Iterator[str]:
    for power in range(low, high + 1):
        y = _y((power - low) / (high - low))
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield _text(LEFT - 8, y + 4, "end", f"1e{power}")


def _step_labels(count: int) -> Iterator[str]:
    every = max(1, math.ceil(count / 10))
    for step in range(0, count, every):
        yield _text(_x(step, count), HEIGHT - BOTTOM + 18, "middle", str(step + 1))


def _x(step: int, count: int) -> float:
    inner = WIDTH - LEFT - RIGHT - 16
    return LEFT + 8 + (inner * step / (count - 1) if count > 1 else inner / 2)


def _y(share: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)


def _svg(title: str, width: int, height: float, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(body)}</svg>"
    )
