"""Compute the modulation of all blocks for all steps of a generation, in the first step.

Modulation layers read one row per image. It depends on the time step, and in some families on
guidance and pooled text, but never on the latents. A GEMM with one row costs as much as reading its
weight, and so does one with eight rows.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mezzotint.families.family import TimeEmbedding
from mezzotint.fast.fast_pass import Scheduler
from mezzotint.fast.runtime.readback import read_back
from mezzotint.fast.runtime.tensor_cache import MAX_ENTRIES, TensorCache
from mezzotint.fast.runtime.weight_watcher import WeightWatcher
from mezzotint.kernels.fp8_gemm import GEMV_MAX_ROWS
from mezzotint.nn import modes_of

ComputeOutputs = Callable[[Tensor], Tensor]
"""Function of x [steps, rows, in] that returns [steps, elements]."""

RecordGraph = Callable[[ComputeOutputs, nn.Module], ComputeOutputs]
"""Wrap a function of CUDA tensors and of a module's weights in a CudaGraphRunner."""

MAX_STEPS = 64
"""Steps computed at once: 135 MB for FLUX.1, 283 MB for Qwen-Image."""


class PrecomputedLinear(nn.Module):
    """A modulation layer whose output was computed beforehand.

    output   [rows, out], the output for the present step. Its address is fixed per number of rows,
             so that a recorded graph reads the right one
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, self.out_features = layer, layer.out_features
        self.output = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """Return [rows, out] for x [rows, in], of which only the shape is read.

        Where Qwen-Image-Edit embeds two time steps, the text reads the first half of the rows.
        """
        return self.output[: x.shape[0]]


@dataclass(frozen=True)
class ModulationTable:
    """The outputs of all modulation layers for some time steps.

    timesteps  [steps, *shape of a time step]
    outputs    [steps, elements], one layer after another
    schedule   the scheduler's time steps if `timesteps` follow them, else None
    """

    timesteps: Tensor
    outputs: Tensor
    schedule: Tensor | None

    def matches(self, timesteps: Tensor) -> Tensor:
        """Return bool [steps, timesteps]: which step each time step is."""
        equal = self.timesteps[:, None] == timesteps
        return equal.reshape(*equal.shape[:2], -1).all(2)

    def contains(self, timesteps: Tensor) -> bool:
        """Return whether all time steps are in the table. Waits for the GPU."""
        return bool(self.matches(timesteps).any(0).all())

    def append(self, timesteps: Tensor, outputs: Tensor) -> "ModulationTable":
        """Return a table with steps that are in no schedule added; the oldest are dropped."""
        timesteps = torch.cat((self.timesteps, timesteps))[-2 * MAX_STEPS :]
        return ModulationTable(
            timesteps, torch.cat((self.outputs, outputs))[-2 * MAX_STEPS :], None
        )


class PrecomputedModulation:
    """The forward of a transformer. It gives every modulation layer its output for the step first.

    In-place changes to weights are not detected. When weights are replaced or moved, all is
    recomputed.

    scheduler   has the steps to come; a step that it does not have is computed when it is seen
    """

    def __init__(
        self,
        model: nn.Module,
        embedding: TimeEmbedding,
        layers: Sequence[PrecomputedLinear],
        scheduler: Scheduler,
        record_graph: RecordGraph,
    ) -> None:
        self.wrapped_forward, self.modes = model.forward, modes_of(model)
        self.original_forward = MethodType(type(model).forward, model)
        self.__signature__ = self.signature = inspect.signature(self.original_forward)
        self.embedder = model.get_submodule(embedding.module)
        self.embedding, self.layers, self.scheduler = embedding, layers, scheduler
        self.compute_outputs = record_graph(self._apply_layers, nn.ModuleList(layers))
        self.watcher = WeightWatcher(nn.ModuleList([self.embedder, *layers]))
        self.widths = [layer.out_features for layer in layers]
        self.tables: dict[Any, ModulationTable] = {}
        self.conditions = {name: TensorCache() for name in embedding.arguments[1:]}
        self.buffers: dict[Any, Tensor] = {}
        self.assigned: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the transformer's forward.

        Only the GPU knows the time step, and waiting for it would leave it idle. So the GPU looks
        up the step and goes on. If the step was not in the table, it is added and the call
        repeated.
        """
        found = self.prepare(*args, **kwargs)
        result = self.wrapped_forward(*args, **kwargs)
        # The forward has been launched before this waits, so the GPU stays busy.
        if not found():
            key, table = self.tables.popitem()
            self.tables[key] = replace(table, schedule=None)
            self.prepare(*args, **kwargs)
            result = self.wrapped_forward(*args, **kwargs)
        return result

    @torch.no_grad()
    def prepare(self, *args: Any, **kwargs: Any) -> Callable[[], bool]:
        """Give every layer its output for a call with these arguments.

        Return a function that waits for the GPU and returns whether the step was in the table.
        """
        if self.watcher.has_changed():
            self.tables.clear()
            self.assigned = None
        call = self.signature.bind(*args, **kwargs)
        timestep = call.arguments[self.embedding.arguments[0]]
        key = self._key(call, timestep)
        # Inserted anew at the end, so the first key is the one that was not used for longest.
        table = self.tables[key] = self._update_table(self.tables.pop(key, None), call, timestep)
        if len(self.tables) > MAX_ENTRIES:
            del self.tables[next(iter(self.tables))]
        # If no step matches, `argmax` gives the first one; the caller then repeats the call.
        hits = table.matches(timestep[None])
        self._assign_outputs(table.outputs.index_select(0, hits.int().argmax(0))[0])
        return read_back(hits.any())

    def reset(self) -> None:
        """Forget all tables."""
        self.tables.clear()

    def precompute(self, *args: Any, **kwargs: Any) -> None:
        """Compute the table for calls with these arguments."""
        self.prepare(*args, **kwargs)

    def _key(self, call: inspect.BoundArguments, timestep: Tensor) -> Any:
        """Return everything that outputs depend on, except the values of the time step."""
        leaves = pytree.tree_leaves(call.arguments)
        latents = next(leaf for leaf in leaves if isinstance(leaf, Tensor))
        settings = tuple(
            leaf for leaf in leaves if leaf is not None and not isinstance(leaf, Tensor)
        )
        conditions = tuple(
            self._condition(name, call.arguments.get(name)) for name in self.conditions
        )
        return (
            self.modes.key,
            _kind(timestep),
            latents.dtype,
            latents.device,
            settings,
            conditions,
        )

    def _condition(self, name: str, value: Tensor | None) -> Any:
        """Return what outputs depend on in one argument. Read its values if they may differ."""
        if value is None:
            return None
        return *_kind(value), self.conditions[name].get_or_compute(
            [value], None, lambda: _to_tuple(value)
        )

    def _update_table(
        self, previous: ModulationTable | None, call: inspect.BoundArguments, timestep: Tensor
    ) -> ModulationTable:
        """Return a table with the call's step. Recompute it for a new schedule or unknown step."""
        # Schedulers make a new tensor for every schedule, so comparing identity needs no GPU.
        if previous is not None and previous.schedule is self.scheduler.timesteps:
            return previous
        steps, schedule = self._remaining_timesteps(timestep)
        if previous is not None and previous.contains(steps):
            return replace(previous, schedule=schedule)
        outputs = self._compute_outputs(call, steps)
        if previous is None or schedule is not None:
            return ModulationTable(steps, outputs, schedule)
        return previous.append(steps, outputs)

    def _compute_outputs(self, call: inspect.BoundArguments, steps: Tensor) -> Tensor:
        """Return the outputs of all layers for time steps, [steps, elements]."""
        embedded = run_in_chunks(lambda chunk: self._embed_timesteps(call, chunk), steps)
        return run_in_chunks(self.compute_outputs, self.embedding.activation(embedded))

    def _apply_layers(self, x: Tensor) -> Tensor:
        """Return the outputs of all layers for x [steps, rows, in], [steps, elements]."""
        outputs = [layer.layer(x.flatten(0, 1)) for layer in self.layers]
        return torch.cat([output.reshape(len(x), -1) for output in outputs], 1)

    def _remaining_timesteps(self, timestep: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return this time step and those after it, [steps, *timestep.shape], and their schedule.

        If the scheduler does not have the time step, return it alone, and None.
        """
        schedule = self.scheduler.timesteps
        scaled = self.embedding.scale_timesteps(schedule.to(timestep.device), timestep.dtype)
        scaled = scaled.reshape(-1, *[1] * timestep.ndim)
        # Scaled and cast as the pipeline does it, because steps are compared exactly.
        steps = scaled.expand(-1, *timestep.shape).to(timestep.dtype)
        equal = (steps == timestep).reshape(len(steps), -1).all(1).tolist()
        if True not in equal:
            return timestep[None], None
        return steps[equal.index(True) :][:MAX_STEPS], schedule

    def _embed_timesteps(self, call: inspect.BoundArguments, steps: Tensor) -> Tensor:
        """Return the embeddings [steps, rows, width] of time steps [steps, batch].

        All steps run as one batch if the embedder makes one row for each, else one by one.
        """
        name, *rest = self.embedding.arguments
        conditions = {
            argument: call.arguments[argument]
            for argument in rest
            if call.arguments.get(argument) is not None
        }
        # A batch may share one time step.
        batch = max(len(value) for value in (*conditions.values(), steps[0]))
        steps = steps.expand(-1, batch)
        repeated = {
            argument: value.expand(batch, *value.shape[1:]).repeat(
                len(steps), *[1] * (value.ndim - 1)
            )
            for argument, value in conditions.items()
        }
        embedded = self._run_to_embedder(call.arguments | repeated | {name: steps.flatten(0, 1)})
        if len(embedded) == steps.numel():
            return embedded.view(*steps.shape, -1)
        return torch.stack([self._run_to_embedder(call.arguments | {name: step}) for step in steps])

    def _run_to_embedder(self, arguments: Mapping[str, Any]) -> Tensor:
        """Run the model up to its embedder. Return the embedding [rows, width]."""
        # The model's forward scales and casts the embedder's inputs, differently in each family. So
        # run it and stop there.
        handle = self.embedder.register_forward_hook(_stop_forward)
        try:
            self.original_forward(**arguments)
        except _EmbedderReached as reached:
            return reached.embedded
        finally:
            handle.remove()
        name = type(self.original_forward.__self__).__name__
        raise LookupError(f"{name} did not call its {self.embedding.module}")

    def _assign_outputs(self, values: Tensor) -> None:
        """Copy the outputs of a step, [elements], to where each layer reads its own."""
        kind = _kind(values)
        if kind not in self.buffers:
            # An inference tensor could be written to in inference mode only.
            with torch.inference_mode(False):
                self.buffers[kind] = torch.empty_like(values)
        self.buffers[kind].copy_(values)
        if self.assigned != kind:
            self.assigned = kind
            rows = len(values) // sum(self.widths)
            slices = torch.split(self.buffers[kind], [rows * width for width in self.widths])
            for layer, output in zip(self.layers, slices, strict=True):
                layer.output = output.view(rows, -1)


def run_in_chunks(function: ComputeOutputs, x: Tensor) -> Tensor:
    """Return function(x) for x [steps, rows, ...], computed for GEMV_MAX_ROWS rows at a time.

    The last chunk is padded with zeros. Every GEMM then has the same number of rows, so that a
    step's output does not depend on how many steps are computed with it.
    """
    size = max(1, GEMV_MAX_ROWS // x.shape[1])
    padding = x.new_zeros(-len(x) % size, *x.shape[1:])
    chunks = torch.split(torch.cat((x, padding)), size)
    return torch.cat([function(chunk) for chunk in chunks])[: len(x)]


def _to_tuple(tensor: Tensor) -> tuple[float, ...]:
    return tuple(tensor.flatten().tolist())


def _kind(tensor: Tensor) -> Any:
    return tensor.shape, tensor.dtype, tensor.device


class _EmbedderReached(Exception):
    """Carries the embedding out of the model's forward."""

    def __init__(self, embedded: Tensor) -> None:
        super().__init__()
        self.embedded = embedded


def _stop_forward(_module: nn.Module, _inputs: Any, embedded: Tensor) -> None:
    raise _EmbedderReached(embedded)
