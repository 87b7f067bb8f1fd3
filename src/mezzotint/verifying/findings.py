"""What a check may find, and how bad it is."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from mezzotint.errors import MezzotintError

Progress = Callable[[int, int], None]
"""Called with the bytes that are done and the bytes there are in all."""


class Severity(IntEnum):
    """The number is the exit code that goes with the worst finding."""

    NOTE = 0
    SUSPICIOUS = 1
    BROKEN = 2


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or odd.

    check   which check found it, one word
    where   tensor, layer or file
    file    the file that would have to be fetched again, if that would help
    """

    severity: Severity
    check: str
    where: str
    message: str
    hint: str = ""
    file: Path | None = None


def broken(check: str, where: str, message: str, hint: str = "", file: Path | None = None) -> Finding:
    return Finding(Severity.BROKEN, check, where, message, hint, file)


def suspicious(check: str, where: str, message: str) -> Finding:
    return Finding(Severity.SUSPICIOUS, check, where, message)


def of_error(check: str, where: str, error: MezzotintError, file: Path | None = None) -> Finding:
    """A deliberate error as a finding."""
    return broken(check, where, error.message.removeprefix(f"{where}: "), error.hint, file)
