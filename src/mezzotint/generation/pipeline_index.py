"""Read and check `model_index.json`, the index of a diffusers pipeline, before anything is built.

The folder is not trusted: each class must be a component class of diffusers or transformers, and
each
component must lie inside the folder.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mezzotint.builtin import PIPELINE_INDEX, is_pipeline
from mezzotint.errors import BrokenFile, NotACheckpoint, UnknownFormat, Unsupported, join_names
from mezzotint.hub import AnyPath
from mezzotint.untrusted.config_limits import RESTORE
from mezzotint.untrusted.json import read_object
from mezzotint.untrusted.library_failures import convert_errors

TRANSFORMER, TRANSFORMER_2, VAE, SCHEDULER = "transformer", "transformer_2", "vae", "scheduler"
TRANSFORMERS = (TRANSFORMER, TRANSFORMER_2)
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,99}", re.ASCII)
"""Names of classes and of components. A component's name is also its folder's name."""
CONFIG_FILES = {
    "diffusers": {"ModelMixin": "config.json", "SchedulerMixin": "scheduler_config.json"},
    "transformers": {
        "PreTrainedModel": "config.json",
        "PreTrainedTokenizerBase": "tokenizer_config.json",
        "ProcessorMixin": "preprocessor_config.json",
        "ImageProcessingMixin": "preprocessor_config.json",
        "FeatureExtractionMixin": "preprocessor_config.json",
    },
}
"""{library: {base class of components: their configuration file}}"""


class _Settings(BaseModel):
    """Entries of an index that change what is generated. Components are checked one by one."""

    model_config = ConfigDict(strict=True, extra="ignore")
    class_name: Annotated[str, Field(alias="_class_name", pattern=f"^{NAME.pattern}$")]
    is_distilled: bool | None = None
    expand_timesteps: bool | None = None
    boundary_ratio: Annotated[float, Field(ge=0, le=1)] | None = None


@dataclass(frozen=True)
class Component:
    """One component of a pipeline: the class that loads it, and its folder."""

    name: str
    library: str
    class_name: str
    folder: AnyPath

    @cached_property
    def base(self) -> str:
        """Return the name of the base class in CONFIG_FILES."""
        return next(base for base in CONFIG_FILES[self.library] if self._is_a(base))

    @property
    def config_file(self) -> AnyPath:
        return self.folder / CONFIG_FILES[self.library][self.base]

    @cached_property
    def cls(self) -> Any:
        """Return the class of diffusers or transformers.

        Raises  UnknownFormat if it does not exist or is not a component; Unsupported if it lacks a
                library
        """
        where = f"{self.folder.parent / PIPELINE_INDEX}: {self.name}"
        if self.library not in CONFIG_FILES:
            raise UnknownFormat(
                f"{where} is of library {self.library}, and those that are read are "
                f"{' and '.join(CONFIG_FILES)}",
                "code that comes with a pipeline is never run; use a pipeline of these libraries' "
                "own classes.",
            )
        found = named_class(self._module, self.class_name, where)
        if not any(
            issubclass(found, getattr(self._module, base)) for base in CONFIG_FILES[self.library]
        ):
            raise UnknownFormat(
                f"{where} is {self.class_name}, a class of {self.library}, but not a component",
                RESTORE,
            )
        return found

    @property
    def _module(self) -> ModuleType:
        import diffusers
        import transformers

        modules: dict[str, ModuleType] = {"diffusers": diffusers, "transformers": transformers}
        return modules[self.library]

    def _is_a(self, base: str) -> bool:
        return issubclass(self.cls, getattr(self._module, base))


@dataclass(frozen=True)
class PipelineIndex:
    """A checked model_index.json.

    entries      contents of the file
    pipeline     the pipeline's class
    components   {name: component} that the pipeline has
    known        names of the components that the class takes
    absent       names of components that are missing, and needed to generate from a prompt
    """

    folder: AnyPath
    entries: Mapping[str, Any]
    pipeline: type[Any]
    components: Mapping[str, Component]
    known: tuple[str, ...]
    absent: tuple[str, ...]

    def class_of(self, name: str) -> str | None:
        """Return the class name of a component, or None if the pipeline does not have it."""
        return self.components[name].class_name if name in self.components else None

    def config_of(self, name: str) -> dict[str, Any]:
        """Return a component's configuration. Raises BrokenFile; UnknownFormat if it is absent."""
        if name not in self.components:
            raise UnknownFormat(
                f"{self.folder / PIPELINE_INDEX}: the pipeline has no {name}", RESTORE
            )
        return read_object(self.components[name].config_file)

    def moved_to(self, folder: AnyPath) -> "PipelineIndex":
        """Return the index of a copy of the same pipeline in `folder`.

        Raises  NotACheckpoint if the copy lacks a component's folder; BrokenFile for a link that
                leaves it
        """
        moved = {
            name: _checked(replace(component, folder=folder / name), folder)
            for name, component in self.components.items()
        }
        return replace(self, folder=folder, components=moved)


def read_index(folder: AnyPath) -> PipelineIndex:
    """Read the index of the pipeline in `folder`, and check every component that it names.

    Raises   NotACheckpoint, BrokenFile, UnknownFormat, Unsupported
    """
    _check_folder(folder)
    where = folder / PIPELINE_INDEX
    check_link(where, folder)
    entries = read_object(where)
    try:
        settings = _Settings.model_validate(entries)
    except ValidationError as error:
        raise BrokenFile(f"{where}: {first_fault(error)}", RESTORE) from error
    pipeline = _pipeline_class(settings.class_name, where)
    expected, optional = _components_of(pipeline)
    components = {component.name: component for component in _components(folder, entries, expected)}
    missing = [name for name in expected if name not in entries and name not in optional]
    if missing:
        raise BrokenFile(
            f"{where}: has no {join_names(missing)}, and a {settings.class_name} needs one", RESTORE
        )
    absent = tuple(name for name in expected if name not in {*components, *optional})
    return PipelineIndex(folder, entries, pipeline, components, tuple(expected), absent)


def named_class(module: ModuleType, name: str, where: str) -> Any:
    """Return a class of diffusers or transformers.

    Raises  UnknownFormat if it does not exist; Unsupported if it needs a library that is not
            installed
    """
    with convert_errors(f"{where} is {name}", "cannot be imported", RESTORE):
        found = getattr(module, name, None) if NAME.fullmatch(name) else None
    if not isinstance(found, type):
        raise UnknownFormat(
            f"{where} is {name[:100]!r}, which is not a class of {module.__name__} "
            f"{module.__version__}",
            f"{RESTORE} A class that is newer than the library needs a newer one.",
        )
    lacking = getattr(found, "_backends", None)
    if found.__module__.rpartition(".")[2].startswith("dummy_") and lacking:
        raise Unsupported(
            f"{where} is {name}, which needs {', '.join(lacking)}", "install what is missing."
        )
    return found


def first_fault(error: ValidationError) -> str:
    """Describe the first problem that pydantic found: the entry, and what is expected."""
    fault = error.errors(include_url=False, include_input=False)[0]
    entry = ".".join(str(part)[:100] for part in fault["loc"])
    return f"{entry}: {fault['msg'][:1].lower()}{fault['msg'][1:]}"


def _check_folder(folder: AnyPath) -> None:
    """Raise NotACheckpoint, with what was found instead, if `folder` holds no pipeline."""
    if is_pipeline(folder):
        return
    if folder.is_file():
        raise NotACheckpoint(
            f"{folder}: is a file, expected the folder of a diffusers pipeline",
            "name the folder of a pipeline as --model, and the file as --transformer.",
        )
    if not folder.is_dir():
        raise NotACheckpoint(f"{folder}: no such file or folder", "check the path, or the Hub id.")
    raise NotACheckpoint(
        f"{folder}: no diffusers pipeline is there ({PIPELINE_INDEX} is missing)",
        "name the folder of a pipeline as --model, and the quantized file as --transformer.",
    )


def _pipeline_class(name: str, where: AnyPath) -> type[Any]:
    """Return the pipeline's own class.

    DiffusionPipeline does not know the optional components of a class. It would load Wan's
    transformers from the folder even if other ones are passed (diffusers 0.42).
    """
    import diffusers

    found: type[Any] = named_class(diffusers, name, f"{where}: its pipeline class")
    if not issubclass(found, diffusers.DiffusionPipeline):
        raise UnknownFormat(
            f"{where}: its pipeline class is {name}, which is not a pipeline of diffusers", RESTORE
        )
    return found


def _components_of(pipeline: type[Any]) -> tuple[list[str], list[str]]:
    """Return the component names that a class takes, and the optional ones among them."""
    parameters = list(inspect.signature(pipeline.__init__).parameters.values())[1:]
    optional = list(pipeline._optional_components)
    required = [one.name for one in parameters if one.default is inspect.Parameter.empty]
    return [one.name for one in parameters if one.name in {*required, *optional}], optional


def _components(
    folder: AnyPath, entries: Mapping[str, Any], expected: list[str]
) -> Iterator[Component]:
    """Yield the components of an index: every list, and every entry that the class expects."""
    where = folder / PIPELINE_INDEX
    for name, value in entries.items():
        if name.startswith("_") or not (isinstance(value, list) or name in expected):
            continue
        if not NAME.fullmatch(name):
            raise BrokenFile(f"{where}: {name[:100]!r} is not a component's folder name", RESTORE)
        if value == [None, None]:
            continue
        if not (
            isinstance(value, list)
            and len(value) == 2
            and all(isinstance(part, str) for part in value)
        ):
            raise BrokenFile(
                f"{where}: {name} is {_shortened(value)}, expected [library, class]", RESTORE
            )
        library, class_name = value
        yield _checked(Component(name, library, class_name, folder / name), folder)


def _checked(component: Component, folder: AnyPath) -> Component:
    """Check that a component's class exists, and that its folder lies in the pipeline's folder."""
    _ = component.cls
    if not component.folder.is_dir():
        raise NotACheckpoint(
            f"{folder}: has no component {component.name}, and {PIPELINE_INDEX} names one",
            "download the missing folder again.",
        )
    check_link(component.folder, folder)
    return component


def check_link(path: AnyPath, folder: AnyPath) -> None:
    """Raise BrokenFile for a link that leaves a pipeline's folder and the blobs of its Hub cache.

    In huggingface_hub's cache, files of `snapshots/<commit>` are links into `blobs` of the same
    repository.
    """
    if not isinstance(path, Path) or not isinstance(folder, Path) or not path.is_symlink():
        return
    root = folder.resolve()
    homes = [root, *([root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [])]
    if not any(path.resolve().is_relative_to(home) for home in homes):
        raise BrokenFile(
            f"{path}: is a link that leads out of the pipeline's folder",
            "put a copy there: a pipeline is read from its own folder only.",
        )


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
