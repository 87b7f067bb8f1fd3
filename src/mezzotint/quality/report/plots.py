"""Drawings of a report as inline SVG, in the page's own colours."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 34
ROW, NAMES = 26, 160
SMALLEST = 1e-9

Lines = Mapping[str, tuple[str, Sequence[float | None]]]
"""{label: (CSS class, one value a step)}"""


def steps_plot(title: str, lines: Lines) -> str:
    """Values over the steps on a logarithmic axis; what is not above 0 is left out."""
    drawn = {
        name: [v if v is not None and v > SMALLEST else None for v in values] for name, (_, values) in lines.items()
    }
    known = [value for values in drawn.values() for value in values if value is not None]
    if not known:
        return ""
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    high += high == low
    count = max(len(values) for values in drawn.values())
    body = [*_decades(low, high), *_step_labels(count)]
    for name, values in drawn.items():
        points = [
            (_x(step, count), _y((math.log10(value) - low) / (high - low)))
            for step, value in enumerate(values)
            if value is not None
        ]
        kind = escape(lines[name][0])
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        body.append(f'<polyline class="line {kind}" points="{path}"><title>{escape(name)}</title></polyline>')
        body += [f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in points]
    return _svg(title, WIDTH, HEIGHT, body)


def drift_plot(title: str, rows: Mapping[str, Mapping[str, tuple[str, float | None]]]) -> str:
    """One row a metric, one dot a candidate, from 0 (the reference itself) to 1 (another seed); beyond is at the edge.

    rows   {metric: {candidate: (CSS class, drift)}}
    """
    left, width = NAMES, WIDTH - NAMES - 2 * RIGHT
    height = TOP + ROW * len(rows) + BOTTOM
    body = []
    for mark, label in ((0.0, "0"), (0.25, "0.25"), (0.5, "0.5"), (0.75, "0.75"), (1.0, "≥ 1")):
        x = left + mark * width
        body.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        body.append(f'<text class="tick" x="{x:.1f}" y="{height - BOTTOM + 16}" text-anchor="middle">{label}</text>')
    for row, (metric, dots) in enumerate(rows.items()):
        y = TOP + ROW * (row + 0.5)
        body.append(f'<text class="tick" x="{left - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(metric)}</text>')
        for name, (kind, drift) in dots.items():
            if drift is not None:
                x = left + min(max(drift, 0.0), 1.0) * width
                said = f"{name}: {drift:.2f}"
                body.append(
                    f'<circle class="dot {escape(kind)}" cx="{x:.1f}" cy="{y:.1f}" r="5">'
                    f"<title>{escape(said)}</title></circle>"
                )
    return _svg(title, WIDTH, height, body)


def _decades(low: int, high: int) -> Iterator[str]:
    for power in range(low, high + 1):
        y = _y((power - low) / (high - low))
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">1e{power}</text>'


def _step_labels(count: int) -> Iterator[str]:
    every = max(1, math.ceil(count / 10))
    for step in range(0, count, every):
        x = _x(step, count)
        yield f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step + 1}</text>'


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
