"""What a model family is."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mezzotint.families.naming import Naming
from mezzotint.families.nunchaku_names import nunchaku_naming
from mezzotint.schemes import Shape


@dataclass(frozen=True)
class Sampling:
    """Settings of a generation; `max_sequence_length` is in text tokens, None for the pipeline's own default."""

    size: int
    steps: int
    guidance: float
    max_sequence_length: int | None = None

    def but(self, steps: int | None = None, size: int | None = None, guidance: float | None = None) -> "Sampling":
        """The same settings with those that are given and not None."""
        given = {"steps": steps, "size": size, "guidance": guidance}
        return replace(self, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Family:
    """Models that share a transformer class.

    transformer   name of the class in diffusers
    signature     diffusers' names of tensors that every checkpoint of the family has, and no other family's
    sampling      what the model's makers recommend
    """

    name: str
    title: str
    transformer: str
    signature: frozenset[str]
    sampling: Sampling

    def owns(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether a checkpoint with these tensors, {name: logical shape}, is one of the family."""
        naming = self.naming(shapes)
        return all(name in naming for name in self.signature)

    def naming(self, shapes: Mapping[str, Shape]) -> Naming:
        """Which stored tensors, {name: logical shape}, make up each tensor of the diffusers model."""
        return nunchaku_naming(self.name, shapes)
