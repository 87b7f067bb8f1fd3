"""What one component's files say before a tensor is read: their tensors, metadata, shards and configuration.

`read_file` has checked every claim about tensors, so that later code may trust a `Header`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mezzotint.bounded_json import parse_object, read_object
from mezzotint.errors import BrokenFile, NotACheckpoint, NotSafetensors, UnexpectedTensor, listed
from mezzotint.formats.safetensors_file import MAX_TENSORS, TensorInfo, read_file
from mezzotint.hub import AnyPath, HubPath

INDEX = ".safetensors.index"
INDEX_SUFFIX = f"{INDEX}.json"
MAX_FILE_NAME = 255
"""Bytes of a file's name; no file system here has more."""
AGAIN = "download the index again."
OTHER_WEIGHTS = (".gguf", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".onnx")
"""How files of weights end that are not read; `folder.glob` finds them."""
NUNCHAKU_FOLDER = ("transformer_blocks.safetensors", "unquantized_layers.safetensors")
"""The two files that make up one component in Nunchaku's older folders, which have no index."""


@dataclass(frozen=True)
class Header:
    """One component's files, read as far as their headers.

    path             what the caller named
    tensors          {key: TensorInfo} over all files
    metadata         the safetensors `__metadata__` of all files, merged
    config           the diffusers configuration in the metadata, else config.json beside the files, else {}
    notes            oddities that do not stop a load, for the report
    hf_quant_config  hf_quant_config.json beside the files, or {}
    aside            {tensor of another component: reason}; `tensors` is without these
    """

    path: AnyPath
    files: tuple[AnyPath, ...]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    hf_quant_config: Mapping[str, Any] = field(default_factory=dict)
    aside: Mapping[str, str] = field(default_factory=dict)

    @property
    def local(self) -> bool:
        """Whether every file is here, so that numbers may be read to recognise it; on the Hub, headers alone are."""
        return all(isinstance(file, Path) for file in self.files)

    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def fetch(self) -> None:
        """Bring files that are on the Hub here, before many of their tensors are read one by one."""
        for file in self.files:
            if isinstance(file, HubPath):
                file.fetch()


def read_header(path: str | AnyPath) -> Header:
    """Header of a safetensors file, or of a folder that holds one component's file or shards.

    Raises  NotACheckpoint, BrokenFile, UnexpectedTensor
    """
    path = Path(path) if isinstance(path, str) else path
    if path.is_file():
        return header_of_files(path, [path], path.parent)
    if not path.is_dir():
        raise NotACheckpoint(f"{path}: no such file or folder")
    files, notes = _weight_files(path)
    return header_of_files(path, files, path, notes)


def header_of_files(
    path: AnyPath, files: Iterable[AnyPath], config_folder: AnyPath, notes: Iterable[str] = ()
) -> Header:
    """Header over exactly these files; a tensor that two of them hold is an error."""
    files = tuple(files)
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for file in files:
        infos, meta = read_file(file)
        for name, info in infos.items():
            if name in tensors:
                raise UnexpectedTensor(
                    f"tensor {name} is stored twice: in {tensors[name].file.name} and in {file.name}",
                    "one of the shards is from another export; download the whole folder again.",
                )
            tensors[name] = info
        metadata |= meta
    config = _config_in(metadata) or _read_config(config_folder / "config.json")
    quant_config = _read_config(config_folder / "hf_quant_config.json")
    return Header(path, files, tensors, metadata, config, tuple(notes), quant_config)


def _weight_files(folder: AnyPath) -> tuple[list[AnyPath], list[str]]:
    """The component's weight files in `folder`, and what is odd about them."""
    present, notes = without_variants(sorted(folder.glob("*.safetensors")))
    index = index_of(folder, present)
    if index is None:
        if [file.name for file in present] == list(NUNCHAKU_FOLDER):
            return present, []
        if len(present) > 1:
            names = ", ".join(file.name for file in present[:4])
            raise NotACheckpoint(
                f"{folder}: {len(present)} weight files and no index that joins them ({names})",
                "name one file.",
            )
        if not present:
            raise _no_weights(folder)
        return present, notes
    wanted: list[AnyPath] = [folder / name for name in sorted(set(weight_map(index).values()))]
    missing = [file.name for file in wanted if not file.is_file()]
    single: AnyPath = folder / single_of(index)
    if missing and single in present:
        note = f"ignored {index.name}: it names {missing[0]}, which is not there, beside a complete {single.name}"
        return [single], [note]
    if missing:
        raise BrokenFile(
            f"{index}: names {len(missing)} shard(s) that are not there: {', '.join(missing[:4])}",
            "download the missing files again.",
        )
    named = {file.name for file in wanted}
    extra = [file.name for file in present if file.name not in named]
    return wanted, [*notes, *(f"ignored {name}: the index does not name it" for name in extra)]


def index_of(folder: AnyPath, present: Sequence[AnyPath] = ()) -> AnyPath | None:
    """The index of a component's shards, that without a variant first; None where one whole file goes before it.

    A variant's index is called STEM.safetensors.index.VARIANT.json, and its shards STEM.VARIANT-00001-of-...
    """
    found: list[AnyPath] = sorted(folder.glob(f"*{INDEX}*.json"))
    plain = [index for index in found if index.name.endswith(INDEX_SUFFIX)]
    whole = {file.name for file in present}
    variants = [
        index for index in found if index not in plain and f"{index.name.partition(INDEX)[0]}.safetensors" not in whole
    ]
    return next(iter([*plain, *variants]), None)


def single_of(index: AnyPath) -> str:
    """Name of the one file that would hold what an index's shards hold."""
    stem, _, rest = index.name.partition(INDEX)
    variant = rest.removesuffix(".json")
    return f"{stem}{variant}.safetensors"


def without_variants(present: Sequence[AnyPath]) -> tuple[list[AnyPath], list[str]]:
    """The weight files without the variants of those beside them, STEM.VARIANT.safetensors; a note on each of these."""
    stems = {file.name.removesuffix(".safetensors") for file in present}
    kept, notes = [], []
    for file in present:
        stem = file.name.removesuffix(".safetensors").rpartition(".")[0]
        if stem and stem in stems:
            notes.append(f"ignored {file.name}: a variant of {stem}.safetensors, which is taken")
        else:
            kept.append(file)
    return kept, notes


def _no_weights(folder: AnyPath) -> NotACheckpoint:
    if (folder / "model_index.json").is_file():
        return NotACheckpoint(
            f"{folder}: is a whole pipeline, not one component",
            f"name a component, such as {folder / 'transformer'}.",
        )
    others = [file.name for kind in OTHER_WEIGHTS for file in folder.glob(f"*{kind}")]
    if others:
        return NotSafetensors(
            f"{folder}: holds no .safetensors file, only {listed(others)}",
            "take the safetensors form of the model.",
        )
    return NotACheckpoint(
        f"{folder}: holds no .safetensors file",
        "name a safetensors file, or the folder of a diffusers component.",
    )


def weight_map(index: AnyPath) -> dict[str, str]:
    """Return an index's {tensor: name of the shard that holds it}.

    Raises  BrokenFile if it is no index, names too many tensors, or names a shard outside its folder
    """
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise BrokenFile(f"{index}: has no weight_map", AGAIN)
    if len(names) > MAX_TENSORS:
        raise BrokenFile(f"{index}: names {len(names):,} tensors, over the limit of {MAX_TENSORS:,}", AGAIN)
    if any(not isinstance(shard, str) for shard in names.values()):
        raise BrokenFile(f"{index}: its weight_map names a shard by what is no string", AGAIN)
    if any(not is_file_name(shard) for shard in names.values()):
        raise BrokenFile(f"{index}: names a shard outside its folder", AGAIN)
    return names


def is_file_name(name: str) -> bool:
    """Return whether a string can be the name of a file in a folder: one segment, and not the folder itself."""
    return bool(name) and Path(name).name == name != ".." and "\0" not in name and len(name.encode()) <= MAX_FILE_NAME


def _config_in(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The diffusers configuration that a single file carries in its metadata; other tools' `config` is left alone."""
    try:
        value = parse_object(metadata.get("config", "{}"), "config")
    except BrokenFile:
        return {}
    return value if "_class_name" in value else {}


def _read_config(file: AnyPath) -> dict[str, Any]:
    return read_object(file) if file.is_file() else {}
