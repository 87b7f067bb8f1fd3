"""One call of a fast model at a time."""

import inspect
import threading
from collections.abc import Callable
from typing import Any


class Serial:
    """The forward of a fast model. Threads that call it take turns.

    A call keeps state in the model: outputs of fused layers for the slices that follow, the
    modulation of its step, the inputs of a recorded graph. A call of another thread would overwrite
    it.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__signature__ = inspect.signature(function)
        self.lock = threading.RLock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            return self.function(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the lock, which cannot be copied."""
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock())
