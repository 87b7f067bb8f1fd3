"""What a pass of `speed_up` is, and what it is given."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from mezzotint.families import Family, family_by_transformer
from mezzotint.families.recipe import Recipe
from mezzotint.fast.edits import ModelEdits
from mezzotint.kernels import Target


class Scheduler(Protocol):
    """The part of a diffusers scheduler that modulation depends on."""

    @property
    def timesteps(self) -> Tensor: ...


class Precomputation(Protocol):
    """Results that a fast model computes once and reuses in the following calls."""

    def reset(self) -> None:
        """Forget the results."""

    def precompute(self, *args: Any, **kwargs: Any) -> None:
        """Compute the results for a call of the transformer with these arguments."""


@dataclass
class PassContext:
    """What passes read and share.

    target           device that the model is on
    family           family of the model
    attention        name of the attention backend, or None for the default
    scheduler        scheduler of the model's pipeline, or None
    compile_only     True to select the attention and compile blocks, and nothing else
    edits            undo log of the model
    precomputations  results that passes cache between calls
    attention_backend  the AttentionBackend that the pass `attention` has chosen
    """

    target: Target
    family: Family
    attention: str | None = None
    scheduler: Scheduler | None = None
    compile_only: bool = False
    edits: ModelEdits = field(default_factory=ModelEdits)
    precomputations: list[Precomputation] = field(default_factory=list)
    attention_backend: object | None = None

    @property
    def optimizes_for_gpu(self) -> bool:
        """Return whether passes that need a GPU run."""
        return not self.compile_only and self.target.device_type == "cuda"


@dataclass(frozen=True)
class Applied:
    """A pass changed the model. `report` holds fields of SpeedReport."""

    report: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """A pass left the model as it was. `report` holds fields of SpeedReport."""

    reason: str
    report: Mapping[str, Any] = field(default_factory=dict)


class Pass:
    """One step of `speed_up`. A module of `mezzotint.fast.passes` declares one as PASS.

    name          key in SpeedReport.skipped
    after         passes that must run first; a comment at the attribute says why
    needs_gpu     True if the pass is skipped without a CUDA GPU
    compile_only  True if the pass also runs with `compile_only`
    """

    name: ClassVar[str]
    after: ClassVar[tuple[str, ...]] = ()
    needs_gpu: ClassVar[bool] = True
    compile_only: ClassVar[bool] = False

    def run(self, model: nn.Module, context: PassContext) -> Applied | Skipped:
        """Apply the pass, unless the context rules it out."""
        if context.compile_only and not self.compile_only:
            return Skipped("compile_only=True")
        if self.needs_gpu and context.target.device_type != "cuda":
            return Skipped(f"needs a CUDA GPU, this is {context.target}")
        return self.apply(model, context)

    def apply(self, model: nn.Module, context: PassContext) -> Applied | Skipped:
        """Change the model in place through `context.edits`, or say why not."""
        raise NotImplementedError


def repeated_block_classes(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the classes whose instances `compile_repeated_blocks` compiles."""
    # Every model of diffusers has the attribute, and nn.Module's type hints cannot know it.
    classes: tuple[str, ...] = tuple(getattr(model, "_repeated_blocks"))  # noqa: B009
    return classes


def recipe_of(model: nn.Module) -> Recipe:
    """Return the recipe of a transformer's family. Raises UnreadFormat if there is none."""
    name = type(model).__name__
    return family_by_transformer(name, name).fast
