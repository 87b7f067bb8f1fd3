"""Text that is from a file, a server or a user, on its way to a terminal, a page, a log or a message.

A name in a file may hold anything: escape characters that drive a terminal, marks that turn the direction of text,
halves of characters that no encoding has, or 16 MB. Each is escaped once, where it is printed.
"""

import re
import unicodedata

LONGEST = 200
"""Characters of a foreign value that a message shows."""
LONGEST_LINE = 4_000
"""Characters of a line of a message that are printed."""
STEERS = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories that steer a display unseen: control, format, surrogate, line and paragraph separators."""
JOINERS = "\u200c\u200d"
"""Format characters that Persian, Indic letters and emoji are written with; they move nothing."""
MARKDOWN = re.compile(r"[\\`*_{}\[\]#|~$]")
ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;"})
AUTOLINK = re.compile(r"(?<=:)/|(?<=www)\.", re.IGNORECASE)
AT_START = re.compile(r"^(\d*)(?=[-+.)=])")


def printable(text: object, keep: str = "") -> str:
    r"""Return the text with control characters, direction marks and surrogates as escapes such as \x1b.

    keep   control characters that stay as they are, such as "\n" in a message of several lines
    """
    string = str(text)
    if string.isascii() and string.isprintable():
        return string
    return "".join(c if c in keep or c in JOINERS or not _steers(c) else _escape(c) for c in string)


def _steers(character: str) -> bool:
    return unicodedata.category(character) in STEERS


def _escape(character: str) -> str:
    code = ord(character)
    return (
        f"\\x{code:02x}"
        if code < 0x100
        else f"\\u{code:04x}"
        if code < 0x10000
        else f"\\U{code:08x}"
    )


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


def message(text: object) -> str:
    """Return an error's or note's message for stderr: its lines stay, control characters and endless lines do not."""
    return "\n".join(cut(line, LONGEST_LINE) for line in printable(text, keep="\n").split("\n"))


def markdown(text: object) -> str:
    """Return the text so that Markdown shows it as it is, on one line, without links, mentions or HTML."""
    marked = MARKDOWN.sub(r"\\\g<0>", printable(text)).translate(ENTITIES)
    return AT_START.sub(r"\1\\", AUTOLINK.sub(r"\\\g<0>", marked))
