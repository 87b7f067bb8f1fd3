"""Output on terminals without UTF-8: replace characters instead of failing."""

import codecs
import io
import sys

PLAIN = {"↑": "^", "↓": "v", "–": "-", "−": "-", "×": "x", "…": "...", "≥": ">=", "·": "-"}
"""ASCII replacements of the characters that Mezzotint prints. Others are escaped, as `\\u732b`."""
HANDLER = "mezzotint"


def print_in_any_encoding() -> None:
    """Make stdout and stderr accept any text, whatever their encoding."""
    codecs.register_error(HANDLER, _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=HANDLER)


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    replacements = (
        PLAIN.get(character, character.encode("ascii", "backslashreplace").decode())
        for character in characters
    )
    return "".join(replacements), error.end
