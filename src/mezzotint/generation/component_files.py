"""Check the files of a pipeline's component before a library reads them.

Configurations must be small JSON objects that request no code and have plausible sizes. Weights
must
be complete. Links must stay inside the pipeline.
"""

import os
from pathlib import Path

from mezzotint.containers import safetensors, torch_zip
from mezzotint.containers.shard_index import weight_map
from mezzotint.errors import BrokenFile, NotACheckpoint
from mezzotint.generation.pipeline_index import Component, check_link
from mezzotint.untrusted.config_limits import RESTORE, check_config
from mezzotint.untrusted.json import read_object

WEIGHTS = {"ModelMixin": "diffusion_pytorch_model", "PreTrainedModel": "model"}
"""{base class: stem of its weight files}"""
PICKLED = {"diffusion_pytorch_model": "diffusion_pytorch_model.bin", "model": "pytorch_model.bin"}
"""{stem: name of the weight file that PyTorch itself writes}"""
VOCABULARIES = ("tokenizer.json", "vocab.json")
"""JSON files that may be large; a library reads them without building Python objects."""
RECORDS = ("mezzotint.json", ".index.json", "hf_quant_config.json")
"""Suffixes of JSON files about the weights. They hold file sizes; their own readers check them."""
MAX_VOCABULARY_BYTES = 64 * 2**20


def check_component(component: Component, weights: bool = True) -> None:
    """Check the files of a component that is on this machine.

    weights   False if its weights are read from another checkpoint
    Raises    BrokenFile, NotACheckpoint, UnknownFormat; each names the component's file
    """
    folder = component.folder
    assert isinstance(folder, Path)  # noqa: S101
    _check_paths(folder)
    for file in sorted(folder.glob("*.json")):
        if file.name in VOCABULARIES:
            _check_vocabulary(file)
        elif not file.name.endswith(RECORDS):
            check_config(read_object(file), str(file))
    if component.base in WEIGHTS or component.base == "SchedulerMixin":
        read_object(component.config_file)
    if weights:
        _check_weights(component)


def stored_files(component: Component) -> list[Path]:
    """Return a component's weight files, if it has any. Raises NotACheckpoint, BrokenFile."""
    stem = WEIGHTS.get(component.base)
    folder = component.folder
    return [] if stem is None or not isinstance(folder, Path) else weight_files(folder, stem)


def weight_files(folder: Path, stem: str) -> list[Path]:
    """Return the weight files in a folder: safetensors if there are any, else PyTorch's own.

    Raises  NotACheckpoint, BrokenFile
    """
    for file in (f"{stem}.safetensors", PICKLED[stem]):
        single, index = folder / file, folder / f"{file}.index.json"
        # diffusers prefers the index to a single file; transformers prefers the single file.
        if single.is_file() and (stem == "model" or not index.is_file()):
            return [single]
        if index.is_file():
            return _shards(index)
    raise NotACheckpoint(
        f"{folder}: holds no {stem}.safetensors", "download the missing files again."
    )


def _shards(index: Path) -> list[Path]:
    shards = [index.parent / name for name in sorted(set(weight_map(index).values()))]
    missing = next((shard.name for shard in shards if not shard.is_file()), None)
    if missing is not None:
        raise BrokenFile(
            f"{index}: names {missing[:100]}, which is not there",
            "download the missing file again.",
        )
    return shards


def _check_paths(folder: Path) -> None:
    """Check that a folder has only files and folders, and no link out of the pipeline."""
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *files)):
            check_link(path, folder.parent)
            if not path.is_file() and not path.is_dir():
                raise BrokenFile(f"{path}: is neither a file nor a folder", RESTORE)


def _check_vocabulary(file: Path) -> None:
    if file.stat().st_size > MAX_VOCABULARY_BYTES:
        size = f"{file.stat().st_size:,}"
        raise BrokenFile(
            f"{file}: has {size} bytes, more than the {MAX_VOCABULARY_BYTES:,} of any vocabulary",
            RESTORE,
        )


def _check_weights(component: Component) -> None:
    """Read the headers of all weight files. PyTorch's files may hold nothing but tensors."""
    for file in stored_files(component):
        if file.suffix == ".safetensors":
            safetensors.CONTAINER.read(file)
        else:
            torch_zip.CONTAINER.read(file)
