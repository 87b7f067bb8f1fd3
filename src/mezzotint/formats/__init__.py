"""On-disk formats, one reader per file, and the detection of a file's format."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from mezzotint.discover import collect
from mezzotint.errors import UnreadFormat
from mezzotint.formats.contents import Contents, Format, Match, NoMatch, StoredLinear
from mezzotint.formats.foreign import HINT, refuse_foreign, unnamed
from mezzotint.formats.header import Header, read_header
from mezzotint.formats.writers.writer import Target

__all__ = [
    "Contents",
    "Format",
    "Header",
    "Match",
    "NoMatch",
    "DetectedFormat",
    "StoredLinear",
    "Target",
    "formats",
    "read_header",
    "detect_format",
    "targets",
]


@dataclass(frozen=True)
class DetectedFormat:
    """The one format that matched, its evidence, and {other format: why it did not match}."""

    format: Format
    evidence: str
    declined: Mapping[str, str]


@cache
def targets() -> dict[str, Target]:
    """Return {name for `--to`: target}, discovered from the modules of `formats.writers`."""
    return collect("mezzotint.formats.writers", "TARGET")


@cache
def formats() -> dict[str, Format]:
    """Return {name: format}, discovered from the modules of `formats.readers`."""
    return collect("mezzotint.formats.readers", "FORMAT")


def detect_format(header: Header) -> DetectedFormat:
    """Return the one format that matches.

    Raises  UnreadFormat, with every format's reason, if none or several match
    """
    refuse_foreign(header)
    answers = {name: form.detect(header) for name, form in formats().items()}
    found = {name: answer for name, answer in answers.items() if isinstance(answer, Match)}
    certain = {name: match for name, match in found.items() if match.certain}
    matches = {name: match.evidence for name, match in (certain or found).items()}
    declined = {
        name: answer.reason for name, answer in answers.items() if isinstance(answer, NoMatch)
    } | dict.fromkeys(found.keys() - matches.keys(), "another format is certain")
    if len(matches) == 1:
        (name, evidence) = next(iter(matches.items()))
        return DetectedFormat(formats()[name], evidence, declined)
    if not matches and (looks := unnamed(header)):
        raise UnreadFormat(f"{header.path}: {looks}, which is not read", HINT)
    lines = [f"{name}: yes, {why}" for name, why in matches.items()] + [
        f"{n}: no, {why}" for n, why in declined.items()
    ]
    number = "no format recognizes it" if not matches else f"{len(matches)} formats claim it"
    raise UnreadFormat(f"{header.path}: {number}" + "".join(f"\n    {line}" for line in lines))
