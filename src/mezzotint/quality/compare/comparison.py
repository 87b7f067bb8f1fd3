"""The result of a comparison, and its JSON form (report.json)."""

import datetime
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch

from mezzotint._version import VERSION
from mezzotint.kernels import Target
from mezzotint.quality.compare.cost import cost
from mezzotint.quality.compare.floor import NoiseFloor
from mezzotint.quality.compare.gate import Gate
from mezzotint.quality.compare.runs import Run
from mezzotint.quality.compare.scores import Score, intervals, means, step_means, worst_images
from mezzotint.quality.compare.settings import ComparisonSettings, Requests
from mezzotint.quality.metrics.image import METRICS
from mezzotint.quality.weights import WeightCheck

SCHEMA = "mezzotint.compare/2"
PASS, FAIL = "pass", "fail"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat("T", "seconds")


@dataclass(frozen=True)
class CandidateResult:
    """One candidate: its run, its scores and its verdict.

    drift     {metric: position of its mean on the noise floor}
    reasons   why the candidate fails; empty if it passes
    weights   None if the candidate and the reference have different tensors
    """

    run: Run
    gate: Gate
    scores: tuple[Score, ...]
    drift: Mapping[str, float | None]
    reasons: tuple[str, ...]
    weights: WeightCheck | None

    @property
    def name(self) -> str:
        """Return the candidate's name in the report."""
        return self.run.candidate.name

    @property
    def verdict(self) -> str:
        """Return PASS or FAIL."""
        return FAIL if self.reasons else PASS


@dataclass(frozen=True)
class Comparison:
    """The reference, the candidates and the differences between them.

    missing   {metric: why it could not be computed}
    """

    settings: ComparisonSettings
    reference: Run
    floor: NoiseFloor
    candidates: tuple[CandidateResult, ...]
    missing: Mapping[str, str]
    command: str
    created: str = field(default_factory=_now)

    @property
    def verdict(self) -> str:
        """Return PASS if every candidate passes, else FAIL."""
        return PASS if all(candidate.verdict == PASS for candidate in self.candidates) else FAIL

    def to_dict(self) -> dict[str, Any]:
        """Return the content of report.json; docs/proof.md describes its keys."""
        requests = self.settings.requests()
        return {
            "schema": SCHEMA,
            "created": self.created,
            "command": self.command,
            "verdict": self.verdict,
            "environment": _environment(self.settings.device),
            "settings": {
                "prompts": [prompt.to_dict() for prompt in self.settings.prompts],
                "seeds": list(self.settings.seeds),
                "sampling": vars(self.settings.sampling),
                "metrics": list(self.settings.metrics),
                "unavailable": dict(self.missing),
            },
            "reference": _model(self.reference, requests),
            "noise_floor": self.floor.to_dict(),
            "candidates": [_candidate(candidate, requests) for candidate in self.candidates],
        }


def _environment(device: torch.device) -> dict[str, Any]:
    return {
        "mezzotint": VERSION,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "device": f"{device} ({Target.of(device)})" if device.type != "cpu" else "cpu",
        "machine": platform.machine(),
    }


def _model(run: Run, requests: Requests) -> dict[str, Any]:
    return {
        **run.candidate.to_dict(),
        "identity": run.info["identity"],
        "load": run.info["load"],
        "claims": run.info["claims"],
        "resident": run.info["resident"],
        "problems": list(_problems(run, requests)),
        "cost": cost(run, list(requests.values())),
    }


def _problems(run: Run, requests: Requests) -> Iterator[dict[str, Any]]:
    for (prompt, seed), request in requests.items():
        if messages := run.problems(request):
            yield {"prompt": prompt, "seed": seed, "messages": list(messages)}


def _candidate(result: CandidateResult, requests: Requests) -> dict[str, Any]:
    scores = result.scores
    absent: dict[str, None] = dict.fromkeys(METRICS)
    return {
        "name": result.name,
        "verdict": result.verdict,
        "reasons": list(result.reasons),
        "gate": result.gate.to_dict(),
        "weights": None if result.weights is None else result.weights.to_dict(),
        "metrics": absent | means(scores),
        "intervals": intervals(scores),
        "drift": absent | dict(result.drift),
        "worst": worst_images(scores),
        "trajectory": step_means(scores),
        "images": [score.to_dict() for score in scores],
        **_model(result.run, requests),
    }
