"""The command line that reproduces a comparison, built from the arguments of `compare`."""

import shlex
from collections.abc import Mapping, Sequence

OPTIONS = {"true_cfg_scale": "--true-cfg"}
"""{argument of `compare`: option}, where the option is not named like the argument"""


def command_line(sources: Sequence[str], **options: object) -> str:
    """Return `mezzotint compare ...`, quoted for a shell. Options that are None are omitted.

    Among the options, `size` is {"width": pixels, "height": pixels}, and a height alone means a
    square; `metrics` is a list of names.
    """
    words = ["mezzotint", "compare", *sources]
    for name, value in options.items():
        if value is not None:
            words += [OPTIONS.get(name, f"--{name.replace('_', '-')}"), _word(value)]
    return shlex.join(words)


def _word(value: object) -> str:
    if isinstance(value, Mapping):
        return "x".join(str(value[side]) for side in ("width", "height") if side in value)
    return ",".join(value) if isinstance(value, list | tuple) else str(value)
