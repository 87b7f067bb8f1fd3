"""The files of a pipeline's component, checked before a library is given them.

Every configuration is a small JSON object that asks for no code and for no more than models have; weights are whole;
nothing is a link out of the pipeline, or anything but a file.
"""

import os
from pathlib import Path

from mezzotint.bounded_json import read_object
from mezzotint.config_limits import RESTORE, check_config
from mezzotint.errors import BrokenFile, NotACheckpoint
from mezzotint.formats.header import weight_map
from mezzotint.formats.safetensors_file import read_file
from mezzotint.formats.torch_file import read_torch_file
from mezzotint.pipeline_index import Component, check_link

WEIGHTS = {"ModelMixin": "diffusion_pytorch_model", "PreTrainedModel": "model"}
"""{base of a class: how the names of its files of weights begin}"""
PICKLED = {"diffusion_pytorch_model": "diffusion_pytorch_model.bin", "model": "pytorch_model.bin"}
"""{how those of safetensors begin: the name of what PyTorch itself writes}"""
VOCABULARIES = ("tokenizer.json", "vocab.json")
"""JSON files that are too large for a configuration, and that a library reads without building objects of Python."""
RECORDS = ("mezzotint.json", ".index.json", "hf_quant_config.json")
"""Ends of names of JSON files about the weights, whose numbers are sizes of files; their own readers check them."""
LARGEST_VOCABULARY = 64 * 2**20


def check_component(component: Component, weights: bool = True) -> None:
    """Check the files of a component that is on this machine.

    weights   False if its weights are read from elsewhere
    Raises    BrokenFile, NotACheckpoint, UnknownFormat, each naming the component's file
    """
    folder = component.folder
    assert isinstance(folder, Path)  # noqa: S101
    _check_places(folder)
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
    """The files of a component's weights, none if it has no weights. Raises NotACheckpoint, BrokenFile."""
    stem = WEIGHTS.get(component.base)
    folder = component.folder
    return [] if stem is None or not isinstance(folder, Path) else weight_files(folder, stem)


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The files that a component's weights are in: those of safetensors if there are any, else PyTorch's own.

    Raises  NotACheckpoint, BrokenFile
    """
    for file in (f"{stem}.safetensors", PICKLED[stem]):
        single, index = folder / file, folder / f"{file}.index.json"
        if single.is_file() and (stem == "model" or not index.is_file()):  # diffusers prefers the index
            return [single]
        if index.is_file():
            return _shards(index)
    raise NotACheckpoint(f"{folder}: holds no {stem}.safetensors", "download the missing files again.")


def _shards(index: Path) -> list[Path]:
    shards = [index.parent / name for name in sorted(set(weight_map(index).values()))]
    missing = next((shard.name for shard in shards if not shard.is_file()), None)
    if missing is not None:
        raise BrokenFile(f"{index}: names {missing[:100]}, which is not there", "download the missing file again.")
    return shards


def _check_places(folder: Path) -> None:
    """Check that all in a component's folder are files or folders, and that no link leads out of the pipeline."""
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *files)):
            check_link(path, folder.parent)
            if not path.is_file() and not path.is_dir():
                raise BrokenFile(f"{path}: is neither a file nor a folder", RESTORE)


def _check_vocabulary(file: Path) -> None:
    if file.stat().st_size > LARGEST_VOCABULARY:
        size = f"{file.stat().st_size:,}"
        raise BrokenFile(f"{file}: has {size} bytes, more than the {LARGEST_VOCABULARY:,} of any vocabulary", RESTORE)


def _check_weights(component: Component) -> None:
    """Read the headers of all files of weights; of PyTorch's own, what they hold besides tensors is refused."""
    for file in stored_files(component):
        if file.suffix == ".safetensors":
            read_file(file)
        else:
            read_torch_file(file)
