"""The command line that makes a comparison, from the arguments that were given, also where Python gave them."""

import shlex
from collections.abc import Mapping, Sequence


def command_line(sources: Sequence[str], **options: object) -> str:
    """Return `mezzotint compare ...`, quoted for a shell; options that are None are left out.

    size      {"width": pixels, "size": pixels}, the second is the height; alone it is both
    metrics   names
    """
    words = ["mezzotint", "compare", *sources]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", _word(value)]
    return shlex.join(words)


def _word(value: object) -> str:
    if isinstance(value, Mapping):
        return "x".join(str(value[side]) for side in ("width", "size") if side in value)
    return ",".join(value) if isinstance(value, list | tuple) else str(value)
