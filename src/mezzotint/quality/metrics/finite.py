"""Conversion of non-finite numbers to None, because JSON has neither NaN nor infinity."""

import math
from collections.abc import Mapping
from typing import Any


def finite_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with every non-finite number replaced by None, also in nested values."""
    return {key: finite(value) for key, value in values.items()}


def finite(value: Any) -> Any:
    """Return the value, or None if it is a non-finite number. Lists and dicts are copied."""
    if isinstance(value, dict):
        return finite_values(value)
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
