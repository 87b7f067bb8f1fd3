"""A report on one component of an all-in-one file, such as its text encoder or its VAE."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mezzotint.builtin import COMPONENT, resolve
from mezzotint.errors import BadRequest, CheckpointError
from mezzotint.formats import Header, detect_format
from mezzotint.formats.companion_files import open_header
from mezzotint.formats.file_components import (
    TEXT_ENCODER,
    FileComponent,
    component_alone,
    find_component,
)
from mezzotint.formats.renaming import Renames
from mezzotint.hub import AnyPath

NAMES = {TEXT_ENCODER: "transformers' names"}
MAKERS_NAMES = "the makers' names; diffusers maps them with from_single_file"


@dataclass(frozen=True)
class ComponentReport:
    """What one component of an all-in-one file consists of.

    component      its name in the file
    tensors        number of tensors
    names          whose names the tensors have, without the component's prefix
    format         how the component is quantized, or why that is not known
    schemes        {scheme: number of quantized layers}
    dtypes         {dtype: bytes}
    stored_bytes   bytes of all tensors
    """

    path: AnyPath
    component: str
    kind: str
    tensors: int
    names: str
    format: str
    schemes: Mapping[str, int]
    dtypes: Mapping[str, int]
    stored_bytes: int

    @classmethod
    def of(cls, component: FileComponent, header: Header) -> "ComponentReport":
        """Return the report of a component and the header of its tensors."""
        form, schemes = _format(header)
        dtypes: Counter[str] = Counter()
        for info in header.tensors.values():
            dtypes[str(info.dtype).removeprefix("torch.")] += info.nbytes
        return cls(
            path=header.path,
            component=component.name,
            kind=component.kind,
            tensors=len(header.tensors),
            names=NAMES.get(component.kind, MAKERS_NAMES),
            format=form,
            schemes=schemes,
            dtypes=dict(dtypes),
            stored_bytes=header.nbytes(),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path)}


def is_in_file(path: str | AnyPath, component: str | None) -> bool:
    """Return whether `component` is part of a single file, not a folder of a pipeline."""
    return component not in (None, COMPONENT) and resolve(path).is_file()


def open_component(
    path: str | AnyPath, component: str, rename: Renames | None = None
) -> tuple[FileComponent, Header]:
    """Return a component of a single file, and the header of its tensors without their prefix.

    Raises   CheckpointError; BadRequest if the file has no such component
    """
    file = resolve(path)
    if not file.is_file():
        raise BadRequest(
            f"{path}: is a folder, and not one file with several components",
            "name the component's own folder.",
        )
    header = open_header(file, rename=rename)
    found = find_component(header, component)
    return found, component_alone(header, found)


def inspect_component(
    path: str | AnyPath, component: str, rename: Renames | None = None
) -> ComponentReport:
    """Report on one component of an all-in-one file.

    component   "text_encoder" or "vae" if the file has one, or the component's name in the file
    rename      {regular expression: replacement} for names of the tensors, in order
    Raises      CheckpointError; BadRequest if the file has no such component
    """
    return ComponentReport.of(*open_component(path, component, rename))


def _format(header: Header) -> tuple[str, dict[str, int]]:
    """Return the format's title, or why none is known, and {scheme: number of layers}."""
    try:
        form = detect_format(header).format
        linears = form.contents(header).linears.values()
    except CheckpointError as error:
        return f"not known: {error.message}", {}
    return form.title, dict(Counter(linear.scheme.name for linear in linears))
