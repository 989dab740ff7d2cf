"""The safetensors file format, read as untrusted input.

Eight bytes of little-endian header length, a JSON object of `name -> {dtype, shape, data_offsets}`, then the tensors'
bytes without gap or overlap (https://huggingface.co/docs/safetensors, section "Format").
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from kernelforge.errors import AssetError
from kernelforge_llm.config_keys import shorten

if TYPE_CHECKING:
    import numpy as np

_MOST_HEADER_BYTES = 100_000_000
_MOST_DIMENSIONS = 32

# dtype in the file -> numpy's (or ml_dtypes') name and bytes per element
_DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "F32": ("float32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: bytes `start` to `stop` of `file`, row-major."""

    file: Path
    dtype_code: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy dtype; bfloat16 and the 8-bit floats are those of ml_dtypes."""
        import numpy as np

        name = _DTYPES[self.dtype_code][0]
        if not hasattr(np, name):
            import ml_dtypes

            name = getattr(ml_dtypes, name)
        return np.dtype(name)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name, each checked against the file's size. Raises `AssetError`."""
    return read_file(path)[0]


def read_file(path: Path) -> tuple[dict[str, TensorEntry], dict[str, Any]]:
    """As `read_header`, with the file's metadata, whatever that is."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
                raise AssetError(
                    f"{path} is cut off or no safetensors file: a header of {length} bytes in a file of {size}",
                    hint="fetch the file again",
                )
            text = file.read(length)
    except OSError as error:
        raise AssetError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        header = json.loads(text, object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise AssetError(f"{path}: the safetensors header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise AssetError(f"{path}: the safetensors header is a JSON {type(header).__name__}, not an object")
    metadata = header.pop("__metadata__", None)
    entries = {name: _parse_entry(path, name, value, 8 + length, size) for name, value in header.items()}
    _check_layout(path, entries, 8 + length, size)
    return entries, metadata if isinstance(metadata, dict) else {}


def _parse_entry(path: Path, name: str, value: Any, data_start: int, size: int) -> TensorEntry:
    def refuse(why: str) -> AssetError:
        return AssetError(f"{path}: tensor {name!r} {why}", hint="fetch the file again")

    if not isinstance(value, dict):
        raise refuse(f"is described by {shorten(value)}, not an object")
    code, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(code, str) or code not in _DTYPES:
        raise refuse(f"has dtype {shorten(code)}, which is not supported")
    if not _are_counts(shape) or len(shape) > _MOST_DIMENSIONS:
        raise refuse(f"has shape {shorten(shape)}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"has data_offsets {shorten(offsets)}")
    start, stop = data_start + offsets[0], data_start + offsets[1]
    if stop > size:
        raise refuse(f"ends at byte {stop} of a file that has {size}")
    needed = math.prod(shape) * _DTYPES[code][1]
    if needed != stop - start:
        raise refuse(f"of shape {shape} and dtype {code} needs {needed} bytes and has {stop - start}")
    return TensorEntry(path, code, tuple(shape), start, stop)


def _check_layout(path: Path, entries: dict[str, TensorEntry], data_start: int, size: int) -> None:
    """Refuses tensors that share bytes, and bytes that no tensor owns (a place to hide things)."""
    end = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            what = "overlaps the tensor before it" if entry.start < end else "leaves a gap before it"
            raise AssetError(f"{path}: tensor {name!r} {what}", hint="fetch the file again")
        end = entry.stop
    if end != size:
        raise AssetError(f"{path}: {size - end} bytes after the last tensor", hint="fetch the file again")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return result


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)
