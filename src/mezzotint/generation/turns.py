"""One image at a time for pipelines that share a scheduler, which holds the state of one image."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from diffusers import DiffusionPipeline
from torch import nn

from mezzotint.errors import BadRequest
from mezzotint.nn import modes_of


class Turn:
    """A lock that knows its thread. A thread that waits for itself gets an error."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.thread: int | None = None

    def __enter__(self) -> None:
        if self.thread == threading.get_ident():
            raise BadRequest(
                "a pipeline was called again while it generates an image",
                "let the first call finish, or load another pipeline.",
            )
        self.lock.acquire()
        self.thread = threading.get_ident()

    def __exit__(self, *_raised: object) -> None:
        self.thread = None
        self.lock.release()


_turns: WeakKeyDictionary[Any, Turn] = WeakKeyDictionary()
_adding = threading.Lock()


@contextmanager
def alone(pipe: DiffusionPipeline) -> Iterator[None]:
    """Hold the scheduler and transformers of a pipeline; wait while another thread holds them.

    Raises   BadRequest if this thread holds them already, or another one set a transformer's modes
    """
    names = "scheduler", "transformer", "transformer_2"
    shared = [value for name in names if (value := getattr(pipe, name, None)) is not None]
    with _adding:
        # Always in the same order, so that two threads cannot each wait for what the other has.
        turns = [_turns.setdefault(each, Turn()) for each in sorted(shared or [pipe], key=id)]
    with ExitStack() as stack:
        for turn in turns:
            stack.enter_context(turn)
        for model in shared:
            if isinstance(model, nn.Module):
                stack.enter_context(modes_of(model).exclusive())
        yield
