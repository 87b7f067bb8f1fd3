"""The noise floor: a lower and an upper bound for the distance between candidate and reference.

Lower bound: the reference with other attention kernels, whose last bits differ. No candidate can be
required to be nearer. Upper bound: the reference with another seed. At that distance a candidate
shares only the prompt with the reference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mezzotint.quality.metrics.image import METRICS


@dataclass(frozen=True)
class NoiseLevel:
    """One bound of the noise floor.

    metrics      {metric: mean over the prompts}
    trajectory   {latent metric: means over the prompts, one per step}
    """

    metrics: Mapping[str, float | None]
    trajectory: Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class NoiseFloor:
    """The reference compared with itself: with other attention kernels, and with another seed."""

    other_kernels: NoiseLevel
    other_seed: NoiseLevel

    def drift(self, name: str, value: float | None) -> float | None:
        """Return the position of a value between the bounds: 0 at the lower, 1 at the upper.

        Return None if a value is missing, or if the upper bound is not above the lower.
        """
        lower, upper = self.other_kernels.metrics.get(name), self.other_seed.metrics.get(name)
        if lower is None or upper is None or value is None:
            return None
        distance = METRICS[name].distance
        span = distance(upper) - distance(lower)
        return (distance(value) - distance(lower)) / span if span > 0 else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
