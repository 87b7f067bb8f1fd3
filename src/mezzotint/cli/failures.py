"""How a command ends that could not do what it was asked: one message, or one JSON object, and an exit code.

    0    done
    1    done, and something is to be looked at: a gate failed, a layer is suspect, a picture is unsound
    2    could not be done as asked: arguments, files, a device, or a checkpoint that is broken
    3    the file is in a format that is not read, and may be sound
    4    failed on the way: out of memory, or a fault of Mezzotint's own
    130  interrupted

With --json a failure is an object on stdout, `{"error": {"type": ..., "message": ..., "hint": ...}}`, and without it a
message on stderr. Neither ever has exit code 1.
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

from mezzotint.errors import BadRequest, MezzotintError, NotSafetensors, UnknownVariant, UnreadFormat, did_you_mean
from mezzotint.escaping import message
from mezzotint.failures import is_lack_of_memory

COULD_NOT, NOT_READ, FAILED = 2, 3, 4
CLOSED = 141
"""As a shell has it for a command whose reader has gone: 128 + SIGPIPE."""
TRACEBACK = "MEZZOTINT_TRACEBACK"
OUT_OF_MEMORY = "try a smaller --size, fewer --frames, or a checkpoint of fewer bits."
USAGE_ERROR: type[Any] = typer.BadParameter.__mro__[2]
"""What Typer raises for arguments that cannot be; it has no public name of its own."""


@dataclass(frozen=True)
class Failure:
    """What is said about an exception, and the exit code."""

    type: str
    message: str
    hint: str
    exit_code: int = COULD_NOT

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        if isinstance(error, MezzotintError):
            return cls(type(error).__name__, error.message, error.hint, _exit_code(error))
        if isinstance(error, USAGE_ERROR):
            return cls(BadRequest.__name__, *_of_arguments(error))
        if is_lack_of_memory(error):
            return cls("OutOfMemory", f"out of memory: {_said(error)}", OUT_OF_MEMORY, FAILED)
        if isinstance(error, OSError):
            return cls(type(error).__name__, str(error), "")
        hint = f"this is a fault of Mezzotint; {TRACEBACK}=1 shows where. Please report it with the command."
        return cls(type(error).__name__, f"unexpected: {_said(error)}", hint, FAILED)

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
    """A context whose exceptions are reported as failures, whatever their class: the outermost edge of a command.

    exit_code   of what was reported, None where nothing was
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self.as_json = wants_json(arguments)
        self.exit_code: int | None = None

    def __enter__(self) -> "Reported":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
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
    """Whether --json is among the options; after `--` it is an argument like any other."""
    options = list(arguments)
    return "--json" in (options[: options.index("--")] if "--" in options else options)


def _exit_code(error: MezzotintError) -> int:
    if error.__cause__ is not None and is_lack_of_memory(error.__cause__):
        return FAILED
    return NOT_READ if isinstance(error, UnreadFormat | UnknownVariant | NotSafetensors) else COULD_NOT


def _of_arguments(error: Any) -> tuple[str, str]:
    """The message and the hint about arguments that cannot be."""
    message = str(error.format_message()).partition(" (Possible options")[0]
    message, _, meant = message.rstrip(".").partition(". Did you mean ")
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "mezzotint"
    hint = f"`{command} --help` has what there is."
    close = getattr(error, "possibilities", None) or []
    if close:
        return message, did_you_mean(error.option_name, close) + hint
    return message, (f"did you mean {meant.rstrip('?')}? " if meant else "") + hint


def _said(error: BaseException) -> str:
    """The first line of what an exception says, or its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
