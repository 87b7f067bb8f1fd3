"""One model's pictures held against the reference's, and what they come to over all prompts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mezzotint.errors import BadRequest
from mezzotint.quality.finite import finite, finite_values
from mezzotint.quality.metrics import LAST, LATENT_METRICS, METRICS, latent_metrics, picture_metrics
from mezzotint.quality.runs import Painted

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """One picture or video against the reference's.

    metrics   {metric: number}; a video's is the mean of its frames
    worst     {metric: number} of the frame farthest from the reference; equal to `metrics` for a picture
    worst_frame  the frame that FLIP finds farthest, 0 for a picture
    steps     {latent metric: one number a step}
    """

    prompt: int
    seed: int
    metrics: Mapping[str, float | None]
    worst: Mapping[str, float | None]
    worst_frame: int
    steps: Mapping[str, Sequence[float | None]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def score(prompt: int, seed: int, reference: Painted, candidate: Painted, names: Sequence[str]) -> Score:
    """Every metric of the latents, and those named of the pictures; None where a number is not finite.

    Raises  BadRequest if the two painted latents or pictures of different shapes
    """
    _check_alike(reference, candidate)
    pairs = zip(reference.trajectory, candidate.trajectory, strict=True)
    steps = [latent_metrics(r, c) for r, c in pairs]
    frames = picture_metrics(reference.frames, candidate.frames, names)
    last = {name + LAST: value for name, value in steps[-1].items()}
    means = {name: float(np.mean(values)) for name, values in frames.items()}
    worst = {name: (min if METRICS[name].higher else max)(values) for name, values in frames.items()}
    return Score(
        prompt=prompt,
        seed=seed,
        metrics=finite_values(last | means),
        worst=finite_values(last | worst),
        worst_frame=int(np.argmax(frames["flip"])) if "flip" in frames else 0,
        steps={metric.name: finite([step[metric.name] for step in steps]) for metric in LATENT_METRICS},
    )


def _check_alike(reference: Painted, candidate: Painted) -> None:
    shapes = [(tuple(painted.trajectory.shape), len(painted.frames)) for painted in (reference, candidate)]
    if shapes[0] != shapes[1] or reference.frames[0].size != candidate.frames[0].size:
        raise BadRequest(
            f"the reference's latents are {shapes[0][0]}, and the candidate's {shapes[1][0]}",
            "only models of one architecture can be compared, with the same settings.",
        )


def means(scores: Sequence[Score]) -> dict[str, float | None]:
    """{metric: mean over the pictures}; None if any picture has none."""
    return {name: _mean([score.metrics[name] for score in scores]) for name in scores[0].metrics}


def step_means(scores: Sequence[Score]) -> dict[str, list[float | None]]:
    """{latent metric: mean over the pictures, one a step}."""
    return {
        name: [_mean(values) for values in zip(*(score.steps[name] for score in scores), strict=True)]
        for name in scores[0].steps
    }


def intervals(scores: Sequence[Score]) -> dict[str, list[float] | None]:
    """{metric: the 95 % confidence interval of its mean}, by bootstrap over prompts, whose seeds are taken together."""
    return {name: _interval(list(_by_prompt(scores, name))) for name in scores[0].metrics}


def worst_pictures(scores: Sequence[Score]) -> dict[str, dict[str, Any]]:
    """{metric: the number, prompt and seed of the picture that is farthest from the reference}."""
    found = {}
    for name, metric in METRICS.items():
        known = [(value, one) for one in scores if (value := one.worst.get(name)) is not None]
        if known:
            value, one = (min if metric.higher else max)(known, key=lambda pair: pair[0])
            found[name] = {"value": value, "prompt": one.prompt, "seed": one.seed}
    return found


def _by_prompt(scores: Sequence[Score], name: str) -> Iterator[float | None]:
    for prompt in dict.fromkeys(score.prompt for score in scores):
        yield _mean([score.metrics[name] for score in scores if score.prompt == prompt])


def _interval(values: list[float | None]) -> list[float] | None:
    if None in values or len(values) < 2:
        return None
    sample = np.random.default_rng(0).choice(np.array(values, dtype=float), size=(RESAMPLES, len(values)))
    tails = (1 - CONFIDENCE) / 2
    return [float(bound) for bound in np.quantile(sample.mean(axis=1), (tails, 1 - tails))]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None
