"""What a comparison generates and measures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch

from mezzotint.errors import Unsupported, require_known
from mezzotint.families import Sampling
from mezzotint.quality.compare.gate import Gate
from mezzotint.quality.compare.runs import ImageRequest
from mezzotint.quality.metrics.image import IMAGE_METRICS, unavailable
from mezzotint.quality.prompts import Prompt

Requests = Mapping[tuple[int, int], ImageRequest]
"""{(index of the prompt, seed): image or video to generate}"""


class SamplingSettings(TypedDict, total=False):
    """Settings of `Sampling` that `compare` takes; one that is None is the model's default."""

    steps: int | None
    guidance: float | None
    guidance_2: float | None
    true_cfg_scale: float | None
    negative_prompt: str | None
    flow_shift: float | None


@dataclass(frozen=True)
class ComparisonSettings:
    """The settings of a comparison. Every model generates every prompt with every seed."""

    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    sampling: Sampling
    metrics: tuple[str, ...]
    device: torch.device

    def requests(self) -> Requests:
        """Return one request per prompt and seed."""
        return {
            (index, seed): request_for(prompt, seed)
            for index, prompt in enumerate(self.prompts)
            for seed in self.seeds
        }

    @property
    def other_seed(self) -> int:
        """Return the seed that only the noise floor uses."""
        return max(self.seeds) + 1


def request_for(prompt: Prompt, seed: int) -> ImageRequest:
    """Return the request for one prompt and seed."""
    return ImageRequest(prompt.text, seed, image=prompt.image)


def select_metrics(
    names: Sequence[str] | None, gates: Sequence[Gate], sampling: Sampling
) -> tuple[str, ...]:
    """Return the requested metrics and the metrics that the gates need, in the report's order.

    names   None selects all metrics
    Raises  BadRequest for an unknown metric, Unsupported for a requested metric that cannot be
            computed
    """
    supported = tuple(metric.name for metric in IMAGE_METRICS)
    for name in names or ():
        require_known("metric", name, supported)
    size = (sampling.width or sampling.height, sampling.height)
    for name, reason in unavailable(names or (), size).items():
        raise Unsupported(
            f"--metrics contains {name}, which {reason}",
            "leave it out; without --metrics, all available metrics are computed.",
        )
    required = {limit.metric for gate in gates for limit in gate.limits}
    if names is None:
        return supported
    return tuple(name for name in supported if name in {*names, *required})
