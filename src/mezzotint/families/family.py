"""What a model family is."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.errors import UnknownFormat
from mezzotint.families.naming import Naming
from mezzotint.families.spelling import Shapes, Spelling, without_prefix

SIDE = 32
"""Pixels of which every family takes multiples: 16 of a latent's in Wan 2.2 TI2V-5B, two to a token."""


@dataclass(frozen=True)
class Sampling:
    """Settings of a generation.

    size                  height in pixels, and the width too unless `width` is given
    max_sequence_length   in text tokens, None for the pipeline's own default
    num_frames, fps       of a video; a picture has none
    """

    size: int
    steps: int
    guidance: float
    max_sequence_length: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: int | None = None

    def but(self, **given: int | float | None) -> "Sampling":
        """The same settings with those that are given and not None; a size given alone is a square's."""
        if given.get("size") is not None:
            given.setdefault("width", given["size"])
        return replace(self, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]

    def shaped_like(self, width: int, height: int) -> "Sampling":
        """The same area in the shape of a picture of this width and height, sides in multiples of SIDE."""
        scale = math.sqrt(self.size * (self.width or self.size) / (width * height)) / SIDE
        return self.but(width=max(1, round(width * scale)) * SIDE, size=max(1, round(height * scale)) * SIDE)


def picture_arguments(sampling: Sampling, _prompts: int) -> dict[str, Any]:
    """The settings as a diffusers pipeline for pictures takes them, whatever the number of prompts."""
    length = sampling.max_sequence_length
    return {
        "height": sampling.size,
        "width": sampling.width or sampling.size,
        "num_inference_steps": sampling.steps,
        "guidance_scale": sampling.guidance,
    } | ({} if length is None else {"max_sequence_length": length})


TEXT_TOKENS = 512
"""Length of the text in an example."""


def grid(height: int, width: int, axes: int) -> Tensor:
    """Positions of a picture's tokens, row by row: float32 [height * width, axes], row and column in axes 1 and 2."""
    ids = torch.zeros(height, width, axes)
    ids[..., 1], ids[..., 2] = torch.arange(height)[:, None], torch.arange(width)[None, :]
    return ids.flatten(0, 1)


def thousandths(timesteps: Tensor, dtype: torch.dtype) -> Tensor:
    """What most pipelines give their transformer for a scheduler's time steps, rounded as they round."""
    return timesteps.to(dtype) / 1000


@dataclass(frozen=True)
class TimeEmbedding:
    """What the modulation of every block is made of, and what that is made of in turn.

    module       name of the module that makes it, [rows, width]
    arguments    of the transformer's forward that it depends on, the time step first
    pipelines    (a scheduler's time steps, dtype of those that the transformer is given) -> what the family's pipelines
                 give it for them
    activation   what the modulation layers read it through
    unless       entry of config.json with which blocks read two embeddings
    """

    module: str
    arguments: tuple[str, ...]
    pipelines: Callable[[Tensor, torch.dtype], Tensor] = thousandths
    activation: Callable[[Tensor], Tensor] = F.silu
    unless: str | None = None


@dataclass(frozen=True)
class Joint:
    """A width that a transformer and another component of a pipeline share.

    entry       of the transformer's configuration, or several of which the first that is there counts
    component   the other one
    width       entry of its configuration
    times       how many of `width` make up one of `entry`
    """

    entry: str | tuple[str, ...]
    component: str
    width: str
    times: int = 1

    @property
    def entries(self) -> tuple[str, ...]:
        return (self.entry,) if isinstance(self.entry, str) else self.entry


@dataclass(frozen=True)
class Family:
    """Models that share a transformer class.

    transformer   name of the class in diffusers
    spellings     the ways of writing its tensors' names, most particular first
    sampling      (model_index.json, the transformer's config.json) -> what the model's makers recommend
    arguments     (settings, number of prompts) -> the settings as the family's pipelines take them
    example       (the transformer's config.json, settings, batch) -> arguments of one call of the transformer, random,
                  with as many tokens as the settings ask for
    config        {tensor of the diffusers model: its shape} -> the arguments of the class that those shapes follow from
    together      linears of a block that read the same input, by their names in the block
    modulation    ends of the names of linears that see one row a picture
    embedding     what those of the blocks are given, None where that is not known
    flags         {empty tensor that stands in a file for an entry of config.json: the entry, which is then true}
    joints        the widths in which the transformer has to fit the rest of a pipeline
    """

    name: str
    title: str
    transformer: str
    spellings: tuple[Spelling, ...]
    sampling: Callable[[Mapping[str, Any], Mapping[str, Any]], Sampling]
    example: Callable[[Mapping[str, Any], Sampling, int], dict[str, Any]]
    config: Callable[[Shapes], dict[str, Any]]
    together: tuple[tuple[str, ...], ...]
    modulation: tuple[str, ...] = ()
    embedding: TimeEmbedding | None = None
    joints: tuple[Joint, ...] = ()
    arguments: Callable[[Sampling, int], dict[str, Any]] = picture_arguments
    flags: Mapping[str, str] = field(default_factory=dict)

    def owns(self, shapes: Shapes) -> bool:
        """Whether a checkpoint with these tensors, {name: logical shape}, is one of the family."""
        bare = {short: shapes[name] for short, name in without_prefix(shapes).items()}
        return any(spelling.owns(bare) for spelling in self.spellings)

    def naming(self, shapes: Shapes) -> Naming:
        """Which stored tensors, {name: logical shape}, make up each tensor of the diffusers model.

        Raises  MissingTensor, ShapeMismatch, UnknownFormat
        """
        flags = self.flags_of(shapes)
        stored = {short: name for short, name in without_prefix(shapes).items() if name not in flags}
        bare = {short: shapes[name] for short, name in stored.items()}
        naming = self._spelling(bare).naming(bare)
        return {name: [replace(piece, source=stored[piece.source]) for piece in naming[name]] for name in naming}

    def dropped(self, shapes: Shapes) -> dict[str, str]:
        """{stored tensor: reason} of those that the diffusers model has no place for."""
        stored = without_prefix(shapes)
        drops = self._spelling({short: shapes[name] for short, name in stored.items()}).drops
        unused = {stored[short]: reason for short in stored for end, reason in drops.items() if short.endswith(end)}
        said = {
            name: f"an empty tensor that stands for {entry} of config.json"
            for name, entry in self.flags_of(shapes).items()
        }
        return unused | said

    def flags_of(self, shapes: Shapes) -> dict[str, str]:
        """{stored flag: the entry of config.json that it says is true}; flags are empty, and may have no prefix."""
        named = {name: self.flags.get(name.rpartition(".")[2]) for name, shape in shapes.items() if 0 in shape}
        return {name: entry for name, entry in named.items() if entry is not None}

    def _spelling(self, bare: Shapes) -> Spelling:
        found = next((spelling for spelling in self.spellings if spelling.owns(bare)), None)
        if found is None:
            raise UnknownFormat(f"its tensors are not those of {self.title}")
        return found
