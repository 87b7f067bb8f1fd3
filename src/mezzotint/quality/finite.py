"""Numbers as JSON knows them: None for those that are not finite."""

import math
from collections.abc import Mapping
from typing import Any


def finite_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values, lists and dicts among them looked through."""
    return {key: finite(value) for key, value in values.items()}


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return finite_values(value)
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
