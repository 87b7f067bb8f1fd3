"""Download the files of a Hub pipeline, except for the weights of its transformers."""

from pathlib import Path

from mezzotint.builtin import PIPELINE_INDEX
from mezzotint.generation.pipeline_index import (
    TRANSFORMER,
    TRANSFORMER_2,
    TRANSFORMERS,
    PipelineIndex,
)
from mezzotint.generation.sampling_file import SAMPLING_FILE
from mezzotint.hub import HubPath

DOWNLOADED_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")
SKIPPED_VARIANTS = (".fp16.", ".bf16.", ".non_ema.")
"""Parts of file names that mark second copies of weights."""


def localize(index: PipelineIndex) -> PipelineIndex:
    """Return the index with a local folder. Download a Hub pipeline's other components.

    Raises  MezzotintError if the Hub fails, or a component has no files
    """
    if not isinstance(index.folder, HubPath):
        return index
    return index.moved_to(_download_components(index, index.folder))


def is_downloaded(name: str) -> bool:
    """Return whether a pipeline is read from a file of this name inside a component's folder."""
    return name.endswith(DOWNLOADED_SUFFIXES) and not any(mark in name for mark in SKIPPED_VARIANTS)


def _download_components(index: PipelineIndex, folder: HubPath) -> Path:
    """Return the pipeline's folder in huggingface_hub's cache."""
    for name in (SAMPLING_FILE, f"{TRANSFORMER}/config.json", f"{TRANSFORMER_2}/config.json"):
        if (folder / name).is_file():
            (folder / name).fetch()
    for component in index.components.keys() - set(TRANSFORMERS):
        for file in (folder / component).glob("*"):
            if is_downloaded(file.name):
                file.fetch()
    return (folder / PIPELINE_INDEX).fetch().parent
