"""Optional libraries: whether one is installed, is the right one, and is new enough. None is imported to find out."""

from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from packaging.version import Version


@dataclass(frozen=True)
class Library:
    """A library that a backend rests on.

    distribution   its name where packages are installed from
    package        what is imported
    least          the oldest version whose functions are called as they are here
    source         what to do to get it
    holds          a module inside the package, where that tells it from another project of its name
    """

    distribution: str
    package: str
    least: str
    source: str
    holds: str = ""

    def missing(self) -> str | None:
        """Why it cannot be used here, or None."""
        spec = find_spec(self.package)
        if spec is None:
            return f"needs {self.distribution}, which is not installed ({self.source})"
        try:
            found = version(self.distribution)
        except PackageNotFoundError:
            return f"the {self.package} at {spec.origin} is not {self.distribution} ({self.source})"
        if self.holds and PathFinder.find_spec(self.holds, spec.submodule_search_locations or []) is None:
            return (
                f"the {self.package} {found} that is installed is an unrelated project of that name: "
                f"it has no {self.package}.{self.holds} ({self.source})"
            )
        if Version(found) < Version(self.least):
            return f"needs {self.distribution} {self.least} or newer, {found} is installed ({self.source})"
        return None
