"""Check optional libraries without importing them: installed, the right project, new enough."""

from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from packaging.version import Version


@dataclass(frozen=True)
class OptionalLibrary:
    """A library that a backend requires.

    distribution         its name on the package index
    package              the name to import
    min_version          oldest supported version
    install_hint         how to install it
    expected_submodule   a submodule that another project with the same name does not have
    """

    distribution: str
    package: str
    min_version: str
    install_hint: str
    expected_submodule: str = ""

    def unavailable_reason(self) -> str | None:
        """Return why the library cannot be used, or None."""
        spec = find_spec(self.package)
        if spec is None:
            return f"needs {self.distribution}, which is not installed ({self.install_hint})"
        try:
            installed = version(self.distribution)
        except PackageNotFoundError:
            return (
                f"the {self.package} at {spec.origin} is not {self.distribution} "
                f"({self.install_hint})"
            )
        if not self._has_submodule(spec.submodule_search_locations):
            return (
                f"the installed {self.package} {installed} is an unrelated project with the same "
                f"name: it has no {self.package}.{self.expected_submodule} ({self.install_hint})"
            )
        if Version(installed) < Version(self.min_version):
            return (
                f"needs {self.distribution} {self.min_version} or newer, {installed} is installed "
                f"({self.install_hint})"
            )
        return None

    def _has_submodule(self, folders: list[str] | None) -> bool:
        if not self.expected_submodule:
            return True
        # `importlib.util.find_spec` would import the package to look into it.
        return PathFinder.find_spec(self.expected_submodule, folders or []) is not None
