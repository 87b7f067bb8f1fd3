"""Find the objects that the modules of a package declare, so that adding one is adding a file."""

import importlib
import pkgutil
from types import ModuleType
from typing import Any


def collect(package: ModuleType, attribute: str) -> dict[str, Any]:
    """{object.name: object} for every module of `package` that defines `attribute`, ordered by name."""
    found = {}
    for module in pkgutil.iter_modules(package.__path__):
        loaded = importlib.import_module(f"{package.__name__}.{module.name}")
        if hasattr(loaded, attribute):
            item = getattr(loaded, attribute)
            found[item.name] = item
    return dict(sorted(found.items()))
