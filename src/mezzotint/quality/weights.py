"""Check of a candidate's weights against the reference's.

Images may not show a fault in one of many layers, so `compare` checks every weight.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from mezzotint.checkpoint import Checkpoint
from mezzotint.quality.candidate import ModelSpec
from mezzotint.quality.layers import TransformerPair
from mezzotint.quality.metrics.finite import finite_values
from mezzotint.quality.pair import pair_transformers, plan_model, same_tensors
from mezzotint.schemes import BF16, FP8, Scheme
from mezzotint.tensor import relative_error


@dataclass(frozen=True)
class WrongWeight:
    """A layer or tensor with a larger error than quantization causes.

    error   relative error against the reference's weight
    usual   largest relative error that quantization causes
    """

    module: str
    error: float
    usual: float


@dataclass(frozen=True)
class WeightCheck:
    """The number of checked weights, the number of wrong ones, and the worst of them."""

    checked: int
    wrong: int
    worst: WrongWeight | None

    def to_dict(self) -> dict[str, Any]:
        return finite_values(asdict(self))


def check_weights(
    reference: ModelSpec, candidate: ModelSpec, device: torch.device
) -> WeightCheck | None:
    """Compare both models layer by layer. Return None if their tensors differ in name or shape."""
    first, second = plan_model(reference), plan_model(candidate)
    if not same_tensors(first, second):
        return None
    tasks = [(pair, name) for pair in pair_transformers(first, second, "*") for name in pair.names]
    wrong = [found for pair, name in tasks if (found := _wrong(pair, name, device)) is not None]
    worst = max(wrong, key=lambda weight: weight.error / weight.usual, default=None)
    return WeightCheck(len(tasks), len(wrong), worst)


def _wrong(pair: TransformerPair, name: str, device: torch.device) -> WrongWeight | None:
    tensor, usual = pair.wrong_tensor(name, 0.0, device), expected_error(pair, name)
    error = relative_error(tensor.weight, tensor.expected)
    return WrongWeight(pair.report_name(name), error, usual) if error > usual else None


def expected_error(pair: TransformerPair, name: str) -> float:
    """Return the largest usual relative error of a weight, for the coarser of both schemes."""
    schemes = [_scheme(checkpoint, name) for checkpoint in (pair.reference, pair.candidate)]
    return max(scheme.usual_error for scheme in schemes)


def _scheme(checkpoint: Checkpoint, name: str) -> Scheme:
    """Return a layer's scheme; BF16 or FP8 (a cast) for an unquantized tensor."""
    module = name.removesuffix(".weight")
    if module in checkpoint.linears:
        return checkpoint.scheme(module)
    tensor = f"{module}.weight" if f"{module}.weight" in checkpoint.plain else name
    return FP8 if checkpoint.is_fp8_cast(tensor) else BF16
