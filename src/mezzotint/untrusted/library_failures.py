"""Convert errors of libraries to errors of Mezzotint that name the file and the operation."""

from contextlib import AbstractContextManager
from types import TracebackType

from mezzotint.errors import MezzotintError, UnknownFormat, Unsupported

LONGEST = 300
"""Most characters of a library's message that an error quotes."""
NO_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
)
FREE_MEMORY = "choose a smaller size, end other programs, or use a checkpoint of fewer bits."
TORCH_OUT_OF_MEMORY = "OutOfMemoryError"
"""Name of PyTorch's class, because the command line checks errors before it imports PyTorch."""
PANIC = "PanicException"
"""Name of the class that Rust libraries raise (tokenizers, safetensors).

Each library has its own class, and none of them is an Exception.
"""


class convert_memory_errors(AbstractContextManager[None]):
    """Convert a lack of memory in the `with` block to Unsupported.

    >>> with convert_memory_errors("loading the VAE"):
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
                f"out of memory while {self.doing} ({error_text(error)})", FREE_MEMORY
            ) from error


class convert_errors(AbstractContextManager[None]):
    """Convert the errors of a library in the `with` block; errors of Mezzotint pass unchanged.

    where   the file, and the part of it
    what    what failed; the library's message follows it
    hint    what to do next
    kind    the class to raise
    only    the classes to convert; other errors pass unchanged
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
                f"{self.where}: out of memory ({error_text(error)})", FREE_MEMORY
            ) from error
        if isinstance(error, self.only) or type(error).__name__ == PANIC:
            text = f"{type(error).__name__}: {error_text(error)}"
            raise self.kind(f"{self.where}: {self.what} ({text})", self.hint) from error


def is_lack_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == TORCH_OUT_OF_MEMORY:
        return True
    return isinstance(error, RuntimeError | OSError) and any(
        words in str(error).lower() for words in NO_MEMORY
    )


def error_text(error: BaseException) -> str:
    """Return an error's message on one line of at most LONGEST characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
