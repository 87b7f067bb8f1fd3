"""Limits on a component's configuration, checked before a library reads it."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mezzotint.errors import UnknownFormat

RESTORE = "restore the file that came with the pipeline, or download it again."
CODE = ("auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code")
"""Entries of a configuration that request code from the repository."""
ATTENTION = ("attn_implementation", "_attn_implementation")
"""Entries that may name a repository of kernels, `owner/name`, which is code too."""
DEPTHS = re.compile(r"(layers|blocks|depth)$")
MAX_DEPTH = 1000
"""Most layers: far more than any known model has, and few enough to build."""
COUNTS = re.compile(r"^(num|n)_|^extra_ids$")
MAX_COUNT = 2**16
NO_SIZES = re.compile(r"theta|base|pixels|edge|seed|max_length|total|_ids?$")
"""Entries that are not the size of a tensor: angles, image areas, tokenizer limits, tokens."""
MAX_SIZE = 2**20
"""Limit of all other integers; vocabularies and positions of known models are below 300,000."""


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Check that a configuration requests no code and no unreasonable sizes.

    where    name of the file, for the message
    Raises   UnknownFormat
    """
    for key, value in _entries(config):
        named = isinstance(value, str) and "/" in value
        if (key in CODE and value) or (key in ATTENTION and named):
            raise UnknownFormat(
                f"{where}: {key} requests code from the model's repository, which is never run",
                "use a copy of the model with classes of diffusers and transformers.",
            )
        if type(value) is int:
            _check_number(key, value, where)


def _check_number(key: str, value: int, where: str) -> None:
    if DEPTHS.search(key) and value > MAX_DEPTH:
        raise UnknownFormat(
            f"{where}: {key} is {_digits(value)}, and no known model has more than {MAX_DEPTH}",
            RESTORE,
        )
    counts = COUNTS.search(key) is not None
    most = MAX_COUNT if counts else MAX_SIZE
    if value > most and (counts or not NO_SIZES.search(key)):
        raise UnknownFormat(
            f"{where}: {key[:100]} is {_digits(value)}, and no known model has more than {most:,}",
            RESTORE,
        )


def _digits(value: int) -> str:
    return str(value) if value < 10**20 else "a number of more than 20 digits"


def _entries(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of every nested entry; items of a list have the list's key.

    `read_object` has bounded the depth.
    """
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield str(name), inner
            yield from _entries(inner, str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield key, inner
            yield from _entries(inner, key)
