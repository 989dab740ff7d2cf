"""Files that nobody vouches for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kernelforge.errors import AssetError


def read_json_object(path: Path, limit_bytes: int = 1 << 26) -> dict[str, Any]:
    """The JSON object in a file that nobody vouches for. Raises `AssetError` with the file's name."""
    try:
        if path.stat().st_size > limit_bytes:
            raise AssetError(f"{path} has {path.stat().st_size} bytes, more than the {limit_bytes} that can be meant")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise AssetError(
            f"{path} cannot be read: {error.strerror or error}",
            hint="a model is a folder with config.json, *.safetensors and tokenizer.json",
        ) from None
    except (ValueError, RecursionError) as error:
        raise AssetError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise AssetError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def decoded(read: Callable[[], bytes], what: str) -> str:
    """What is read, as text. Raises AssetError when it cannot be read, or is not UTF-8."""
    try:
        return read().decode()
    except OSError as error:
        raise AssetError(f"cannot read {what}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise AssetError(f"cannot read {what}: {error}") from None
