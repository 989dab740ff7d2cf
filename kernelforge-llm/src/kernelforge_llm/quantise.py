"""A model's weights in 8 or 4 bits, written as a folder that loads by mapping it, and how far they are from the original."""

from __future__ import annotations

import re
import uuid
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from kernelforge.dtype import FLOATS, GROUP, WEIGHT_FORMATS, from_numpy
from kernelforge.errors import KernelForgeWarning, UsageError
from kernelforge.quant import dequantize, quantize, warn_not_quantised
from kernelforge_llm.checkpoint import OPTIONAL_FILES, write_json, write_tokenizer
from kernelforge_llm.config import CONFIG_FILE, GENERATION_FILE
from kernelforge_llm.draft import new_folder
from kernelforge_llm.layer_error import product_error, product_inputs
from kernelforge_llm.quantised_folder import PACKED, WEIGHTS, PackedWriter, QuantisedFolder, WeightsWriter
from kernelforge_llm.scale_search import search_q4
from kernelforge_llm.source import Source

if TYPE_CHECKING:
    from kernelforge.session import Session
    from kernelforge_llm.checkpoint import TensorSource

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Choice = Literal["same", "q8", "q4", "none"]
"""A format; "same": that of the other matrices, "none": as it is."""

SAMPLED = 1 << 20
"""Elements of a matrix, in whole rows, by which its error is judged."""


@dataclass(frozen=True)
class Recipe:
    """Which matrix becomes what."""

    weights: Literal["q8", "q4"] = "q4"
    embeddings: Choice = "same"
    """Of the table of embeddings, also where the output head multiplies by it."""
    head: Choice = "same"
    """Of an output head of its own."""
    skip: str = ""
    """A regular expression: matrices in whose name it is found stay as they are."""
    search: bool = False
    """Choose the scales of q4 by least squares (`scale_search`), which takes minutes for a billion numbers."""
    _skip: re.Pattern[str] | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        """Raises UsageError for a format or an expression that is none."""
        for name, value, known in (
            ("weights", self.weights, tuple(WEIGHT_FORMATS)),
            ("embeddings", self.embeddings, get_args(Choice)),
            ("head", self.head, get_args(Choice)),
        ):
            if value not in known:
                raise UsageError(f"{name} cannot be '{value}'", hint=f"one of: {', '.join(known)}")
        try:
            object.__setattr__(self, "_skip", re.compile(self.skip) if self.skip else None)
        except re.error as error:
            raise UsageError(f"'{self.skip}' is not a regular expression: {error}") from None

    def skips_nothing_of(self, names: Iterable[str]) -> bool:
        """Whether something was to be skipped, and none of these is."""
        return self._skip is not None and not any(map(self._skip.search, names))

    def format_of(self, name: str) -> str:
        """The format of a matrix, or "none"."""
        if self._skip is not None and self._skip.search(name):
            return "none"
        chosen = {EMBEDDINGS: self.embeddings, HEAD: self.head}.get(name, "same")
        return self.weights if chosen == "same" else chosen


class Quantised(NamedTuple):
    """One tensor as it is written."""

    name: str
    dtype: str
    nbytes: int
    error: float | None
    """Root mean square of the differences over that of the numbers; None where nothing was changed."""
    product_error: float | None = None
    """The same of what activations of a text are multiplied to (`layer_error`); None without a text."""


def quantised_tensors(tensors: TensorSource, recipe: Recipe) -> Iterator[tuple[Quantised, NDArray[Any]]]:
    """All tensors in turn, one in memory at a time. Matrices whose rows are no multiple of 32 elements stay as they are, and
    a warning names them. Raises UsageError for numbers that cannot be quantised, with the tensor's name."""
    if recipe.skips_nothing_of(tensors.names()):
        told = f"no tensor has '{recipe.skip}' in its name: nothing is left out"
        warnings.warn(KernelForgeWarning(told), stacklevel=2)
    left = []
    for name in tensors.names():
        array = tensors.tensor(name)
        have, wanted = from_numpy(array.dtype), recipe.format_of(name)
        error = None
        if len(tensors.shape(name)) == 2 and have in (*FLOATS, *WEIGHT_FORMATS) and wanted not in ("none", have):
            if tensors.shape(name)[-1] % GROUP:
                left.append(name)
            else:
                array, error = _quantised(name, array, wanted, recipe.search)
        yield Quantised(name, from_numpy(array.dtype), array.nbytes, error), array
    if left:
        warn_not_quantised(left)


def _quantised(name: str, array: NDArray[Any], dtype: str, search: bool) -> tuple[NDArray[Any], float]:
    if from_numpy(array.dtype) in WEIGHT_FORMATS:
        array = dequantize(array)
    try:
        made: NDArray[Any] = search_q4(array) if search and dtype == "q4" else quantize(array, dtype)
    except UsageError as error:
        raise UsageError(f"tensor {name!r}: {error}", hint=error.hint) from None
    rows = slice(None, None, max(1, array.size // SAMPLED))
    return made, relative_error(array[rows].astype(np.float32), dequantize(made[rows]))


def relative_error(want: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Root mean square of the differences over that of the numbers; 0 for zeros."""
    size = float(np.square(want, dtype=np.float64).sum())
    return (float(np.square(want - found, dtype=np.float64).sum()) / size) ** 0.5 if size else 0.0


class Written(NamedTuple):
    tensors: tuple[Quantised, ...]
    nbytes: int
    """Of all tensors."""
    packed_bytes: int
    """Of what is packed for the device."""


def write_quantised(source: Source, folder: Path, recipe: Recipe, session: Session) -> Written:
    """Write `source` as a folder of quantised weights, packed for the session's device.

    The folder appears whole or not at all; one that is there must be empty or hold such weights, which are replaced.
    Raises UsageError for another, or for numbers that cannot be quantised, KernelForgeError if it cannot be written or another
    process writes it.
    """
    identity, count = uuid.uuid4().hex, len(source.tensors.names())
    with new_folder(folder, lambda name: name == PACKED or name in OPTIONAL_FILES) as draft:
        if folder.is_dir() and any(folder.iterdir()) and not (folder / WEIGHTS).is_file():
            raise UsageError(f"{folder} is there and holds something else", hint="choose a new folder")
        write_json(draft / CONFIG_FILE, source.config)
        if source.generation:
            write_json(draft / GENERATION_FILE, source.generation)
        write_tokenizer(draft, source.folder or source.tokenizer)
        tensors = []
        with closing(WeightsWriter(draft / WEIGHTS, identity, count)) as weights:
            for described, array in quantised_tensors(source.tensors, recipe):
                weights.add(described.name, array)
                tensors.append(described)
        packed = _write_packed(source, draft, session)
    return Written(tuple(tensors), sum(t.nbytes for t in tensors), packed)


def _write_packed(source: Source, draft: Path, session: Session) -> int:
    """What compiling the model packs."""
    from kernelforge_llm.decoder import open_decoder

    stored = QuantisedFolder(draft)
    with closing(PackedWriter(draft / PACKED, stored.identity, len(stored.names()))) as writer:
        stored.writer = writer
        open_decoder(Source(source.name, source.config, source.generation, stored), session).prepare()
    return writer.nbytes


def with_product_errors(
    tensors: Sequence[Quantised], before: Source, after: Source, session: Session, ids: Sequence[int]
) -> tuple[Quantised, ...]:
    """The tensors with the errors of their products, on what `before` computes for the sequence `ids`."""
    changed = any(t.error is not None for t in tensors)
    multiplied = product_inputs(before, session, ids) if changed else {}
    found = []
    for t in tensors:
        x = multiplied.get(t.name) if t.error is not None else None
        if x is not None:
            t = t._replace(product_error=product_error(x, before.tensors.tensor(t.name), after.tensors.tensor(t.name)))
        found.append(t)
    return tuple(found)
