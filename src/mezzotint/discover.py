"""Find the objects that modules and plugins declare, so that adding one means adding a file.

A module of `mezzotint.families` declares a family by defining `FAMILY`. Another distribution
declares one through an entry point, here of its module `my_package.my_family`:

    [project.entry-points."mezzotint.families"]
    my_family = "my_package.my_family:FAMILY"

The group is "mezzotint." and the last part of the package's name: mezzotint.families,
mezzotint.schemes, mezzotint.containers, mezzotint.readers, mezzotint.writers, mezzotint.backends.
Source: https://packaging.python.org/en/latest/specifications/entry-points/
"""

import importlib
import pkgutil
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from mezzotint.errors import BrokenPlugin
from mezzotint.untrusted.library_failures import convert_errors


def collect(package: str, attribute: str) -> dict[str, Any]:
    """Return {object.name: object} of a package's modules and its plugins, ordered by name.

    attribute   the name under which a module declares its object; other modules are skipped
    Raises      BrokenPlugin if a plugin cannot be imported, has no name, or has one already in use
    """
    found = {item.name: item for item in _module_objects(package, attribute)}
    for plugin in entry_points(group=plugin_group(package)):
        item = _load(plugin)
        if item.name in found:
            raise BrokenPlugin(
                f"{_title(plugin)}: the name {item.name!r} is already in use", _uninstall(plugin)
            )
        found[item.name] = item
    return dict(sorted(found.items()))


def plugin_group(package: str) -> str:
    """Return the entry point group: `mezzotint.` and the last part of the package's name."""
    return f"mezzotint.{package.rpartition('.')[2]}"


def _module_objects(package: str, attribute: str) -> Iterator[Any]:
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        loaded = importlib.import_module(f"{package}.{module.name}")
        if hasattr(loaded, attribute):
            yield getattr(loaded, attribute)


def _load(plugin: EntryPoint) -> Any:
    with convert_errors(_title(plugin), "cannot be loaded", _uninstall(plugin), BrokenPlugin):
        item = plugin.load()
    if not isinstance(getattr(item, "name", None), str):
        raise BrokenPlugin(
            f"{_title(plugin)}: {plugin.value} has no attribute `name`", _uninstall(plugin)
        )
    return item


def _title(plugin: EntryPoint) -> str:
    return f"plugin {plugin.name} ({plugin.group})"


def _uninstall(plugin: EntryPoint) -> str:
    owner = plugin.dist.name if plugin.dist is not None else plugin.value
    return f"update or uninstall {owner}."
