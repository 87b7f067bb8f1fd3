"""What the page shows of each prompt and seed: the images that were compared, or the videos and their frames."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mezzotint.quality.comparison import Comparison, Judged
from mezzotint.quality.metrics import flip_picture, stack
from mezzotint.quality.prompts import Prompt
from mezzotint.quality.report.album import Album, Shown
from mezzotint.quality.runs import Run, Shot
from mezzotint.quality.scores import Score

STRIP = 8
"""Frames of a video that are shown in a row, the worst of each candidate besides."""
SMALL = 128
"""Up to this longest side an image is shown enlarged by whole pixels."""


@dataclass(frozen=True)
class Cell:
    """One candidate's image, or the worst frame of its video, and how far it is from the reference's."""

    name: str
    score: Score
    problems: tuple[str, ...]
    frame: int
    image: Shown
    error: Shown


@dataclass(frozen=True)
class Row:
    """One model's video: the player, where there can be one, and some of its frames."""

    name: str
    player: Shown | None
    frames: tuple[Shown, ...]


@dataclass(frozen=True)
class Entry:
    """One prompt and seed.

    source       the image that is edited, or None
    size         pixels, width and height
    references   {frame: the reference's image}, one for each frame that a cell shows
    numbers      of the frames in the rows' strips; no rows for an image
    """

    prompt: Prompt
    seed: int
    source: Shown | None
    size: tuple[int, int]
    references: dict[int, Shown]
    cells: tuple[Cell, ...]
    numbers: tuple[int, ...]
    rows: tuple[Row, ...]


def gallery(comparison: Comparison, album: Album) -> Iterator[Entry]:
    """Yield an entry for each prompt and seed, those with the largest FLIP (or else MAE) of any candidate first."""
    shots = list(comparison.settings.shots().items())
    for i in sorted(range(len(shots)), key=lambda i: -_badness(comparison, i)):
        (prompt, seed), shot = shots[i]
        reference = comparison.reference.frame_files(shot)
        cells = tuple(_cell(comparison.reference, judged, shot, i, album) for judged in comparison.candidates)
        worst = sorted({cell.frame for cell in cells})
        numbers = _strip(len(reference), worst)
        runs = [comparison.reference, *(judged.run for judged in comparison.candidates)]
        yield Entry(
            prompt=comparison.settings.prompts[prompt],
            seed=seed,
            source=album.drawing(shot.image.picture, f"source-{shot.image.sha256[:20]}") if shot.image else None,
            size=_size(reference[0]),
            references={frame: album.image(reference[frame]) for frame in worst},
            cells=cells,
            numbers=numbers,
            rows=tuple(_row(run, shot, numbers, album) for run in runs) if numbers else (),
        )


def is_small(comparison: Comparison) -> bool:
    """Return whether images are to be enlarged."""
    shot = next(iter(comparison.settings.shots().values()))
    return max(_size(comparison.reference.frame_files(shot)[0])) <= SMALL


def _cell(reference: Run, judged: Judged, shot: Shot, i: int, album: Album) -> Cell:
    one = judged.scores[i]
    files = [run.frame_files(shot)[one.worst_frame] for run in (reference, judged.run)]
    return Cell(
        name=judged.name,
        score=one,
        problems=judged.run.problems(shot),
        frame=one.worst_frame,
        image=album.image(files[1]),
        error=album.drawing(_error_map(*files), f"flip-{judged.run.folder.name}-{shot.key}"),
    )


def _row(run: Run, shot: Shot, numbers: Sequence[int], album: Album) -> Row:
    files = run.frame_files(shot)
    frames = tuple(album.thumbnail(files[number]) for number in numbers)
    player = album.video(run.frames(shot), run.sampling.fps or 16, f"{run.folder.name}-{shot.key}")
    return Row(run.candidate.name, player, frames)


def _strip(count: int, worst: Sequence[int]) -> tuple[int, ...]:
    """Numbers of frames, evenly spaced, and the worst; none for an image."""
    if count == 1:
        return ()
    spaced = np.linspace(0, count - 1, min(STRIP, count)).round().astype(int).tolist()
    return tuple(sorted({*spaced, *worst}))


def _error_map(reference: Path, candidate: Path) -> Image.Image:
    """The FLIP error of each pixel, in colors."""
    sides = []
    for file in (reference, candidate):
        with Image.open(file) as image:
            sides.append(stack([image])[0])
    return Image.fromarray(flip_picture(*sides))


def _size(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


def _badness(comparison: Comparison, i: int) -> float:
    scores = [judged.scores[i].worst for judged in comparison.candidates]
    found = [worst.get("flip", worst.get("mae")) for worst in scores]
    return max(np.inf if value is None else value for value in found)
