"""Text for terminals that are not UTF-8: plainer, instead of an error that ends the command."""

import codecs
import io
import sys

PLAIN = {"↑": "^", "↓": "v", "–": "-", "−": "-", "×": "x", "…": "...", "≥": ">=", "·": "-"}
"""What stands for our own characters where an encoding lacks them; any other is spelled out, as `\\u732b`."""
HANDLER = "mezzotint"


def print_in_any_encoding() -> None:
    """Let stdout and stderr take every text, whatever their encoding."""
    codecs.register_error(HANDLER, _plainer)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=HANDLER)


def _plainer(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(PLAIN.get(one, one.encode("ascii", "backslashreplace").decode()) for one in letters), error.end
