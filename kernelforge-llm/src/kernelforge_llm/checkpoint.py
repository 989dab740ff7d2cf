"""Checkpoints: standard Hugging Face folders of safetensors files, found, read through a memory map, and written."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kernelforge.errors import AssetError, UsageError
from kernelforge_llm.config import CONFIG_FILE, GENERATION_FILE
from kernelforge_llm.draft import new_folder
from kernelforge_llm.files import read_json_object
from kernelforge_llm.safetensors_file import TensorEntry, read_header

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kernelforge_llm.tokenizer import Tokenizer

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
OPTIONAL_FILES = (GENERATION_FILE, *TOKENIZER_FILES)
"""That not every model has: those of another must not stay beside its weights."""

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FOLDER_HINT = (
    "a model is a folder with config.json, model.safetensors and tokenizer.json, a GGUF file, or org/name on the Hub"
)


class TensorSource(Protocol):
    """Named tensors: a checkpoint on disk, or weights made up on the spot."""

    def names(self) -> tuple[str, ...]:
        """All tensors, in a fixed order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises `AssetError` if there is no such tensor, as `dtype` and `tensor` do."""
        ...

    def dtype(self, name: str) -> np.dtype[Any]:
        """The dtype that `tensor` has."""
        ...

    def tensor(self, name: str) -> NDArray[Any]:
        """The tensor, C-contiguous; not to be written to."""
        ...


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A folder's tensors. They are views of memory-mapped files: nothing is read before it is used."""

    folder: Path
    entries: Mapping[str, TensorEntry]
    maps: Mapping[Path, NDArray[np.uint8]]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Maps model.safetensors, or the shards that model.safetensors.index.json names. Raises `AssetError`."""
        import numpy as np

        placed = _read_index(folder)
        files = sorted(set(placed.values())) or [folder / WEIGHTS_FILE]
        entries: dict[str, TensorEntry] = {}
        for file in files:
            for name, entry in read_header(file).items():
                if name in entries:
                    raise AssetError(f"tensor {name!r} is both in {entries[name].file} and in {file}")
                entries[name] = entry
        for name, file in placed.items():
            if name not in entries or entries[name].file != file:
                raise AssetError(f"{folder / INDEX_FILE} places tensor {name!r} in {file.name}, which does not have it")
        maps = {file: np.memmap(file, dtype=np.uint8, mode="r").view(np.ndarray) for file in files}
        return cls(folder, entries, maps)

    def names(self) -> tuple[str, ...]:
        """All tensors, in the order of the files."""
        return tuple(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises `AssetError` if there is no such tensor, as `dtype` and `tensor` do."""
        return self._entry(name).shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """The dtype in the file; bfloat16 is that of ml_dtypes."""
        return self._entry(name).dtype

    def tensor(self, name: str) -> NDArray[Any]:
        """A read-only view of the file; a copy where the file does not align the tensor to its elements."""
        import numpy as np

        entry = self._entry(name)
        raw = self.maps[entry.file][entry.start : entry.stop]
        array = np.require(raw.view(entry.dtype).reshape(entry.shape), requirements=["C", "A"])
        array.flags.writeable = False
        return array

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self.entries[name]
        except KeyError:
            raise missing_tensor(name, self.names(), str(self.folder)) from None


def missing_tensor(name: str, names: tuple[str, ...], where: str) -> AssetError:
    """The error for a tensor that is asked for and not there; its hint is the most similar name."""
    close = difflib.get_close_matches(name, names, n=1)
    return AssetError(f"{where} has no tensor {name!r}", hint=f"the closest is {close[0]!r}" if close else None)


def save_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    tensors: TensorSource,
    *,
    generation: Mapping[str, Any] | None = None,
    tokenizer_from: Path | Tokenizer | None = None,
    shard_bytes: int = 2_000_000_000,
) -> None:
    """Writes a standard folder: config.json, generation_config.json (if not empty), weights, tokenizer files.

    The tokenizer's files are copied from the folder `tokenizer_from`, or written from a tokenizer. Above `shard_bytes`
    the weights are split, with an index; one shard at a time is in memory. A new folder appears whole or not at all; in
    one that is there already, the model in it is replaced, file by file, and other files are left alone.

    Raises `UsageError` if `folder` is a file or holds quantised weights, `KernelForgeError` if it cannot be written or another
    process writes it.
    """
    from kernelforge_llm.quantised_folder import WEIGHTS  # which imports this module

    with new_folder(folder, lambda name: _is_weights(name) or name in OPTIONAL_FILES) as draft:
        if (folder / WEIGHTS).is_file():
            raise UsageError(f"{folder} holds quantised weights, which would still be read", hint="choose a new folder")
        write_json(draft / CONFIG_FILE, config)
        if generation:
            write_json(draft / GENERATION_FILE, generation)
        write_tokenizer(draft, tokenizer_from)
        _write_weights(draft, tensors, shard_bytes)


def write_tokenizer(folder: Path, tokenizer_from: Path | Tokenizer | None) -> None:
    """The tokenizer's files, copied from another folder or written."""
    if isinstance(tokenizer_from, Path):
        for name in TOKENIZER_FILES:
            if (tokenizer_from / name).is_file():
                shutil.copyfile(tokenizer_from / name, folder / name)
    elif tokenizer_from is not None:
        tokenizer_from.save(folder)


def resolve_model(model: str | os.PathLike[str]) -> Path:
    """The folder of a model: a folder, a weights file in one, or `org/name` on the Hugging Face Hub.

    A name goes through `huggingface_hub`: its cache is used and its offline switch (`HF_HUB_OFFLINE=1`) honoured.
    Raises `AssetError`.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if _is_weights(path.name):
            return path.parent
        raise AssetError(f"{path} is not named as a checkpoint's weights are ({WEIGHTS_FILE})", hint=_FOLDER_HINT)
    if not REPO_ID.fullmatch(os.fspath(model)):
        raise AssetError(f"there is no model at {path}", hint=_FOLDER_HINT)
    return _download(os.fspath(model))


def _download(repo_id: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    files = [CONFIG_FILE, GENERATION_FILE, WEIGHTS_FILE, INDEX_FILE, "model-*-of-*.safetensors", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(repo_id, allow_patterns=files))
    except GatedRepoError:
        raise AssetError(
            f"{repo_id} is gated: its owner grants access to each user",
            hint=f"ask for access at {constants.ENDPOINT}/{repo_id}, then log in with: hf auth login",
        ) from None
    except RepositoryNotFoundError:
        raise AssetError(
            f"there is no folder {repo_id}, and no such model (or a private one) at {constants.ENDPOINT}",
            hint="check the spelling; for a private model log in with: hf auth login",
        ) from None
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise AssetError(
                f"{repo_id} is neither a folder nor in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set",
                hint=f"run once without HF_HUB_OFFLINE, or: hf download {repo_id}",
            ) from None
        raise AssetError(
            f"{repo_id} is neither a folder nor in the cache {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} "
            f"did not answer: {error.__cause__ or error}",
            hint="check the connection and try again",
        ) from None
    except Exception as error:  # the hub client passes on the errors of whichever HTTP library it is built on
        raise AssetError(f"{repo_id} could not be fetched from {constants.ENDPOINT}: {error}") from error


def _read_index(folder: Path) -> dict[str, Path]:
    """Tensor name -> shard; empty if the folder has a single weights file."""
    path = folder / INDEX_FILE
    if (folder / WEIGHTS_FILE).is_file():
        return {}
    if not path.is_file():
        others = sorted(p.name for p in folder.glob("*.bin")) if folder.is_dir() else []
        raise AssetError(
            f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}" + (f", only {others[0]}" if others else ""),
            hint="convert the weights to safetensors" if others else _FOLDER_HINT,
        )
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise AssetError(f"{path} has no weight_map")
    placed = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard):
            raise AssetError(f"{path} places tensor {name!r} in {shard!r}, which is no plain file name")
        placed[name] = folder / shard
    for shard_path in sorted(set(placed.values())):
        if not shard_path.is_file():
            raise AssetError(f"{shard_path} is missing, though {INDEX_FILE} names it", hint="fetch the model again")
    return placed


def _is_weights(name: str) -> bool:
    return name in (WEIGHTS_FILE, INDEX_FILE) or _SHARD.fullmatch(name) is not None


def _write_weights(folder: Path, tensors: TensorSource, shard_bytes: int) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    sizes = {name: math.prod(tensors.shape(name)) * tensors.dtype(name).itemsize for name in tensors.names()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        arrays = {name: np.asarray(tensors.tensor(name), order="C") for name in names}
        save_file(arrays, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / CONFIG_FILE, folder / file)  # save_file makes it readable by its owner alone
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """As the files of checkpoints are laid out."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
