"""Limits of what a component's configuration may ask for, checked before a library is given it."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mezzotint.errors import UnknownFormat

RESTORE = "restore the file that came with the pipeline, or download it again."
CODE = ("auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code")
"""Entries of a configuration that ask for code of the repository's own."""
ATTENTION = ("attn_implementation", "_attn_implementation")
"""Entries that may name a repository of kernels, `owner/name`, which is code too."""
DEPTHS = re.compile(r"(layers|blocks|depth)$")
DEEPEST = 1000
"""Layers that a configuration may ask for: far more than any model has, and few enough to be built."""
COUNTS = re.compile(r"^(num|n)_|^extra_ids$")
MOST = 2**16
NO_SIZES = re.compile(r"theta|base|pixels|edge|seed|max_length|total|_ids?$")
"""Entries whose numbers are no size of anything built: angles, areas of images, limits of tokenizers, tokens."""
LARGEST = 2**20
"""What any other whole number may be; vocabularies and positions of known models are below 300,000."""


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Check that a configuration asks for no code, and for no more than models have.

    Raises  UnknownFormat
    """
    for key, value in _entries(config):
        named = isinstance(value, str) and "/" in value
        if (key in CODE and value) or (key in ATTENTION and named):
            raise UnknownFormat(
                f"{where}: {key} asks for code that comes with the model, which is never run",
                "use a copy of the model whose classes are those of diffusers and transformers.",
            )
        if type(value) is int:
            _check_number(key, value, where)


def _check_number(key: str, value: int, where: str) -> None:
    if DEPTHS.search(key) and value > DEEPEST:
        raise UnknownFormat(
            f"{where}: {key} is {_digits(value)}, and no known model has more than {DEEPEST}",
            RESTORE,
        )
    counts = COUNTS.search(key) is not None
    most = MOST if counts else LARGEST
    if value > most and (counts or not NO_SIZES.search(key)):
        raise UnknownFormat(
            f"{where}: {key[:100]} is {_digits(value)}, and no known model has more than {most:,}",
            RESTORE,
        )


def _digits(value: int) -> str:
    return str(value) if value < 10**20 else "a number of more than 20 digits"


def _entries(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every entry of nested objects and lists with the name that it is under; depth is bounded by `read_object`."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield str(name), inner
            yield from _entries(inner, str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield key, inner
            yield from _entries(inner, key)
