"""Record functions as CUDA graphs."""

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
from mezzotint.fast.runtime.weight_watcher import WeightWatcher

LOG = logging.getLogger(__name__)

WARM_UP_CALLS = 2
"""Calls before a recording: one compiles and initializes libraries, one runs like later ones."""

RECORDING = threading.Lock()
"""Held during a recording. PyTorch synchronizes the GPU first, which breaks other recordings."""


@dataclass(frozen=True)
class CudaGraphRecording:
    """A graph, the tensors that it reads, and those that it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: list[Any]
    tree: pytree.TreeSpec


class CudaGraphRunner:
    """A function of CUDA tensors, recorded once per shape of its arguments, then replayed.

    Launching thousands of kernels takes the CPU about as long as the GPU takes to run them.
    Recordings share one memory pool, as large as the largest needs: no two are replayed at once,
    and results are copied.

    function  the function
    state     returns what the function depends on besides its arguments; it is part of the key
    model     module whose weights the function reads. A recording reads fixed addresses, so all are
              dropped when a weight is replaced, moved or cast, as by offloading or by a LoRA.
              Values that are not weights are not watched, such as the scale of a LoRA
    """

    def __init__(
        self, function: Callable[..., Any], state: Callable[[], Any], model: nn.Module
    ) -> None:
        self.function = function
        self.state = state
        self.__signature__ = inspect.signature(function)
        self.watcher = WeightWatcher(model)
        self.recordings: dict[Any, CudaGraphRecording] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, tree = pytree.tree_flatten((args, kwargs))
        _check_on_cuda(leaves)
        self._drop_stale_recordings()
        key = (self.state(), tree, tuple(_signature(leaf) for leaf in leaves))
        if key not in self.recordings:
            self.recordings[key], result = self._record(leaves, tree)
            return result
        recording = self.recordings[key]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        for recorded, tensor in zip(recording.inputs, tensors, strict=True):
            recorded.copy_(tensor)
        recording.graph.replay()
        return pytree.tree_unflatten(
            [_clone(output) for output in recording.outputs], recording.tree
        )

    def _drop_stale_recordings(self) -> None:
        if self.watcher.has_changed() and self.recordings:
            LOG.warning(
                "the model's weights were replaced or moved since its calls were recorded: "
                "they are recorded again"
            )
            self.recordings.clear()
            # A library may keep allocations of its own in the old pool.
            self.pool = torch.cuda.graph_pool_handle()

    def _record(
        self, leaves: Sequence[Any], tree: pytree.TreeSpec
    ) -> tuple[CudaGraphRecording, Any]:
        """Record a call. Return the recording, and the result of the last call before it."""
        # An inference tensor could be written to in inference mode only.
        with torch.inference_mode(False):
            kept = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(kept, tree)
        inputs = [leaf for leaf in kept if isinstance(leaf, Tensor)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(inputs[0].device):
            # Warm up on a side stream, as https://docs.pytorch.org/docs/stable/notes/cuda.html
            # asks under "CUDA Graphs".
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_CALLS):
                    result = self.function(*args, **kwargs)
            torch.cuda.current_stream().wait_stream(stream)
            result = pytree.tree_map(_clone, result)
            # In PyTorch's default mode, an allocation in another thread would break the recording.
            with (
                RECORDING,
                torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
            ):
                recorded = self.function(*args, **kwargs)
        outputs, out_tree = pytree.tree_flatten(recorded)
        return CudaGraphRecording(graph, inputs, outputs, out_tree), result


def _check_on_cuda(leaves: Sequence[Any]) -> None:
    devices = [str(leaf.device) for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_cuda]
    if devices:
        raise BadRequest(
            f"a transformer that was sped up for CUDA is called with a tensor on {devices[0]}",
            "move the tensor, or load the model again for that device.",
        )


def _signature(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _clone(output: Any) -> Any:
    """Return a copy, because the next replay overwrites the original."""
    return output.clone() if isinstance(output, Tensor) else output
