"""What a library raises becomes one error of Mezzotint that says what was being done, and to which file."""

from contextlib import AbstractContextManager
from types import TracebackType

from mezzotint.errors import MezzotintError, UnknownFormat, Unsupported

LONGEST = 300
"""Characters of a library's own message that are repeated."""
NO_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
)
FREE_MEMORY = (
    "ask for a smaller size, close what else holds memory, or choose a checkpoint of fewer bits."
)
TORCH_OUT_OF_MEMORY = "OutOfMemoryError"
"""PyTorch's class for a GPU's, by name: the command line asks before PyTorch is imported."""
PANIC = "PanicException"
"""What code in Rust raises (tokenizers, safetensors); it is no Exception, and each library has a class of its own."""


class memory_named(AbstractContextManager[None]):
    """Turn a lack of memory inside the context into Unsupported.

    >>> with memory_named("loading the VAE"):
    ...     vae.to("cuda")
    """

    def __init__(self, doing: str) -> None:
        self.doing = doing

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if error is not None and is_lack_of_memory(error):
            raise Unsupported(
                f"out of memory while {self.doing} ({said(error)})", FREE_MEMORY
            ) from error


class failures_named(AbstractContextManager[None]):
    """Turn whatever a library raises inside the context into one error; Mezzotint's own pass through.

    where   the file, and what of it
    what    what failed, to be followed by the library's own message
    hint    what to do next
    kind    the class of the error
    only    which errors are turned into it; those of other classes pass through
    """

    def __init__(
        self,
        where: str,
        what: str,
        hint: str,
        kind: type[MezzotintError] = UnknownFormat,
        only: tuple[type[Exception], ...] = (Exception,),
    ) -> None:
        self.where, self.what, self.hint, self.kind, self.only = where, what, hint, kind, only

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if error is None or isinstance(error, MezzotintError):
            return
        if is_lack_of_memory(error):
            raise Unsupported(
                f"{self.where}: out of memory ({said(error)})", FREE_MEMORY
            ) from error
        if isinstance(error, self.only) or type(error).__name__ == PANIC:
            raise self.kind(
                f"{self.where}: {self.what} ({type(error).__name__}: {said(error)})", self.hint
            ) from error


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == TORCH_OUT_OF_MEMORY:
        return True
    return isinstance(error, RuntimeError | OSError) and any(
        words in str(error).lower() for words in NO_MEMORY
    )


def said(error: BaseException) -> str:
    """What a library's error says, on one line of bounded length."""
    text = " ".join(str(error).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
