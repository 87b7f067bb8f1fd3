"""Functions recorded as CUDA graphs."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mezzotint.errors import BadRequest

LOG = logging.getLogger(__name__)

WARM_UP_CALLS = 3
"""Calls before a graph is recorded: compiling, and whatever a library sets up when it first runs."""


@dataclass(frozen=True)
class Recording:
    """A graph, the tensors that it reads, and those that it leaves its results in."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: list[Any]
    tree: pytree.TreeSpec


class Graphs:
    """A function on a GPU's tensors, recorded once for each shape of its arguments and replayed after that.

    Launching some thousand kernels one by one takes the CPU about as long as the GPU takes to run them. All recordings
    share one pool of memory, as large as the largest needs: they are never replayed at once, and results are copied.

    state    anything besides the arguments that the function depends on; what it returns is part of what is recorded
    model    whose weights the function reads. A recording reads them where they were, so that all are dropped when
             one is elsewhere or there are others: the model was moved or cast, was away for a while, or got a LoRA
    """

    def __init__(self, function: Callable[..., Any], state: Callable[[], Any], model: nn.Module) -> None:
        self.function = function
        self.state = state
        self.model = model
        self.recorded_at: tuple[int, ...] = ()
        self.recordings: dict[Any, Recording] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, tree = pytree.tree_flatten((args, kwargs))
        self._forget_if_moved()
        key = (self.state(), tree, tuple(_kind(leaf) for leaf in leaves))
        if key not in self.recordings:
            self.recordings[key] = self._record(leaves, tree)
        recording = self.recordings[key]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        for place, tensor in zip(recording.inputs, tensors, strict=True):
            place.copy_(tensor)
        recording.graph.replay()
        return pytree.tree_unflatten([_own(output) for output in recording.outputs], recording.tree)

    def _forget_if_moved(self) -> None:
        now = addresses(self.model)
        if now != self.recorded_at and self.recordings:
            LOG.warning(
                "the model's weights are others, or elsewhere, since its calls were recorded: they are recorded anew"
            )
            self.recordings.clear()
        self.recorded_at = now

    def _record(self, leaves: Sequence[Any], tree: pytree.TreeSpec) -> Recording:
        elsewhere = [str(leaf.device) for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_cuda]
        if elsewhere:
            raise BadRequest(
                f"a transformer that was made fast for CUDA is called with a tensor on {elsewhere[0]}",
                "move the tensor, or load the model again for that device.",
            )
        with torch.inference_mode(False):  # or only calls in inference mode could write to them
            kept = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(kept, tree)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                self.function(*args, **kwargs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = self.function(*args, **kwargs)
        outputs, out_tree = pytree.tree_flatten(result)
        return Recording(graph, [leaf for leaf in kept if isinstance(leaf, Tensor)], outputs, out_tree)


def addresses(model: nn.Module) -> tuple[int, ...]:
    """Where a model's weights are in memory; one to three milliseconds of the CPU's for the models of today."""
    return tuple(
        0 if tensor is None else tensor.data_ptr()
        for module in model.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
    )


def _kind(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _own(output: Any) -> Any:
    """A copy, because the next replay writes over the original."""
    return output.clone() if isinstance(output, Tensor) else output
