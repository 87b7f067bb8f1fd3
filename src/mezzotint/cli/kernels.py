"""`--backend`, `--fast` and `--attention`, as every command that runs a model takes them."""

import sys
from collections.abc import Sequence
from typing import Any

from mezzotint.errors import BadRequest


def choice(given: Sequence[str]) -> str | dict[str, str] | None:
    """What `--backend` stands for: NAME for all layers, or SCHEME=NAME, repeated."""
    pairs = [entry.split("=", 1) for entry in given]
    if all(len(pair) == 2 for pair in pairs):
        return {scheme.replace("-", "_"): name for scheme, name in pairs} or None
    if len(given) > 1:
        raise BadRequest("--backend names one backend for all layers and more besides", "give SCHEME=NAME for each.")
    return given[0]


def is_fp8(attention: str | None) -> bool:
    """Whether the attention that was asked for rounds its inputs to FP8."""
    from mezzotint.speed.attention import ATTENTIONS

    return attention in ATTENTIONS and ATTENTIONS[attention].fp8


def make_fast(pipe: Any, attention: str | None) -> None:
    """Make a pipeline's transformers fast, and say on stderr what was left as it was."""
    from mezzotint.pipelines import transformers_of
    from mezzotint.speed import speed_up

    for name, model in transformers_of(pipe).items():
        report = speed_up(model, attention, scheduler=pipe.scheduler)
        for unfused in report.apart:
            print(f"note: {', '.join(unfused.layers)} stay apart: {unfused.reason}", file=sys.stderr)
        if report.outside is not None:
            print(
                f"note: no product of {name} ends in the activation behind it: that {report.outside}", file=sys.stderr
            )
        declined = ", ".join(f"{other} {reason}" for other, reason in report.declined.items())
        print(f"note: {name} runs attention {report.attention}{declined and f' ({declined})'}", file=sys.stderr)
