"""Escape text of files, servers and users before it is printed or written to a page.

A name in a file may hold terminal escape sequences, marks that change the direction of text, lone
surrogates, or 16 MB. It is escaped once, where it is printed.
"""

import re
import unicodedata

LONGEST = 200
"""Most characters of an untrusted value that a message shows."""
LONGEST_LINE = 4_000
"""Most characters of a message's line."""
INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories of control, format and surrogate characters, line and paragraph separators.

Source: https://www.unicode.org/reports/tr44/#General_Category_Values
"""
JOINERS = "\u200c\u200d"
"""Harmless format characters that Persian, Indic scripts and emoji need."""
MARKDOWN = re.compile(r"[\\`*_{}\[\]#|~$]")
ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;"})
AUTOLINK = re.compile(r"(?<=:)/|(?<=www)\.", re.IGNORECASE)
AT_START = re.compile(r"^(\d*)(?=[-+.)=])")


def printable(text: object, keep: str = "") -> str:
    r"""Return the text with control characters, direction marks and surrogates escaped, as in \x1b.

    keep   control characters to leave unescaped, such as "\n" in a message of several lines
    """
    string = str(text)
    if string.isascii() and string.isprintable():
        return string
    return "".join(
        c if c in keep or c in JOINERS or unicodedata.category(c) not in INVISIBLE else _escape(c)
        for c in string
    )


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
    """Return an untrusted value's repr for a message; see `cut`."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or an int of more than 4,300 digits
        return f"a {type(value).__name__} that is too large to show"
    return cut(text, longest)


def cut(text: str, longest: int = LONGEST) -> str:
    """Return the text, or its first `longest` characters and its length."""
    return text if len(text) <= longest else f"{text[:longest]}... ({len(text):,} characters)"


def message(text: object) -> str:
    """Return a message for stderr: control characters escaped, line breaks kept, long lines cut."""
    return "\n".join(cut(line, LONGEST_LINE) for line in printable(text, keep="\n").split("\n"))


def markdown(text: object) -> str:
    """Escape the text so that Markdown renders it literally, without links, mentions or HTML."""
    marked = MARKDOWN.sub(r"\\\g<0>", printable(text)).translate(ENTITIES)
    return AT_START.sub(r"\1\\", AUTOLINK.sub(r"\\\g<0>", marked))
