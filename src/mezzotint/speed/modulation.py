"""Modulation of all blocks, worked out for all steps of a painting when the first one is seen.

Each block has layers that read one row a picture, made of the time step and, in some families, of guidance and pooled
text, but never of the latents. One row costs as much as reading the matrix does, and so do eight.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mezzotint.families import family_with
from mezzotint.families.family import TimeEmbedding
from mezzotint.kernels.products import FEW
from mezzotint.kernels.readback import read_back
from mezzotint.kernels.weights import Weights
from mezzotint.nn import overrides
from mezzotint.speed.remembered import KEPT, Remembered

Products = Callable[[Tensor], Tensor]
"""Of x [steps, rows, in]: [steps, numbers]."""

Record = Callable[[Products, nn.Module], Products]
"""What makes a function of a GPU's tensors and of a module's weights launch its kernels at once."""

LONGEST = 64
"""Steps that are worked out at once: 135 MB for FLUX.1, 283 MB for Qwen-Image."""


class Scheduler(Protocol):
    """What is to be known of a diffusers scheduler."""

    @property
    def timesteps(self) -> Tensor: ...


class Modulation(nn.Module):
    """A modulation layer whose product has been worked out.

    row   [rows, out], what the layer makes of the step that is being computed; always the same memory for as many
          rows, so that a recorded call finds it there
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, self.out_features = layer, layer.out_features
        self.row = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, in], whose numbers are not read: [rows, out].

        Where Qwen-Image-Edit embeds two time steps, the text reads the first half of the rows.
        """
        return self.row[: x.shape[0]]


@dataclass(frozen=True)
class Table:
    """What all layers make of some time steps.

    steps      [steps, *of a time step]
    rows       [steps, numbers], one layer after another
    schedule   the scheduler's time steps, if these are what follows in them, as far as is known
    """

    steps: Tensor
    rows: Tensor
    schedule: Tensor | None

    def hits(self, others: Tensor) -> Tensor:
        """Which of the steps each of others is, bool [steps, others]."""
        same = self.steps[:, None] == others
        return same.reshape(*same.shape[:2], -1).all(2)

    def has(self, others: Tensor) -> bool:
        """Whether others are all among the steps; waits for the GPU."""
        return bool(self.hits(others).any(0).all())

    def with_step(self, step: Tensor, row: Tensor) -> "Table":
        """This and a step that is in no schedule; of those that are known for longest, only so many are kept."""
        steps, rows = torch.cat((self.steps, step)), torch.cat((self.rows, row))
        return Table(steps[-2 * LONGEST :], rows[-2 * LONGEST :], None)


class Ahead:
    """A transformer's forward, before which every modulation layer is given its row of the step.

    Weights are taken not to change where they are. When they are others or elsewhere, all is worked out anew.

    scheduler   knows the steps that are to come; what it does not know is worked out when it is seen
    """

    def __init__(
        self,
        model: nn.Module,
        embedding: TimeEmbedding,
        layers: Sequence[Modulation],
        scheduler: Scheduler,
        record: Record,
    ) -> None:
        self.function = model.forward
        self.own = MethodType(type(model).forward, model)
        self.__signature__ = self.signature = inspect.signature(self.own)
        self.embedder = model.get_submodule(embedding.module)
        self.embedding, self.layers, self.scheduler = embedding, layers, scheduler
        self.products = record(self._products, nn.ModuleList(layers))
        self.weights = Weights(nn.ModuleList([self.embedder, *layers]))
        self.widths = [layer.out_features for layer in layers]
        self.tables: dict[Any, Table] = {}
        self.conditions = {name: Remembered() for name in embedding.arguments[1:]}
        self.memory: dict[Any, Tensor] = {}
        self.given: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the transformer's forward.

        Only the GPU knows which step it is. It looks up the row and goes on, and if it says in the meantime that there
        was none, the row is worked out and the call made again.
        """
        found = self.prepare(*args, **kwargs)
        result = self.function(*args, **kwargs)
        if not found():
            key, table = self.tables.popitem()
            self.tables[key] = replace(table, schedule=None)
            self.prepare(*args, **kwargs)
            result = self.function(*args, **kwargs)
        return result

    @torch.no_grad()
    def prepare(self, *args: Any, **kwargs: Any) -> Callable[[], bool]:
        """Give every layer its row for a call with these arguments; returns what waits for whether there was one."""
        if self.weights.changed():
            self.tables.clear()
            self.given = None
        call = self.signature.bind(*args, **kwargs)
        timestep = call.arguments[self.embedding.arguments[0]]
        key = self._key(call, timestep)
        table = self.tables[key] = self._table(self.tables.pop(key, None), call, timestep)
        if len(self.tables) > KEPT:
            del self.tables[next(iter(self.tables))]
        hits = table.hits(timestep[None])
        self._give(table.rows.index_select(0, hits.int().argmax(0))[0])
        return read_back(hits.any())

    def _key(self, call: inspect.BoundArguments, timestep: Tensor) -> Any:
        """All that rows depend on besides the time step's values."""
        leaves = pytree.tree_leaves(call.arguments)
        latents = next(leaf for leaf in leaves if isinstance(leaf, Tensor))
        settings = tuple(leaf for leaf in leaves if leaf is not None and not isinstance(leaf, Tensor))
        conditions = tuple(self._condition(name, call.arguments.get(name)) for name in self.conditions)
        return overrides(), _kind(timestep), latents.dtype, latents.device, settings, conditions

    def _condition(self, name: str, given: Tensor | None) -> Any:
        """What rows depend on of one argument; its numbers are read from the GPU when they may be others."""
        if given is None:
            return None
        return *_kind(given), self.conditions[name].of([given], None, lambda: _values(given))

    def _table(self, before: Table | None, call: inspect.BoundArguments, timestep: Tensor) -> Table:
        """The one from before, unless the scheduler has other steps since then, or the call keeps off from them."""
        if before is not None and before.schedule is self.scheduler.timesteps:
            return before
        steps, schedule = self._steps(timestep)
        if before is not None and before.has(steps):
            return replace(before, schedule=schedule)
        rows = self._rows(call, steps)
        if before is None or schedule is not None:
            return Table(steps, rows, schedule)
        return before.with_step(steps, rows)

    def _rows(self, call: inspect.BoundArguments, steps: Tensor) -> Tensor:
        """What all layers make of steps, [steps, numbers]."""
        embedded = by_few(lambda some: self._embedded(call, some), steps)
        return by_few(self.products, self.embedding.activation(embedded))

    def _products(self, x: Tensor) -> Tensor:
        """What all layers make of x [steps, rows, in], [steps, numbers]."""
        made = [layer.layer(x.flatten(0, 1)) for layer in self.layers]
        return torch.cat([product.reshape(len(x), -1) for product in made], 1)

    def _steps(self, timestep: Tensor) -> tuple[Tensor, Tensor | None]:
        """This time step and those that follow it, [steps, *timestep.shape], and the schedule that they are of.

        The step alone, and None, if the scheduler does not know it.
        """
        schedule = self.scheduler.timesteps
        given = self.embedding.pipelines(schedule.to(timestep.device), timestep.dtype)
        steps = given.reshape(-1, *[1] * timestep.ndim).expand(-1, *timestep.shape).to(timestep.dtype)
        same = (steps == timestep).reshape(len(steps), -1).all(1).tolist()
        if True not in same:
            return timestep[None], None
        return steps[same.index(True) :][:LONGEST], schedule

    def _embedded(self, call: inspect.BoundArguments, steps: Tensor) -> Tensor:
        """The embeddings of time steps [steps, batch], [steps, rows, width]: the model run as far as that, with all
        steps as one batch if it makes one row for each, else with one after another."""
        name, *others = self.embedding.arguments
        given = {other: call.arguments[other] for other in others if call.arguments.get(other) is not None}
        batch = max(len(value) for value in (*given.values(), steps[0]))  # one time step may be that of all pictures
        steps = steps.expand(-1, batch)
        repeated = {
            other: value.expand(batch, *value.shape[1:]).repeat(len(steps), *[1] * (value.ndim - 1))
            for other, value in given.items()
        }
        together = self._reached(call.arguments | repeated | {name: steps.flatten(0, 1)})
        if len(together) == steps.numel():
            return together.view(*steps.shape, -1)
        return torch.stack([self._reached(call.arguments | {name: step}) for step in steps])

    def _reached(self, arguments: Mapping[str, Any]) -> Tensor:
        """The embedding that the model makes of these arguments, [rows, width]."""
        handle = self.embedder.register_forward_hook(_stop)
        try:
            self.own(**arguments)
        except _Reached as reached:
            return reached.embedded
        finally:
            handle.remove()
        raise LookupError(f"{type(self.own.__self__).__name__} did without its {self.embedding.module}")

    def _give(self, values: Tensor) -> None:
        """Put what all layers make of a step, [numbers], where each finds its own."""
        kind = _kind(values)
        if kind not in self.memory:
            with torch.inference_mode(False):  # or only calls in inference mode could write to it
                self.memory[kind] = torch.empty_like(values)
        self.memory[kind].copy_(values)
        if self.given != kind:
            self.given = kind
            rows = len(values) // sum(self.widths)
            shares = torch.split(self.memory[kind], [rows * width for width in self.widths])
            for layer, share in zip(self.layers, shares, strict=True):
                layer.row = share.view(rows, -1)


def work_ahead(model: nn.Module, scheduler: Scheduler, record: Record = lambda function, _layers: function) -> int:
    """Let the modulation of a model's blocks be worked out ahead; returns of how many layers that is.

    Comes after whatever else `model.forward` is wrapped in, which sees the layers' numbers change in place.
    """
    family = family_with(type(model).__name__, type(model).__name__)
    embedding = family.embedding
    if embedding is None or (embedding.unless and getattr(model.config, embedding.unless, None)):
        return 0
    repeated = tuple(getattr(model, "_repeated_blocks", ()))
    blocks = [module for module in model.modules() if type(module).__name__ in repeated]
    names = [(block, name) for block in blocks for name in family.modulation if name in dict(block.named_modules())]
    layers = [_replaced(block, name) for block, name in names]
    model.forward = Ahead(model, embedding, layers, scheduler, record)
    return len(layers)


def _replaced(block: nn.Module, name: str) -> Modulation:
    layer = Modulation(block.get_submodule(name))
    block.set_submodule(name, layer)
    return layer


def by_few(function: Products, x: Tensor) -> Tensor:
    """function(x) for x [steps, rows, ...], with FEW rows at a time.

    Filled up with zeros where there are less, so that a step's numbers do not depend on how many others are known.
    """
    at_once = max(1, FEW // x.shape[1])
    filling = x.new_zeros(-len(x) % at_once, *x.shape[1:])
    return torch.cat([function(part) for part in torch.split(torch.cat((x, filling)), at_once)])[: len(x)]


def _values(tensor: Tensor) -> tuple[float, ...]:
    return tuple(tensor.flatten().tolist())


def _kind(tensor: Tensor) -> Any:
    return tensor.shape, tensor.dtype, tensor.device


class _Reached(Exception):
    def __init__(self, embedded: Tensor) -> None:
        super().__init__()
        self.embedded = embedded


def _stop(_module: nn.Module, _inputs: Any, embedded: Tensor) -> None:
    raise _Reached(embedded)
