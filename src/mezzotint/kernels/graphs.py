"""Functions recorded as CUDA graphs."""

import inspect
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mezzotint.errors import BadRequest
from mezzotint.kernels.weights import Weights

LOG = logging.getLogger(__name__)

WARM_UP_CALLS = 2
"""Calls before a graph is recorded: one that compiles and sets up what libraries need, and one as all others are."""

RECORDING = threading.Lock()
"""Held while a graph is recorded: before each, PyTorch waits for the whole GPU, which no other recording allows."""


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
             one is elsewhere or there are others: the model was moved or cast, was away for a while, or got a LoRA.
             What it does with them is not watched: another scale of a LoRA takes part in what is recorded later
    """

    def __init__(self, function: Callable[..., Any], state: Callable[[], Any], model: nn.Module) -> None:
        self.function = function
        self.state = state
        self.__signature__ = inspect.signature(function)
        self.weights = Weights(model)
        self.recordings: dict[Any, Recording] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, tree = pytree.tree_flatten((args, kwargs))
        _refuse_elsewhere(leaves)
        self._forget_if_moved()
        key = (self.state(), tree, tuple(_kind(leaf) for leaf in leaves))
        if key not in self.recordings:
            self.recordings[key], result = self._record(leaves, tree)
            return result
        recording = self.recordings[key]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        for place, tensor in zip(recording.inputs, tensors, strict=True):
            place.copy_(tensor)
        recording.graph.replay()
        return pytree.tree_unflatten([_own(output) for output in recording.outputs], recording.tree)

    def _forget_if_moved(self) -> None:
        if self.weights.changed() and self.recordings:
            LOG.warning(
                "the model's weights are others, or elsewhere, since its calls were recorded: they are recorded anew"
            )
            self.recordings.clear()
            self.pool = torch.cuda.graph_pool_handle()  # the old one may hold what a library has put into it

    def _record(self, leaves: Sequence[Any], tree: pytree.TreeSpec) -> tuple[Recording, Any]:
        """A recording, and the result of the last call before it."""
        with torch.inference_mode(False):  # or only calls in inference mode could write to them
            kept = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(kept, tree)
        inputs = [leaf for leaf in kept if isinstance(leaf, Tensor)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(inputs[0].device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_CALLS):
                    result = self.function(*args, **kwargs)
            torch.cuda.current_stream().wait_stream(stream)
            result = pytree.tree_map(_own, result)
            # Other threads may go on allocating memory, which would spoil a recording in PyTorch's default mode.
            with RECORDING, torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                recorded = self.function(*args, **kwargs)
        outputs, out_tree = pytree.tree_flatten(recorded)
        return Recording(graph, inputs, outputs, out_tree), result


def _refuse_elsewhere(leaves: Sequence[Any]) -> None:
    elsewhere = [str(leaf.device) for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_cuda]
    if elsewhere:
        raise BadRequest(
            f"a transformer that was made fast for CUDA is called with a tensor on {elsewhere[0]}",
            "move the tensor, or load the model again for that device.",
        )


def _kind(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _own(output: Any) -> Any:
    """A copy, because the next replay writes over the original."""
    return output.clone() if isinstance(output, Tensor) else output
