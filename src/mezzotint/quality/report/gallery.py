"""The gallery of the page: images, or videos and their frames, for each prompt and seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mezzotint.quality.compare import CandidateResult, Comparison
from mezzotint.quality.compare.runs import ImageRequest, Run
from mezzotint.quality.compare.scores import Score
from mezzotint.quality.metrics.image import flip_image, stack
from mezzotint.quality.prompts import Prompt
from mezzotint.quality.report.album import Album, Media

STRIP_FRAMES = 8
"""Evenly spaced frames in a video's strip, in addition to the worst frame of each candidate."""
SMALL_SIDE = 128
"""Longest side, in pixels, up to which images are enlarged by an integer factor."""


@dataclass(frozen=True)
class Cell:
    """One candidate's image, or the worst frame of its video, with its FLIP error map."""

    name: str
    score: Score
    problems: tuple[str, ...]
    frame: int
    image: Media
    error: Media


@dataclass(frozen=True)
class Row:
    """One model's video: the encoded video, if it can be encoded, and some frames."""

    name: str
    player: Media | None
    frames: tuple[Media, ...]


@dataclass(frozen=True)
class Entry:
    """One prompt and seed.

    source       the image to edit, or None
    size         width and height in pixels
    references   {frame: image of the reference}, for each frame of a cell
    numbers      frame numbers in the strips; empty for an image
    rows         one per model; empty for an image
    """

    prompt: Prompt
    seed: int
    source: Media | None
    size: tuple[int, int]
    references: dict[int, Media]
    cells: tuple[Cell, ...]
    numbers: tuple[int, ...]
    rows: tuple[Row, ...]


def gallery(comparison: Comparison, album: Album) -> Iterator[Entry]:
    """Yield an entry for each prompt and seed, in order of decreasing error of the worst candidate.

    The error is FLIP, or MAE if FLIP was not computed.
    """
    requests = list(comparison.settings.requests().items())
    runs = [comparison.reference, *(result.run for result in comparison.candidates)]
    for i in sorted(range(len(requests)), key=lambda i: -_sort_key(comparison, i)):
        (prompt, seed), request = requests[i]
        reference = comparison.reference.frame_files(request)
        cells = tuple(
            _cell(comparison.reference, result, request, i, album)
            for result in comparison.candidates
        )
        worst = sorted({cell.frame for cell in cells})
        numbers = _strip(len(reference), worst)
        yield Entry(
            prompt=comparison.settings.prompts[prompt],
            seed=seed,
            source=_source(request, album),
            size=_size(reference[0]),
            references={frame: album.image(reference[frame]) for frame in worst},
            cells=cells,
            numbers=numbers,
            rows=tuple(_row(run, request, numbers, album) for run in runs) if numbers else (),
        )


def is_small(comparison: Comparison) -> bool:
    """Return whether the page should enlarge images."""
    request = next(iter(comparison.settings.requests().values()))
    return max(_size(comparison.reference.frame_files(request)[0])) <= SMALL_SIDE


def _source(request: ImageRequest, album: Album) -> Media | None:
    if request.image is None:
        return None
    return album.computed_image(request.image.to_pil, f"source-{request.image.sha256[:20]}")


def _cell(
    reference: Run, result: CandidateResult, request: ImageRequest, i: int, album: Album
) -> Cell:
    score = result.scores[i]
    files = [run.frame_files(request)[score.worst_frame] for run in (reference, result.run)]
    name = f"flip-{result.run.folder.name}-{request.key}"
    return Cell(
        name=result.name,
        score=score,
        problems=result.run.problems(request),
        frame=score.worst_frame,
        image=album.image(files[1]),
        error=album.computed_image(_error_map(*files), name),
    )


def _row(run: Run, request: ImageRequest, numbers: Sequence[int], album: Album) -> Row:
    files = run.frame_files(request)
    frames = tuple(album.thumbnail(files[number]) for number in numbers)
    name = f"{run.folder.name}-{request.key}"
    player = album.video(run.frames(request), run.sampling.fps or 16, name)
    return Row(run.candidate.name, player, frames)


def _strip(count: int, worst: Sequence[int]) -> tuple[int, ...]:
    """Return evenly spaced frame numbers and the worst ones; nothing for an image."""
    if count == 1:
        return ()
    spaced = np.linspace(0, count - 1, min(STRIP_FRAMES, count)).round().astype(int).tolist()
    return tuple(sorted({*spaced, *worst}))


def _error_map(reference: Path, candidate: Path) -> Image.Image:
    """Return the FLIP error of each pixel as a color image."""
    images = []
    for file in (reference, candidate):
        with Image.open(file) as image:
            images.append(stack([image])[0])
    return Image.fromarray(flip_image(*images))


def _size(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


def _sort_key(comparison: Comparison, i: int) -> float:
    scores = [result.scores[i].worst for result in comparison.candidates]
    errors = [worst.get("flip", worst.get("mae")) for worst in scores]
    return max(np.inf if error is None else error for error in errors)
