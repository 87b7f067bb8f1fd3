"""A candidate's weights held against the reference's: one faulty layer of many may not show in pictures."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mezzotint.checkpoint import Checkpoint
from mezzotint.quality.candidate import Candidate
from mezzotint.quality.finite import finite_values
from mezzotint.quality.layers import PLAIN, Side
from mezzotint.quality.pair import opened, paired, same_tensors
from mezzotint.quality.signatures import relative_error
from mezzotint.schemes import FP8

USUAL: Mapping[str, float] = {PLAIN: 0.02, "bf16": 0.02, "fp8": 0.08, "int8": 0.08, "mxfp8": 0.08}
USUAL_IN_4_BITS = 0.25
"""Relative errors of a weight up to which rounding may be all: round-to-nearest gives 0.03 in 8 bits and 0.1 in 4."""


@dataclass(frozen=True)
class Wrong:
    """A layer or tensor that is farther from the reference's than rounding takes it; errors are relative."""

    module: str
    error: float
    usual: float


@dataclass(frozen=True)
class Weights:
    """How many layers and tensors were held against the reference's, how many are wrong, and the worst of those."""

    checked: int
    wrong: int
    worst: Wrong | None

    def to_dict(self) -> dict[str, Any]:
        return finite_values(asdict(self))


def weights_of(reference: Candidate, candidate: Candidate, device: torch.device) -> Weights | None:
    """Read both models layer by layer and compare; None if they are not made of the same tensors."""
    first, second = opened(reference), opened(candidate)
    if not same_tensors(first, second):
        return None
    pairs = [(side, name) for side in paired(first, second, "*") for name in side.names]
    found = [found for side, name in pairs if (found := _wrong(side, name, device)) is not None]
    return Weights(len(pairs), len(found), max(found, key=lambda wrong: wrong.error / wrong.usual, default=None))


def _wrong(side: Side, name: str, device: torch.device) -> Wrong | None:
    held, usual = side.suspicion(name, 0.0, device), usual_error(side, name)
    error = relative_error(held.weight, held.expected)
    return Wrong(side.module(name), error, usual) if error > usual else None


def usual_error(side: Side, name: str) -> float:
    """What rounding may do to a weight, in the coarser of the two models' schemes."""
    schemes = [_scheme(checkpoint, name) for checkpoint in (side.reference, side.candidate)]
    return max(USUAL.get(scheme, USUAL_IN_4_BITS) for scheme in schemes)


def _scheme(checkpoint: Checkpoint, name: str) -> str:
    module = name.removesuffix(".weight")
    if module not in checkpoint.linears:
        own = f"{module}.weight" if f"{module}.weight" in checkpoint.plain else name
        return FP8.name if checkpoint.is_cast(own) else PLAIN
    return checkpoint.scheme(module).name
