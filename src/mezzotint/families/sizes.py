"""A model's sizes, from the shapes of its tensors under diffusers' names."""

import re

from mezzotint.errors import MissingTensor, ShapeMismatch
from mezzotint.families.naming_scheme import Shapes


def side(shapes: Shapes, names: str | tuple[str, ...], axis: int) -> int:
    """Return the length of one axis of a tensor; of several names, the first one present counts.

    Raises  MissingTensor; ShapeMismatch if the tensor has no such axis, or one of length 0
    """
    names = (names,) if isinstance(names, str) else names
    name = next((name for name in names if name in shapes), None)
    if name is None:
        raise MissingTensor(
            f"{names[0]} is not there, and the model needs it", "is the checkpoint complete?"
        )
    shape = shapes[name]
    if not -len(shape) <= axis < len(shape) or shape[axis] == 0:
        raise ShapeMismatch(
            f"{name} has shape {list(shape)}, expected a side of some length on axis {axis}"
        )
    return shape[axis]


def rows(shapes: Shapes, *names: str) -> int:
    """Return the output features of the first of these tensors that is present; see `side`."""
    return side(shapes, names, 0)


def columns(shapes: Shapes, *names: str) -> int:
    """Return the input features of the first of these tensors that is present; see `side`."""
    return side(shapes, names, 1)


def blocks(shapes: Shapes, name: str) -> int:
    """Return the number of blocks `name`.0, `name`.1, ...: the highest in the checkpoint plus 1."""
    numbers = (re.match(rf"{name}\.(\d{{1,6}})\.", key) for key in shapes)
    return max((int(number[1]) + 1 for number in numbers if number), default=0)


def holds_any(shapes: Shapes, prefix: str) -> bool:
    """Return whether the name of any tensor begins with `prefix`."""
    return any(name.startswith(prefix) for name in shapes)


def flux_blocks(shapes: Shapes) -> dict[str, int]:
    """Return the configuration entries that FLUX.1 and FLUX.2 share, from their tensors' shapes.

    Raises  MissingTensor, ShapeMismatch
    """
    width = rows(shapes, "x_embedder.weight")
    norms = (
        "transformer_blocks.0.attn.norm_q.weight",
        "single_transformer_blocks.0.attn.norm_q.weight",
    )
    head = rows(shapes, *norms)
    return {
        "in_channels": columns(shapes, "x_embedder.weight"),
        "out_channels": rows(shapes, "proj_out.weight"),
        "num_layers": blocks(shapes, "transformer_blocks"),
        "num_single_layers": blocks(shapes, "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": columns(shapes, "context_embedder.weight"),
    }
