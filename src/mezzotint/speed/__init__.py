"""A loaded transformer made fast: layers joined, attention chosen, blocks compiled, a whole call one CUDA graph."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mezzotint.errors import BadRequest
from mezzotint.families import family_with
from mezzotint.kernels import Target
from mezzotint.kernels.graphs import Graphs
from mezzotint.nn import attention_is_exact, overrides
from mezzotint.speed.attention import choose, set_attention
from mezzotint.speed.attention_layers import replace_layers
from mezzotint.speed.fusing import Unfused, fuse
from mezzotint.speed.linking import compile_blocks, link
from mezzotint.speed.modulation import Ahead, Scheduler, work_ahead
from mezzotint.speed.refining import Refined, refine_once
from mezzotint.speed.rewriting import replace_rounded_products
from mezzotint.speed.serial import Serial
from mezzotint.speed.shapes import Announced

__all__ = ["SpeedReport", "Unfused", "speed_up"]


@dataclass(frozen=True)
class SpeedReport:
    """What was done to a model.

    attention      its name; `declined` says why not the others
    joined         how many products stand for several layers now, besides those that end in an activation
    apart          layers on the same input that could not be one product, and why
    rounded        products that an activation and the rounding behind it are part of, or follow in one pass
    outside        why activations that could be part of the product before them are not, or None
    one_pass       attention layers that normalise and rotate in one pass
    linked         blocks that leave their last addition to the next one
    refined        text that goes through blocks of its own does so once for each prompt
    modulated      modulation layers whose products are worked out for all steps at once
    graphed        each shape of input is recorded as a CUDA graph
    cache          where compiled kernels are kept
    """

    attention: str
    declined: Mapping[str, str]
    joined: int
    apart: tuple[Unfused, ...]
    rounded: int
    outside: str | None
    one_pass: int
    linked: int
    refined: bool
    modulated: int
    graphed: bool
    cache: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def speed_up(
    model: nn.Module, attention: str | None = None, plain: bool = False, scheduler: Scheduler | None = None
) -> SpeedReport:
    """Make a diffusers transformer as fast as it can be on the device that it is on, in place.

    Its first call compiles, for each shape of input; one that is not the first is announced in the log. What the
    compiler makes is kept in `cache_folder`, so that the next process starts in seconds. When its weights are others
    or elsewhere, its calls are recorded anew, which takes as long as two of them and is said in the log. Weights that
    are changed where they are go unnoticed, and so does what else a call depends on, such as the scale of a LoRA.
    Threads that call it take turns.

    attention   name of one, None for the fastest that changes no more than the order of sums
    plain       only choose the attention and compile the repeated blocks, as diffusers' documentation advises
    scheduler   of the model's pipeline; with it, modulation is worked out for all steps at once
    Raises      BadRequest if it was made fast already, Unsupported if the attention cannot run here
    """
    if isinstance(model.forward, Serial | Announced | Graphs | Refined | Ahead):
        raise BadRequest("this transformer was made fast already", "load it again for other settings.")
    target = Target.of(next(model.parameters()).device)
    whole = not plain and target.kind == "cuda"
    family = family_with(type(model).__name__, type(model).__name__)
    cache = cache_folder()
    chosen, declined = choose(target, attention)
    set_attention(model, chosen)
    rounded, outside = replace_rounded_products(model, target) if whole else (0, None)
    joined, apart = (0, []) if plain else fuse(model, family.together)
    one_pass = replace_layers(model, chosen) if whole else 0
    linked = link(model) if whole else 0
    compile_blocks(model, fullgraph=True, backend=_compiler(whole))
    model.forward = Announced(model)
    if whole:
        model.forward = Graphs(model.forward, lambda: (overrides(), attention_is_exact()), model)
    refined = whole and refine_once(model)
    modulated = 0
    if whole and scheduler is not None:
        modulated = work_ahead(model, scheduler, lambda function, layers: Graphs(function, overrides, layers))
    model.forward = Serial(model.forward)
    return SpeedReport(
        attention=chosen.name,
        declined=declined,
        joined=joined,
        apart=tuple(apart),
        rounded=rounded,
        outside=outside,
        one_pass=one_pass,
        linked=linked,
        refined=refined,
        modulated=modulated,
        graphed=whole,
        cache=str(cache),
    )


def _compiler(whole: bool) -> Any:
    """The backend of torch.compile; ours is imported where there is a GPU, because it takes seconds."""
    if not whole:
        return "inductor"
    from mezzotint.speed.compiling import tuned

    return tuned


def cache_folder() -> Path:
    """Where compiled kernels are kept: TORCHINDUCTOR_CACHE_DIR, or else mezzotint/inductor in the user's cache.

    Importing diffusers makes PyTorch write its own default, a temporary folder, into that variable: it is nobody's
    choice, and does not count.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if not folder or folder == os.path.abspath(default_cache_dir()):  # noqa: PTH100, as PyTorch writes it
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(home / "mezzotint/inductor")
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(folder) / "triton"))
    return Path(folder)
