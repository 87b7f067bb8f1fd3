"""Failures of a command: one message, or one JSON object, and an exit code.

    0    success
    1    success, but a check failed: a gate, a suspicious layer or an invalid image
    2    the command could not run: wrong arguments, missing files or devices, a broken checkpoint
    3    unsupported file format; the file may be sound
    4    unexpected failure: out of memory, or a bug in Mezzotint
    130  interrupted

With --json, a failure is an object on stdout: `{"error": {"type": ..., "message": ..., "hint":
...}}`. Without it, a failure is a message on stderr. Its exit code is never 1.
"""

import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import typer

from mezzotint.errors import (
    BadRequest,
    MezzotintError,
    NotSafetensors,
    UnknownVariant,
    UnreadFormat,
    did_you_mean,
)
from mezzotint.untrusted.escaping import message
from mezzotint.untrusted.library_failures import is_lack_of_memory

COULD_NOT, NOT_READ, FAILED = 2, 3, 4
CLOSED = 141
"""Exit code if the reader of a pipe has closed it, as in a shell: 128 + SIGPIPE."""
TRACEBACK = "MEZZOTINT_TRACEBACK"
OUT_OF_MEMORY = "try a smaller --size, fewer --frames, or a checkpoint with fewer bits."
USAGE_ERROR: type[Any] = typer.BadParameter.__mro__[2]
"""Typer's exception for wrong arguments. It is not public, but it is a base of a public class."""


@dataclass(frozen=True)
class Failure:
    """The message about an exception, and the exit code."""

    type: str
    message: str
    hint: str
    exit_code: int = COULD_NOT

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """Return the failure for an exception of any class."""
        if isinstance(error, MezzotintError):
            return cls(type(error).__name__, error.message, error.hint, _exit_code(error))
        if isinstance(error, USAGE_ERROR):
            return cls(BadRequest.__name__, *_of_arguments(error))
        if is_lack_of_memory(error):
            message = f"out of memory: {_first_line(error)}"
            return cls("OutOfMemory", message, OUT_OF_MEMORY, FAILED)
        if isinstance(error, OSError):
            return cls(type(error).__name__, str(error), "")
        hint = f"this is a bug in Mezzotint. Please report it with the output of {TRACEBACK}=1."
        return cls(type(error).__name__, f"unexpected: {_first_line(error)}", hint, FAILED)

    def show(self, as_json: bool) -> None:
        """Print the object on stdout, or the message on stderr."""
        if as_json:
            print(json.dumps(self.to_dict(), indent=2))
        else:
            hint = f"\n  hint: {self.hint}" if self.hint else ""
            print(message(f"error: {self.type}: {self.message}{hint}"), file=sys.stderr)

    def to_dict(self) -> dict[str, Any]:
        """Return {"error": {type, message, hint}}."""
        return {"error": {"type": self.type, "message": self.message, "hint": self.hint}}


class Reported:
    """A context that reports exceptions of any class as failures, for the outermost call.

    exit_code   exit code of the reported failure; None if there was none
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self.as_json = wants_json(arguments)
        self.exit_code: int | None = None

    def __enter__(self) -> "Reported":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        if os.environ.get(TRACEBACK):
            traceback.print_exception(error)
        failure = Failure.of(error)
        self.exit_code = failure.exit_code
        if failure.message:
            failure.show(self.as_json)
        return True


def wants_json(arguments: Sequence[str]) -> bool:
    """Return whether --json is among the options. After `--` it is an ordinary argument."""
    options = list(arguments)
    return "--json" in (options[: options.index("--")] if "--" in options else options)


def _exit_code(error: MezzotintError) -> int:
    if error.__cause__ is not None and is_lack_of_memory(error.__cause__):
        return FAILED
    is_unread = isinstance(error, UnreadFormat | UnknownVariant | NotSafetensors)
    return NOT_READ if is_unread else COULD_NOT


def _of_arguments(error: Any) -> tuple[str, str]:
    """Return the message and the hint for wrong arguments."""
    message = str(error.format_message()).partition(" (Possible options")[0]
    message, _, suggestion = message.rstrip(".").partition(". Did you mean ")
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "mezzotint"
    hint = f"`{command} --help` lists the options."
    similar = getattr(error, "possibilities", None) or []
    if similar:
        return message, did_you_mean(error.option_name, similar) + hint
    return message, (f"did you mean {suggestion.rstrip('?')}? " if suggestion else "") + hint


def _first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its class if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
