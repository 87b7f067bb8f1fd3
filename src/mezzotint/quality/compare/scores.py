"""Scores of a candidate's images against the reference's, and their statistics over prompts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mezzotint.errors import BadRequest
from mezzotint.quality.compare.runs import GeneratedOutput
from mezzotint.quality.metrics.finite import finite, finite_values
from mezzotint.quality.metrics.image import (
    LAST_STEP_SUFFIX,
    LATENT_METRICS,
    METRICS,
    image_metrics,
    latent_metrics,
)

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """The scores of one image or video against the reference's.

    metrics      {metric: value}; for a video the mean over its frames
    worst        {metric: value} of the frame farthest from the reference
    worst_frame  frame with the largest FLIP error; 0 for an image
    steps        {latent metric: one value per step}
    """

    prompt: int
    seed: int
    metrics: Mapping[str, float | None]
    worst: Mapping[str, float | None]
    worst_frame: int
    steps: Mapping[str, Sequence[float | None]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def score(
    prompt: int,
    seed: int,
    reference: GeneratedOutput,
    candidate: GeneratedOutput,
    names: Sequence[str],
) -> Score:
    """Compute all latent metrics and the named image metrics. Non-finite values become None.

    Raises  BadRequest if latents or images differ in shape
    """
    _check_same_shape(reference, candidate)
    pairs = zip(reference.trajectory, candidate.trajectory, strict=True)
    steps = [latent_metrics(r, c) for r, c in pairs]
    frames = image_metrics(reference.frames, candidate.frames, names)
    last = {name + LAST_STEP_SUFFIX: value for name, value in steps[-1].items()}
    means = {name: float(np.mean(values)) for name, values in frames.items()}
    worst = {
        name: (min if METRICS[name].higher_is_better else max)(values)
        for name, values in frames.items()
    }
    return Score(
        prompt=prompt,
        seed=seed,
        metrics=finite_values(last | means),
        worst=finite_values(last | worst),
        worst_frame=int(np.argmax(frames["flip"])) if "flip" in frames else 0,
        steps={
            metric.name: finite([step[metric.name] for step in steps]) for metric in LATENT_METRICS
        },
    )


def _check_same_shape(reference: GeneratedOutput, candidate: GeneratedOutput) -> None:
    shapes = [
        (tuple(output.trajectory.shape), len(output.frames)) for output in (reference, candidate)
    ]
    if shapes[0] != shapes[1] or reference.frames[0].size != candidate.frames[0].size:
        raise BadRequest(
            f"the reference's latents are {shapes[0][0]}, and the candidate's {shapes[1][0]}",
            "compare only models of the same architecture.",
        )


def means(scores: Sequence[Score]) -> dict[str, float | None]:
    """Return {metric: mean over the images}; None if any image has no value."""
    return {name: _mean([score.metrics[name] for score in scores]) for name in scores[0].metrics}


def step_means(scores: Sequence[Score]) -> dict[str, list[float | None]]:
    """Return {latent metric: means over the images, one per step}."""
    return {
        name: [
            _mean(values) for values in zip(*(score.steps[name] for score in scores), strict=True)
        ]
        for name in scores[0].steps
    }


def intervals(scores: Sequence[Score]) -> dict[str, list[float] | None]:
    """Return {metric: 95 % confidence interval of its mean}, by bootstrap over prompts.

    Images of one prompt with several seeds are not independent, so they count as one value.
    """
    return {name: _interval(list(_by_prompt(scores, name))) for name in scores[0].metrics}


def worst_images(scores: Sequence[Score]) -> dict[str, dict[str, Any]]:
    """Return {metric: value, prompt and seed of the image farthest from the reference}."""
    images = {}
    for name, metric in METRICS.items():
        values = [
            (value, score) for score in scores if (value := score.worst.get(name)) is not None
        ]
        if values:
            worst = min if metric.higher_is_better else max
            value, image = worst(values, key=lambda pair: pair[0])
            images[name] = {"value": value, "prompt": image.prompt, "seed": image.seed}
    return images


def _by_prompt(scores: Sequence[Score], name: str) -> Iterator[float | None]:
    for prompt in dict.fromkeys(score.prompt for score in scores):
        yield _mean([score.metrics[name] for score in scores if score.prompt == prompt])


def _interval(values: list[float | None]) -> list[float] | None:
    if None in values or len(values) < 2:
        return None
    sample = np.random.default_rng(0).choice(
        np.array(values, dtype=float), size=(RESAMPLES, len(values))
    )
    tails = (1 - CONFIDENCE) / 2
    return [float(bound) for bound in np.quantile(sample.mean(axis=1), (tails, 1 - tails))]


def _mean(values: Sequence[float | None]) -> float | None:
    available = [value for value in values if value is not None]
    return float(np.mean(available)) if len(available) == len(values) else None
