"""What a check may find, and how bad it is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from mezzotint.errors import MezzotintError, NotSafetensors, UnknownVariant, UnreadFormat, Unsupported

Progress = Callable[[int, int], None]
"""Called with the bytes that are done and the bytes there are in all."""


class Severity(IntEnum):
    """The number is the exit code that goes with the worst finding."""

    NOTE = 0
    SUSPICIOUS = 1
    BROKEN = 2
    NOT_READ = 3


VERDICTS = ("sound", "suspicious", "broken", "not read")
"""What a report's exit code is called; "not read": its format is none that is read, and it may be sound."""
UNREAD = (UnreadFormat, UnknownVariant, NotSafetensors, Unsupported)
"""Errors that say nothing against the files: no reader here knows what they hold."""
MOST_PRINTED = 50
"""Findings that are printed; a damaged index gives one for each of a hundred thousand tensors."""


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
    """Return a deliberate error as a finding: broken, or not read where it says nothing against the file."""
    message = error.message.removeprefix(f"{where}: ")
    if isinstance(error, UNREAD):
        return Finding(Severity.NOT_READ, check, where, message, error.hint)
    return broken(check, where, message, error.hint, file)


def worst_first(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings that are printed: all if they are few, else the worst MOST_PRINTED."""
    if len(findings) <= MOST_PRINTED:
        return list(findings)
    return sorted(findings, key=lambda finding: -finding.severity)[:MOST_PRINTED]
