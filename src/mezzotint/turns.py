"""One picture at a time for pipelines that share a scheduler, which keeps the state of a single one."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from mezzotint.errors import BadRequest


class Turn:
    """A lock that knows which thread has it: waiting for itself is an error and not forever."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.thread: int | None = None

    def __enter__(self) -> None:
        if self.thread == threading.get_ident():
            raise BadRequest(
                "a pipeline is asked for a picture from within one that it is working on",
                "let the first one end, or load another pipeline.",
            )
        self.lock.acquire()
        self.thread = threading.get_ident()

    def __exit__(self, *_raised: object) -> None:
        self.thread = None
        self.lock.release()


_turns: WeakKeyDictionary[Any, Turn] = WeakKeyDictionary()
_adding = threading.Lock()


@contextmanager
def alone(pipe: Any) -> Iterator[None]:
    """Wait until no other thread works with the scheduler of this diffusers pipeline, and keep it meanwhile.

    Raises   BadRequest if this thread has it already
    """
    scheduler = getattr(pipe, "scheduler", pipe)
    with _adding:
        turn = _turns.setdefault(scheduler, Turn())
    with turn:
        yield
