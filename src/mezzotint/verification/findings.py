"""Findings of a verification, with their severity."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from mezzotint.errors import (
    MezzotintError,
    NotSafetensors,
    UnknownVariant,
    UnreadFormat,
    Unsupported,
)

Progress = Callable[[int, int], None]
"""Callback that receives the finished bytes and the total bytes."""


class Severity(IntEnum):
    """The severity of a finding. The value of the worst one is the exit code."""

    NOTE = 0
    SUSPICIOUS = 1
    BROKEN = 2
    NOT_READ = 3


VERDICTS = ("sound", "suspicious", "broken", "not read")
"""Verdict for each exit code. "not read" means an unsupported format; the file may be sound."""
UNREAD = (UnreadFormat, UnknownVariant, NotSafetensors, Unsupported)
"""Errors for unsupported formats. They do not mean that a file is broken."""
MAX_PRINTED = 50
"""Largest number of printed findings. A damaged index can give a hundred thousand."""


@dataclass(frozen=True)
class Finding:
    """One fault, or suspicious property, of a checkpoint.

    check   name of the check, one word
    where   tensor, layer or file
    file    file whose download would repair the fault, if there is one
    """

    severity: Severity
    check: str
    where: str
    message: str
    hint: str = ""
    file: Path | None = None


def broken(
    check: str, where: str, message: str, hint: str = "", file: Path | None = None
) -> Finding:
    """Return a finding of severity BROKEN."""
    return Finding(Severity.BROKEN, check, where, message, hint, file)


def suspicious(check: str, where: str, message: str) -> Finding:
    """Return a finding of severity SUSPICIOUS."""
    return Finding(Severity.SUSPICIOUS, check, where, message)


def finding_from_error(
    check: str, where: str, error: MezzotintError, file: Path | None = None
) -> Finding:
    """Convert an error to a finding: NOT_READ for an unsupported format, else BROKEN."""
    message = error.message.removeprefix(f"{where}: ")
    if isinstance(error, UNREAD):
        return Finding(Severity.NOT_READ, check, where, message, error.hint)
    return broken(check, where, message, error.hint, file)


def worst_first(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings to print: all of them, or the worst MAX_PRINTED."""
    if len(findings) <= MAX_PRINTED:
        return list(findings)
    return sorted(findings, key=lambda finding: -finding.severity)[:MAX_PRINTED]
