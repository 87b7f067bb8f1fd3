"""Open the pipeline that `--model`, `--transformer` and their companions name."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mezzotint.generation.source import PipelineSource


def open_source(
    model: str,
    transformer: str | None,
    transformer_2: str | None,
    scales_from: str | None = None,
    rename: Sequence[str] | None = None,
) -> "PipelineSource":
    """Resolve and open the model once. Raises MezzotintError."""
    from mezzotint.formats.renaming import read_renames
    from mezzotint.generation.source import PipelineSource

    return PipelineSource.open(
        model,
        {"transformer": transformer, "transformer_2": transformer_2},
        scales_from=scales_from,
        rename=read_renames(rename or ()),
    )
