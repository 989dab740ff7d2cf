"""Values of a config.json, each checked when it is read. All raise `AssetError` with the name of the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from kernelforge.errors import AssetError
from kernelforge_llm.config_keys import shorten


def value_or(values: Mapping[str, Any], key: str, default: Any) -> Any:
    """What a key has; the default where it is absent or null."""
    value = values.get(key)
    return default if value is None else value


def required(values: Mapping[str, Any], key: str) -> Any:
    """What a key has that must be there."""
    if values.get(key) is None:
        raise AssetError(f"{key} is missing")
    return values[key]


def string(values: Mapping[str, Any], key: str, default: str) -> str:
    """As `value_or`, for text."""
    value = value_or(values, key, default)
    if not isinstance(value, str):
        raise AssetError(f"{key} must be a string, not {shorten(value)}")
    return value


def is_int(value: object) -> TypeGuard[int]:
    """Whether it is a number that JSON writes without a point; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_size(key: str, value: object, limit: int) -> None:
    """Raises AssetError unless it is an integer from 1 to `limit`."""
    if not is_int(value):
        raise AssetError(f"{key} must be an integer, not {shorten(value)}")
    if not 1 <= value <= limit:
        raise AssetError(f"{key} must be from 1 to {limit}, not {shorten(value)}")


def set_number(config: object, name: str, key: str, *, above: float, most: float) -> None:
    """Checks a field and makes it a float, as JSON may have an integer there."""
    value = getattr(config, name)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise AssetError(f"{key} must be a number, not {shorten(value)}")
    if not above < value <= most:  # false for a NaN too
        raise AssetError(f"{key} must be above {above:g} and at most {most:g}, not {shorten(value)}")
    object.__setattr__(config, name, float(value))
