"""Options of commands that run a model: `--backend`, `--fast` and `--attention`."""

import sys
from collections.abc import Sequence
from typing import Any

from mezzotint.errors import BadRequest


def parse_backend_choice(values: Sequence[str]) -> str | dict[str, str] | None:
    """Parse `--backend`: one NAME for all layers, or repeated SCHEME=NAME. Raises BadRequest."""
    pairs = [value.split("=", 1) for value in values]
    if all(len(pair) == 2 for pair in pairs):
        return {scheme.replace("-", "_"): name for scheme, name in pairs} or None
    if len(values) > 1:
        raise BadRequest(
            "--backend is repeated, and one value names no scheme",
            "give SCHEME=NAME for each.",
        )
    return values[0]


def speed_up_pipeline(pipe: Any, attention: str | None) -> None:
    """Speed up a pipeline's transformers. Print on stderr what was skipped and why."""
    from mezzotint.fast import speed_up
    from mezzotint.generation.pipeline import transformers_of

    for name, model in transformers_of(pipe).items():
        report = speed_up(model, attention, scheduler=pipe.scheduler).report
        for unfused in report.unfused:
            _note(f"{', '.join(unfused.layers)} are not fused: {unfused.reason}")
        if report.activation_fusion_skipped is not None:
            _note(
                f"activations of {name} are not fused into the GEMM: "
                f"that {report.activation_fusion_skipped}"
            )
        declined = ", ".join(f"{other} {reason}" for other, reason in report.declined.items())
        _note(f"{name} uses {report.attention} attention{declined and f' ({declined})'}")


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
