"""Check that a transformer fits the other components of a pipeline."""

from typing import Any

from torch import nn

from mezzotint.errors import ShapeMismatch
from mezzotint.families import Family
from mezzotint.generation.pipeline_index import PipelineIndex

HINT = (
    "name a transformer of the same size as the pipeline, or the pipeline that the transformer "
    "belongs to."
)


def check_fit(
    family: Family, module: nn.Module, index: PipelineIndex, component: str, where: str
) -> None:
    """Raise ShapeMismatch if a transformer's widths differ from those of the other components.

    module      the transformer, with a complete configuration
    component   its name in the pipeline
    where       its file, for the message
    """
    config: Any = module.config
    for joint in family.joints:
        entry = next(
            (entry for entry in joint.entries if config.get(entry) is not None), joint.entries[0]
        )
        width = _width(index, joint.component, joint.width)
        if width is not None and config.get(entry) != joint.times * width:
            times = f"{joint.times} times " if joint.times > 1 else ""
            raise ShapeMismatch(
                f"{where}: {entry} is {config.get(entry)}, and {joint.component} of {index.folder} "
                f"makes it {joint.times * width} ({times}its {joint.width} of {width})",
                HINT,
            )
    channels = _width(index, component, "in_channels")
    if channels is not None and config.get("in_channels") != channels:
        raise ShapeMismatch(
            f"{where}: in_channels is {config.get('in_channels')}, and that of {index.folder}'s "
            f"own {component} is {channels}",
            HINT,
        )


def _width(index: PipelineIndex, component: str, entry: str) -> int | None:
    """Return an integer entry of a component's configuration, or of the language model in it."""
    if component not in index.components or not index.components[component].config_file.is_file():
        return None
    config = index.config_of(component)
    inner = config.get("text_config")
    value = config.get(entry, inner.get(entry) if isinstance(inner, dict) else None)
    return value if type(value) is int else None
