"""Text that others wrote, such as prompts and file names, as it may stand in a page, in Markdown and on a sheet."""

import re
import unicodedata

from markupsafe import Markup

STEERS = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode's categories of what steers a display instead of being seen: control, format, surrogate, separators."""
JOINER = "\u200d"
"""The one format character that is left alone: emoji and Indic letters are spelled with it."""
MARKDOWN = re.compile(r"[\\`*_{}\[\]#|~$]")
ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;"})
AUTOLINK = re.compile(r"(?<=:)/|(?<=www)\.", re.IGNORECASE)
AT_START = re.compile(r"^(\d*)(?=[-+.)=])")


def visible(text: str) -> str:
    """Return the text with everything that steers a display spelled out: an escape character is `\\x1b`."""
    if text.isascii() and text.isprintable():  # among them the images of a page, which are long
        return str(text)
    return "".join(_spelled(letter) if _steers(letter) else letter for letter in text)


def markdown(text: str) -> str:
    """Return the text so that Markdown shows it as it is, in one line, without links, mentions or HTML."""
    text = MARKDOWN.sub(r"\\\g<0>", visible(text)).translate(ENTITIES)
    return AT_START.sub(r"\1\\", AUTOLINK.sub(r"\\\g<0>", text))


def finalized(value: object) -> object:
    """Return a template's value as `visible` has it; Jinja escapes HTML afterwards, unless it is Markup."""
    if isinstance(value, Markup):
        return Markup("\n".join(map(visible, value.split("\n"))))  # noqa: S704  which adds nothing that HTML knows
    return visible(value) if isinstance(value, str) else value


def _steers(letter: str) -> bool:
    return letter != JOINER and unicodedata.category(letter) in STEERS


def _spelled(letter: str) -> str:
    code = ord(letter)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
