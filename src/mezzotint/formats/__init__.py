"""On-disk formats, one file each, and the question "which one is this?"."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from mezzotint.discover import collect
from mezzotint.errors import UnreadFormat
from mezzotint.formats.contents import Contents, Format, Match, NoMatch, StoredLinear
from mezzotint.formats.foreign import HINT, refuse_foreign, unnamed
from mezzotint.formats.header import Header, read_header
from mezzotint.formats.writing import Target

__all__ = [
    "Contents",
    "Format",
    "Header",
    "Match",
    "NoMatch",
    "Recognised",
    "StoredLinear",
    "Target",
    "formats",
    "read_header",
    "recognise",
    "targets",
]


@dataclass(frozen=True)
class Recognised:
    """The one format that matched, with what every format answered: {name: evidence or reason}."""

    format: Format
    evidence: str
    declined: Mapping[str, str]


@cache
def targets() -> dict[str, Target]:
    """{what `--to` calls it: target}, discovered from the modules of this package."""
    return collect(sys.modules[__name__], "TARGET")


@cache
def formats() -> dict[str, Format]:
    """{name: format}, discovered from the modules of this package."""
    return collect(sys.modules[__name__], "FORMAT")


def recognise(header: Header) -> Recognised:
    """Ask every format; exactly one must match, else UnreadFormat with the reasons of all.

    Raises  UnreadFormat
    """
    refuse_foreign(header)
    answers = {name: form.detect(header) for name, form in formats().items()}
    matches = {name: answer.evidence for name, answer in answers.items() if isinstance(answer, Match)}
    declined = {name: answer.reason for name, answer in answers.items() if isinstance(answer, NoMatch)}
    if len(matches) == 1:
        (name, evidence) = next(iter(matches.items()))
        return Recognised(formats()[name], evidence, declined)
    if not matches and (looks := unnamed(header)):
        raise UnreadFormat(f"{header.path}: {looks}, which is not read", HINT)
    said = [f"{name}: yes, {why}" for name, why in matches.items()] + [f"{n}: no, {why}" for n, why in declined.items()]
    number = "no format recognises it" if not matches else f"{len(matches)} formats claim it"
    raise UnreadFormat(f"{header.path}: {number}" + "".join(f"\n    {line}" for line in said))
