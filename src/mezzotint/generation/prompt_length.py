"""Detect prompts that a pipeline cuts silently, because they exceed its text encoder's limit."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from diffusers import DiffusionPipeline

from mezzotint.families import Sampling

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
LENGTH = "max_sequence_length"
SHOWN = 60
"""Maximum characters of a prompt in a note."""


def cut_prompts(
    pipe: DiffusionPipeline, prompts: Sequence[str], sampling: Sampling
) -> tuple[str, ...]:
    """Return one sentence for each prompt and tokenizer that cuts it.

    A chat template that the pipeline adds is not counted.
    """
    return tuple(
        note for prompt in dict.fromkeys(prompts) for note in _notes(pipe, prompt, sampling)
    )


def _notes(pipe: DiffusionPipeline, prompt: str, sampling: Sampling) -> Iterator[str]:
    shown = prompt if len(prompt) <= SHOWN else f"{prompt[:SHOWN]}..."
    for name, tokenizer in _tokenizers(pipe).items():
        limit, count = _limit(pipe, name, tokenizer, sampling), _count(tokenizer, prompt)
        if count > limit:
            yield f"{shown!r} is cut: {name} reads {limit} tokens, and it has {count}"


def _tokenizers(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Return the tokenizers by name, including those inside processors of text and images."""
    found = {name: getattr(pipe, name, None) for name in TOKENIZERS}
    return {name: getattr(own, "tokenizer", own) for name, own in found.items() if own is not None}


def _limit(pipe: DiffusionPipeline, name: str, tokenizer: Any, sampling: Sampling) -> int:
    """Return how many tokens a tokenizer reads.

    The first of several tokenizers is CLIP's, which always reads its own number.
    """
    parameter = inspect.signature(pipe.__call__).parameters.get(LENGTH)
    if parameter is None or (name == TOKENIZERS[0] and len(_tokenizers(pipe)) > 1):
        return int(tokenizer.model_max_length)
    return sampling.max_sequence_length or int(parameter.default)


def _count(tokenizer: Any, prompt: str) -> int:
    return len(tokenizer(prompt, truncation=False, verbose=False)["input_ids"])
