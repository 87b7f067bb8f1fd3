"""The noise floor: how far the reference is from itself, and how far from a different picture of the same prompt.

The first is the reference with the attention computed by other kernels, whose last bits differ: no candidate can be
asked to be nearer. The second is the reference painted from another seed: at that distance nothing is left of the
picture but its prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mezzotint.quality.metrics import METRICS


@dataclass(frozen=True)
class Level:
    """One end of the floor: {metric: mean over the prompts}, and {latent metric: mean, one a step}."""

    metrics: Mapping[str, float | None]
    trajectory: Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class NoiseFloor:
    """The reference against itself with other kernels, and against itself with another seed."""

    other_kernels: Level
    other_seed: Level

    def drift(self, name: str, value: float | None) -> float | None:
        """Where a number lies between the two: 0 as near as the reference to itself, 1 as far as another seed.

        None where it cannot be said: a number is missing, or another seed is no farther than other kernels.
        """
        near, far = self.other_kernels.metrics.get(name), self.other_seed.metrics.get(name)
        if near is None or far is None or value is None:
            return None
        distance = METRICS[name].distance
        span = distance(far) - distance(near)
        return (distance(value) - distance(near)) / span if span > 0 else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
