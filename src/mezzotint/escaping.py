"""Text that is from a file, a server or a user, on its way to a terminal, a page, a log or a message.

A name in a file may hold anything: escape characters that drive a terminal, marks that turn the direction of text,
halves of characters that no encoding has, or 16 MB. Each is escaped once, where it is printed.
"""

import re

LONGEST = 200
"""Characters of a foreign value that a message shows."""
JOINERS = "\u200c\u200d"
"""Invisible characters that Persian and emoji are written with; they move nothing."""
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~&])")


def printable(text: object, keep: str = "") -> str:
    r"""Return the text with control characters, direction marks and surrogates as escapes such as \x1b.

    keep   control characters that stay as they are, such as "\n" in a message of several lines
    """
    string = str(text)
    if string.isprintable():
        return string
    return "".join(c if c.isprintable() or c in keep or c in JOINERS else _escape(c) for c in string)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def shown(value: object, longest: int = LONGEST) -> str:
    """Return a foreign value's repr as a message shows it: its beginning, and its length where that is not all."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or a number of more than 4,300 digits
        return f"a {type(value).__name__} that is too large to show"
    return cut(text, longest)


def cut(text: str, longest: int = LONGEST) -> str:
    """Return the text, or its beginning and its length where it is longer than `longest`."""
    return text if len(text) <= longest else f"{text[:longest]}... ({len(text):,} characters)"


def markdown(text: object) -> str:
    """Return the text on one line of Markdown, where none of its characters is a mark."""
    return MARKDOWN.sub(r"\\\1", printable(text))
