"""The GGUF container: header, metadata, and where each tensor lies. Every number is checked before it is used.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernelforge.errors import AssetError
from kernelforge_llm.config_keys import shorten
from kernelforge_llm.gguf import MAGIC

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

_MOST_DIMENSIONS = 4
_MOST_NAME_BYTES = 64
_MOST_KEY_BYTES = 1 << 16
_MOST_ALIGNMENT = 1 << 20
_LEAST_PAIR_BYTES = 13  # an empty key, a type, a value of one byte
_LEAST_TENSOR_BYTES = 24  # an empty name, no dimensions, a type, an offset

# type id of a metadata value -> its struct code; strings and arrays are apart
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class BlockType:
    """How ggml stores the numbers of a tensor: `nbytes` for every `size` elements of a row."""

    name: str
    size: int
    nbytes: int


TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    8: BlockType("Q8_0", 32, 34),
    14: BlockType("Q6_K", 256, 210),
    30: BlockType("BF16", 1, 2),
}
"""Those that are read, by their number in the file."""

_OTHER_TYPES = {
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}


@dataclass(frozen=True)
class GgufEntry:
    """A tensor: bytes `start` to `stop` of the file, row-major."""

    type: BlockType
    shape: tuple[int, ...]
    """Outermost axis first: the reverse of the order in the file."""
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class GgufFile:
    """A file's metadata, and its tensors through a memory map."""

    path: Path
    metadata: Mapping[str, Any]
    """Numbers, booleans and strings; lists of strings; numpy arrays of numbers."""
    entries: Mapping[str, GgufEntry]
    data: NDArray[np.uint8]
    """The whole file."""

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Map a file and check all of its header. Raises `AssetError`."""
        import numpy as np

        try:
            with path.open("rb") as file:
                if path.stat().st_size < len(MAGIC):
                    raise AssetError(f"{path} is no GGUF file: it has {path.stat().st_size} bytes")
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise AssetError(f"{path} cannot be read: {error.strerror or error}") from None
        try:
            metadata, entries = _Reader(mapped).header()
        except AssetError as error:
            raise AssetError(f"{path}: {error}", hint=error.hint or "fetch the file again") from None
        return cls(path, metadata, entries, np.frombuffer(mapped, np.uint8))


class _Reader:
    """Reads from the beginning of a file on; each method moves `at` behind what it returns."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.size, self.at = data, len(data), 0

    def header(self) -> tuple[dict[str, Any], dict[str, GgufEntry]]:
        if self.data[: len(MAGIC)] != MAGIC:
            raise AssetError(f"is no GGUF file: it begins with {self.data[: len(MAGIC)]!r}, not {MAGIC!r}")
        self.at = len(MAGIC)
        version = self.number("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            what = "is a big-endian file" if swapped else f"has version {version} of the format"
            raise AssetError(
                f"{what}, which is not supported", hint="convert the model again, little-endian, version 3"
            )
        tensors = self.count("tensors", _LEAST_TENSOR_BYTES)
        pairs = self.count("metadata pairs", _LEAST_PAIR_BYTES)
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.string("a metadata key", _MOST_KEY_BYTES)
            if key in metadata:
                raise AssetError(f"metadata key {shorten(key)} is there twice")
            metadata[key] = self.value(key, self.number("I"))
        if metadata.get("split.count", 1) not in (0, 1):
            raise AssetError(
                f"is one of {shorten(metadata['split.count'])} parts of a model",
                hint="put them together: llama-gguf-split --merge FIRST_PART WHOLE.gguf",
            )
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment % 8 or not 8 <= alignment <= _MOST_ALIGNMENT:
            raise AssetError(f"general.alignment is {shorten(alignment)}, must be a multiple of 8")
        described: dict[str, tuple[BlockType, tuple[int, ...], int]] = {}
        for _ in range(tensors):
            name = self.string("a tensor's name", _MOST_NAME_BYTES)
            if name in described:
                raise AssetError(f"tensor {name!r} is there twice")
            described[name] = self.tensor(name)
        return metadata, self.placed(described, alignment)

    def number(self, code: str) -> Any:
        size = struct.calcsize(f"<{code}")
        self.need(size, "a number")
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += size
        return value

    def need(self, nbytes: int, what: str) -> None:
        if nbytes > self.size - self.at:
            raise AssetError(
                f"is cut off: {what} at byte {self.at} needs {nbytes} bytes, {self.size - self.at} are left"
            )

    def count(self, what: str, least: int) -> int:
        """A number of things that take at least so many bytes each."""
        value: int = self.number("Q")
        if value * least > self.size - self.at:
            raise AssetError(f"claims to hold {value} {what}, in {self.size - self.at} bytes")
        return value

    def string(self, what: str, most: int | None = None) -> str:
        length: int = self.number("Q")
        if most is not None and length > most:
            raise AssetError(f"{what} at byte {self.at - 8} has {length} bytes, more than {most}")
        self.need(length, what)
        raw = self.data[self.at : self.at + length]
        self.at += length
        return _text(raw, what)

    def value(self, key: str, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.string(f"the value of {shorten(key)}")
        if kind == _ARRAY:
            return self.array(key)
        raise AssetError(f"metadata key {shorten(key)} has a value of unknown type {kind}")

    def array(self, key: str) -> Any:
        import numpy as np

        kind = self.number("I")
        if kind in _NUMBERS:
            dtype = np.dtype(_NUMBERS[kind] if _NUMBERS[kind] != "?" else "u1").newbyteorder("<")
            length = self.count(f"elements of {shorten(key)}", dtype.itemsize)
            array = np.frombuffer(self.data, dtype, length, self.at).copy()
            self.at += array.nbytes
            return array
        if kind == _STRING:
            return self.strings(key)
        raise AssetError(f"metadata key {shorten(key)} is an array of values of type {kind}, which is not supported")

    def strings(self, key: str) -> list[str]:
        """`string`, as fast as Python can: vocabularies have some hundred thousand."""
        count = self.count(f"strings in {shorten(key)}", 8)
        data, at, size, found = self.data, self.at, self.size, []
        length_at: Callable[..., tuple[int]] = struct.Struct("<Q").unpack_from
        what = f"a string of {shorten(key)}"
        for _ in range(count):
            start = at + 8
            self.at = at
            if start > size or (at := start + length_at(data, at)[0]) > size:
                raise AssetError(f"is cut off in {what} at byte {self.at}")
            found.append(_text(data[start:at], what))
        self.at = at
        return found

    def tensor(self, name: str) -> tuple[BlockType, tuple[int, ...], int]:
        rank = self.number("I")
        if not 1 <= rank <= _MOST_DIMENSIONS:
            raise AssetError(f"tensor {name!r} has {rank} dimensions, must have from 1 to {_MOST_DIMENSIONS}")
        shape = tuple(reversed([int(self.number("Q")) for _ in range(rank)]))
        number, offset = self.number("I"), self.number("Q")
        if number not in TYPES:
            what = _OTHER_TYPES.get(number, f"number {number}")
            supported = ", ".join(t.name for t in TYPES.values())
            raise AssetError(
                f"tensor {name!r} is stored as {what}, which is not supported",
                hint=f"quantise the model as one of {supported} (llama-quantize MODEL OUT Q4_0)",
            )
        block = TYPES[number]
        if min(shape) < 1 or math.prod(shape) > self.size * block.size:
            raise AssetError(f"tensor {name!r} of shape {list(shape)} cannot be in a file of {self.size} bytes")
        if shape[-1] % block.size:
            raise AssetError(
                f"tensor {name!r} has rows of {shape[-1]} elements, {block.name} wants {block.size} together"
            )
        return block, shape, offset

    def placed(
        self, described: Mapping[str, tuple[BlockType, tuple[int, ...], int]], alignment: int
    ) -> dict[str, GgufEntry]:
        """Tensors lie one behind the other, each at a multiple of `alignment` after the header."""
        data = end = -(-self.at // alignment) * alignment
        entries = {}
        for name, (block, shape, offset) in sorted(described.items(), key=lambda item: item[1][2]):
            start = data + offset
            if start != -(-end // alignment) * alignment:
                what = "overlaps the one before it" if start < end else f"is not where it should be (byte {end} on)"
                raise AssetError(f"tensor {name!r} at byte {start} {what}")
            end = start + math.prod(shape) // block.size * block.nbytes
            if end > self.size:
                raise AssetError(f"is cut off: tensor {name!r} ends at byte {end} of {self.size}")
            entries[name] = GgufEntry(block, shape, start, end)
        if self.size - end >= alignment:
            raise AssetError(f"has {self.size - end} bytes after the last tensor")
        return {name: entries[name] for name in described}


def _text(raw: bytes, what: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise AssetError(f"{what} is not UTF-8: {shorten(raw)}") from None
