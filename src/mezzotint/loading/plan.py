"""Plan a load: pair every stored tensor with a tensor of the model, before any is read."""

from dataclasses import dataclass

from torch import nn

from mezzotint.checkpoint import Checkpoint
from mezzotint.errors import require_known
from mezzotint.kernels import ACTIVATION_MODES, QUANTIZED_ACTIVATIONS


@dataclass(frozen=True)
class LoadPlan:
    """A checkpoint that matches a model, tensor by tensor. Nothing has been read."""

    checkpoint: Checkpoint
    activations: str


def plan(
    checkpoint: Checkpoint, model: nn.Module, activations: str = QUANTIZED_ACTIVATIONS
) -> LoadPlan:
    """Pair every stored tensor with a tensor of `model`, which may be on the meta device.

    Raises  BadRequest, MissingTensor, UnexpectedTensor, ShapeMismatch, UnknownFormat
    """
    require_known("activation mode", activations, ACTIVATION_MODES)
    if activations != QUANTIZED_ACTIVATIONS:
        checkpoint = checkpoint.without_input_scales()
    return LoadPlan(checkpoint.placed(model), activations)
