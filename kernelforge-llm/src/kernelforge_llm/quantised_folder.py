"""Folders of quantised weights, as `llm-quantize` writes them: portable blocks, and beside them what a device packed.

`weights.kfq` holds every tensor once, by name: floats as they are, quantised ones as bytes of groups (`kernelforge.quant`).
`packed.kfq` holds constants in the layouts of the kernels that one device chose; it is a cache, and may be deleted. Both are
safetensors files. Beside them are config.json and the tokenizer, as in any checkpoint's folder.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from kernelforge.dtype import GROUP, QUANTISED, WEIGHT_FORMATS, to_numpy
from kernelforge.errors import AssetError, KernelForgeWarning
from kernelforge_llm.checkpoint import missing_tensor
from kernelforge_llm.config_keys import shorten
from kernelforge_llm.safetensors_file import TensorEntry, read_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WEIGHTS = "weights.kfq"
PACKED = "packed.kfq"
FORMAT = "1"
ALIGNMENT = 64

_FORMATS = "kernelforge.formats"
_ID = "kernelforge.id"
_VERSION = "kernelforge.format"
_CONSTANTS = "kernelforge.constants"


class QuantisedFolder:
    """A `kernelforge.backend.PackedSource` of memory-mapped files."""

    def __init__(self, folder: Path) -> None:
        """Raises `AssetError` for a file that is broken, or of a later version."""
        self.folder = folder
        self._entries, metadata = read_file(folder / WEIGHTS)
        self.identity = _checked(folder / WEIGHTS, metadata)
        self._formats = _json_object(folder / WEIGHTS, metadata, _FORMATS)
        for name, dtype in self._formats.items():
            entry = self._entries.get(name)
            fits = dtype in WEIGHT_FORMATS and entry is not None and entry.dtype_code == "U8" and len(entry.shape) > 0
            if not fits or entry is None or entry.shape[-1] % QUANTISED[dtype]:
                raise AssetError(f"{folder / WEIGHTS}: tensor {name!r} is not of the format {shorten(dtype)}")
        self._data = _mapped(folder / WEIGHTS)
        self._packed: dict[str, TensorEntry] = {}
        self.writer: PackedWriter | None = None
        """Where what is packed goes."""
        self._missed = False
        self._open_packed(folder / PACKED)

    def _open_packed(self, path: Path) -> None:
        if not path.is_file():
            return
        entries, metadata = read_file(path)
        if _checked(path, metadata) != self.identity:
            warnings.warn(f"{path} belongs to other weights, and is not used", KernelForgeWarning, stacklevel=4)
            return
        for key, name in _json_object(path, metadata, _CONSTANTS).items():
            if name not in entries or entries[name].dtype_code != "U8" or entries[name].start % ALIGNMENT:
                raise AssetError(f"{path}: the constant {shorten(key)} is not there", hint=f"delete {path.name}")
            self._packed[key] = entries[name]
        self._packed_data = _mapped(path)

    def names(self) -> tuple[str, ...]:
        """All tensors, in the order of the file."""
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises `AssetError` if there is no such tensor, as `dtype` and `tensor` do."""
        entry = self._entry(name)
        if name not in self._formats:
            return entry.shape
        return (*entry.shape[:-1], entry.shape[-1] // QUANTISED[self._formats[name]] * GROUP)

    def dtype(self, name: str) -> np.dtype[Any]:
        """That of a group, for quantised tensors."""
        entry = self._entry(name)
        return to_numpy(self._formats[name]) if name in self._formats else entry.dtype

    def tensor(self, name: str) -> NDArray[Any]:
        """A read-only view of the file."""
        import numpy as np

        entry = self._entry(name)
        raw = self._data[entry.start : entry.stop]
        if name in self._formats:
            return raw.view(self.dtype(name)).reshape(*entry.shape[:-1], -1)
        return np.require(raw.view(entry.dtype).reshape(entry.shape), requirements=["C", "A"])

    def packed(self, constant: str, layout: str, nbytes: int) -> NDArray[Any] | None:
        entry = self._packed.get(_key(constant, layout))
        if entry is None or entry.shape[0] - nbytes not in range(ALIGNMENT):
            return None
        return self._packed_data[entry.start : entry.start + nbytes]

    def keep(self, constant: str, layout: str, array: NDArray[Any]) -> NDArray[Any]:
        """Hands it to the writer, if there is one. Otherwise says, once, that the file has other layouts."""
        if self.writer is not None:
            return self.writer.add(_key(constant, layout), array)
        if self._packed and not self._missed:
            self._missed = True
            warnings.warn(
                f"{self.folder / PACKED} was made for another device or version, or for other --weights and --activations: "
                "weights are packed again at every start. After a change of device or version "
                f"`kernelforge llm-quantize --model {self.folder} -o {self.folder}` mends it",
                KernelForgeWarning,
                stacklevel=4,
            )
        return array

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._entries:
            raise missing_tensor(name, self.names(), str(self.folder))
        return self._entries[name]


class FileWriter:
    """A safetensors file, written tensor by tensor: the header, whose place is kept free, comes last."""

    def __init__(self, path: Path, header_bytes: int) -> None:
        """`header_bytes`: the most that the header may need."""
        self.path = path
        self._room = -(-(8 + header_bytes) // ALIGNMENT) * ALIGNMENT
        self._file: BinaryIO = path.open("w+b")
        self._file.seek(self._room)
        self._header: dict[str, Any] = {}
        self._end = 0

    def add(self, name: str, code: str, shape: tuple[int, ...], data: NDArray[np.uint8]) -> int:
        """Write the bytes of a tensor of safetensors' dtype `code`. Returns where in the file they begin."""
        self._file.write(data.data)
        self._file.flush()
        start, self._end = self._end, self._end + data.nbytes
        self._header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, self._end]}
        return self._room + start

    @property
    def nbytes(self) -> int:
        """Of tensors so far."""
        return self._end

    def close(self, metadata: Mapping[str, str]) -> None:
        text = json.dumps({"__metadata__": metadata, **self._header}, separators=(",", ":")).encode()
        assert len(text) <= self._room - 8
        self._file.seek(0)
        self._file.write((self._room - 8).to_bytes(8, "little") + text.ljust(self._room - 8))
        self._file.close()


class PackedWriter:
    """`packed.kfq` as constants come. Their memory is given up: what `add` returns is the file's."""

    def __init__(self, path: Path, identity: str, tensors: int) -> None:
        """`tensors`: how many the source has; their constants come in one or two layouts."""
        self._file = FileWriter(path, 4096 + 1024 * tensors)
        self._identity = identity
        self._names: dict[str, str] = {}

    def add(self, key: str, array: NDArray[Any]) -> NDArray[Any]:
        import numpy as np

        name = f"constant.{len(self._names)}"
        flat = array.reshape(-1).view(np.uint8)
        padded = -(-flat.nbytes // ALIGNMENT) * ALIGNMENT
        if padded > flat.nbytes:
            flat = np.concatenate([flat, np.zeros(padded - flat.nbytes, np.uint8)])
        at = self._file.add(name, "U8", (padded,), flat)
        self._names[key] = name
        written = np.memmap(self._file.path, np.uint8, "r", offset=at, shape=(array.nbytes,)).view(np.ndarray)
        return written.view(array.dtype).reshape(array.shape)

    @property
    def nbytes(self) -> int:
        return self._file.nbytes

    def close(self) -> None:
        self._file.close({_VERSION: FORMAT, _ID: self._identity, _CONSTANTS: json.dumps(self._names)})


class WeightsWriter:
    """`weights.kfq`, tensor by tensor."""

    def __init__(self, path: Path, identity: str, tensors: int) -> None:
        self._file = FileWriter(path, 4096 + 512 * tensors)
        self._identity = identity
        self._formats: dict[str, str] = {}

    def add(self, name: str, array: NDArray[Any]) -> None:
        """Floats, or groups."""
        import numpy as np

        from kernelforge.dtype import from_numpy

        dtype = from_numpy(array.dtype)
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if dtype in WEIGHT_FORMATS:
            self._formats[name] = dtype
            self._file.add(name, "U8", (*array.shape[:-1], array.shape[-1] * QUANTISED[dtype]), flat)
        else:
            self._file.add(name, dtype.upper(), array.shape, flat)

    @property
    def nbytes(self) -> int:
        return self._file.nbytes

    def close(self) -> None:
        self._file.close({_VERSION: FORMAT, _ID: self._identity, _FORMATS: json.dumps(self._formats)})


def _key(constant: str, layout: str) -> str:
    """A constant's key is long: it spells out the ops that it is computed by."""
    import hashlib

    return hashlib.sha256(f"{layout}\0{constant}".encode()).hexdigest()


def _mapped(path: Path) -> NDArray[np.uint8]:
    import numpy as np

    return np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)


def _checked(path: Path, metadata: Mapping[str, Any]) -> str:
    """The identity of the weights that a file holds."""
    if metadata.get(_VERSION) != FORMAT:
        raise AssetError(
            f"{path} has version {shorten(metadata.get(_VERSION))} of the format, not {FORMAT}",
            hint="write it again: kernelforge llm-quantize",
        )
    return str(metadata.get(_ID))


def _json_object(path: Path, metadata: Mapping[str, Any], key: str) -> dict[str, str]:
    try:
        found = json.loads(metadata.get(key, ""))
    except (TypeError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise AssetError(f"{path} has no list {key} in its metadata", hint="write it again: kernelforge llm-quantize")
    return found
