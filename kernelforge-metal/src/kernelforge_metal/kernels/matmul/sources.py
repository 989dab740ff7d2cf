"""Where the tiles of a GEMM come from: blocks of four rows and four steps of the inner dimension of one operand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kernelforge.dtype import GROUP
from kernelforge_metal.kernels.matmul.numbers import floats, nibble, vector_element
from kernelforge_metal.kernels.matmul.weights import QUAD, Quads
from kernelforge_metal.kernels.quantised_activations import GROUP_WORDS
from kernelforge_metal.wgsl import element, load

if TYPE_CHECKING:
    from kernelforge.variant import DeviceInfo
    from kernelforge_metal.kernels.matmul.weights import Weights

BLOCK = 4
"""Rows, and steps, of a block."""


class Source(Protocol):
    """What a thread does for a block whose names begin with `n`: `<n>_r` is its row of blocks in the tile."""

    @property
    def name(self) -> str: ...

    @property
    def element(self) -> str:
        """Of its array."""
        ...

    @property
    def lines(self) -> int:
        """Rows of a block: 4, or 1, of which the numbers are stored one by one."""
        ...

    @property
    def by_lines(self) -> bool:
        """Whether `lines` may be 1."""
        ...

    @property
    def along_steps(self) -> bool:
        """Whether a vector is four steps of a row, else four rows of a step."""
        ...

    @property
    def functions(self) -> str: ...

    def setup(self, n: str) -> Iterator[str]:
        """Where the block's rows are."""
        ...

    def declare(self, n: str) -> Iterator[str]:
        """The variables that hold a block as it was loaded."""
        ...

    def load(self, n: str, block: str) -> Iterator[str]:
        """`block` counts blocks of steps from the first step of the inner dimension on."""
        ...

    def vectors(self, n: str) -> Iterator[str]:
        """v0 to v3 from what was loaded."""
        ...


@dataclass(frozen=True)
class Dense:
    """A matrix of floats anywhere in memory."""

    name: str
    dtype: str
    device: DeviceInfo
    start: str
    """Where the matrix starts, in elements."""
    first: str
    """Of the tile's rows."""
    last: str | None
    """The last row there is; None: every tile is full."""
    rows: int | None
    """How many there are, where this is known."""
    row_step: int
    inner_step: int
    inner: int
    ragged: bool
    """The last slab is not full."""
    lines: int = BLOCK

    @property
    def by_lines(self) -> bool:
        return self.along_steps

    @property
    def along_steps(self) -> bool:
        across = self.row_step == 1 and self.inner_step % BLOCK == 0
        return not (across and self.rows is not None and self.rows % BLOCK == 0)

    @property
    def wide(self) -> bool:
        """Whether a vector is one load."""
        if not self.along_steps:
            return True
        return self.inner_step == 1 and self.inner % BLOCK == 0 and self.row_step % BLOCK == 0

    @property
    def element(self) -> str:
        return vector_element(self.dtype) if self.wide else element(self.dtype, self.device)

    @property
    def functions(self) -> str:
        if self.wide:
            value = floats(f"{self.name}[at >> 2u]", self.dtype)
            return f"fn {self.name}_read(at: u32) -> vec4<f32> {{ return {value}; }}\n"
        value = load(self.name, self.dtype, self.device, "at")
        return f"fn {self.name}_read(at: u32) -> f32 {{ return {value}; }}\n"

    def setup(self, n: str) -> Iterator[str]:
        row = f"{self.first} + {n}_r * {self.lines}u"
        if not self.along_steps:
            at = row if self.last is None else f"min({row}, {self.last} - {BLOCK - 1}u)"
            yield f"let {n}_p = {self.start} + {at};"
            return
        for r in range(self.lines):
            at = f"({row} + {r}u)" if self.last is None else f"min({row} + {r}u, {self.last})"
            yield f"let {n}_p{r} = {self.start} + {at} * {self.row_step}u;"

    def declare(self, n: str) -> Iterator[str]:
        for r in range(self.lines):
            yield f"var {n}_v{r} = vec4<f32>();"

    def load(self, n: str, block: str) -> Iterator[str]:
        read, first, rows = f"{self.name}_read", f"{BLOCK}u * {block}", range(self.lines)
        if not self.along_steps:
            for r in rows:
                k = f"({first} + {r}u)"
                yield from self._guarded(k, {f"{n}_v{r}": f"{read}({n}_p + {k} * {self.inner_step}u)"})
        elif self.wide:
            yield from self._guarded(first, {f"{n}_v{r}": f"{read}({n}_p{r} + {first})" for r in rows})
        else:
            for j, lane in enumerate("xyzw"):
                k = f"({first} + {j}u)"
                numbers = {f"{n}_v{r}.{lane}": f"{read}({n}_p{r} + {k} * {self.inner_step}u)" for r in rows}
                yield from self._guarded(k, numbers, "f32")

    def _guarded(self, step: str, loads: Mapping[str, str], kind: str = "vec4<f32>") -> Iterator[str]:
        """Loads of one step into variables, or zeros behind the last step."""
        if self.ragged:
            yield f"if ({step} < {self.inner}u) {{"
        for variable, value in loads.items():
            yield f"{variable} = {value};"
        if self.ragged:
            yield "} else {"
            for variable in loads:
                yield f"{variable} = {kind}();"
            yield "}"

    def vectors(self, n: str) -> Iterator[str]:
        for r in range(self.lines):
            yield f"let v{r} = {n}_v{r};"


@dataclass(frozen=True)
class Groups:
    """Activations in q8a: ten words for 32 elements of a row, the scale and the sums first, then the int8."""

    name: str
    start: str
    """Where the matrix starts, in elements."""
    last: str | None
    """The last row there is; None: every tile is full."""
    row_step: int
    inner: int
    ragged: bool
    """The last slab is not full."""

    lines = BLOCK
    along_steps = True
    by_lines = False
    element = "u32"
    functions = ""

    def setup(self, n: str) -> Iterator[str]:
        for r in range(BLOCK):
            row = f"row0 + {n}_r * {BLOCK}u + {r}u"
            at = f"({row})" if self.last is None else f"min({row}, {self.last})"
            yield f"let {n}_p{r} = ({self.start} + {at} * {self.row_step}u) / {GROUP}u * {GROUP_WORDS}u;"

    def declare(self, n: str) -> Iterator[str]:
        for r in range(BLOCK):
            yield f"var {n}_w{r} = 0u; var {n}_s{r} = 0u;"

    def load(self, n: str, block: str) -> Iterator[str]:
        if self.ragged:
            yield f"if ({block} < {self.inner // BLOCK}u) {{"
        yield f"let {n}_g = ({block} >> 3u) * {GROUP_WORDS}u; let {n}_u = {n}_g + 2u + ({block} & 7u);"
        for r in range(BLOCK):
            yield f"{n}_w{r} = {self.name}[{n}_p{r} + {n}_u]; {n}_s{r} = {self.name}[{n}_p{r} + {n}_g];"
        if self.ragged:
            zeros = " ".join(f"{n}_s{r} = 0u;" for r in range(BLOCK))
            yield f"}} else {{ {zeros} }}"

    def vectors(self, n: str) -> Iterator[str]:
        for r in range(BLOCK):
            yield f"let v{r} = bitcast<f32>({n}_s{r}) * q8_numbers({n}_w{r});"


@dataclass(frozen=True)
class Packed:
    """A packed weight; the tile's columns begin at `column0`."""

    name: str
    weights: Weights
    last: str | None
    """The last column, of a quantised weight the last four, that the binding holds; None: every tile is full."""
    ragged: bool
    lines: int = BLOCK

    along_steps = True
    functions = ""

    @property
    def element(self) -> str:
        return "vec4<u32>" if isinstance(self.weights, Quads) else vector_element(self.weights.dtype)

    @property
    def by_lines(self) -> bool:
        """Quantised weights come in fours."""
        return not isinstance(self.weights, Quads)

    @property
    def blocks(self) -> int:
        """Of steps that are stored."""
        w = self.weights
        return w.units * w.steps // BLOCK

    def setup(self, n: str) -> Iterator[str]:
        w = self.weights
        if isinstance(w, Quads):
            quad = f"column0 / {QUAD}u + {n}_r"
            yield f"let {n}_q = {quad if self.last is None else f'min({quad}, {self.last})'};"
            yield f"let {n}_p = {n}_q * {w.units}u;"
            yield f"let {n}_d = {n}_q * {w.groups}u;"
            return
        for r in range(self.lines):
            column = f"column0 + {n}_r * {self.lines}u + {r}u"
            at = f"({column})" if self.last is None else f"min({column}, {self.last})"
            yield f"let {n}_p{r} = {at} * {self.blocks}u;"

    def declare(self, n: str) -> Iterator[str]:
        if isinstance(self.weights, Quads):
            yield f"var {n}_w = vec4<u32>(); var {n}_s = vec2<u32>(); var {n}_h = 0u;"
        else:
            for r in range(self.lines):
                yield f"var {n}_w{r} = {self.element}();"

    def load(self, n: str, block: str) -> Iterator[str]:
        w = self.weights
        if self.ragged:
            yield f"if ({block} < {self.blocks}u) {{"
        if isinstance(w, Quads):
            yield f"let {n}_o = {block};"
            at = f"{n}_o" if w.steps == BLOCK else f"({n}_o >> 1u)"
            yield f"{n}_w = {self.name}[{n}_p + {at}];"
            yield f"{n}_s = {self.name}_scales[{n}_d + ({n}_o >> 3u)];"
            if w.steps != BLOCK:
                yield f"{n}_h = ({n}_o & 1u) << 2u;"
        else:
            for r in range(self.lines):
                yield f"{n}_w{r} = {self.name}[{n}_p{r} + {block}];"
        if self.ragged:
            yield "} else {"
            if isinstance(w, Quads):
                yield f"{n}_s = vec2<u32>();"
            else:
                for r in range(self.lines):
                    yield f"{n}_w{r} = {self.element}();"
            yield "}"

    def vectors(self, n: str) -> Iterator[str]:
        w = self.weights
        for r, lane in enumerate("xyzw"[: self.lines]):
            if not isinstance(w, Quads):
                yield f"let v{r} = {floats(f'{n}_w{r}', w.dtype)};"
                continue
            word, scale = f"{n}_w.{lane}", f"unpack2x16float({n}_s.{'xy'[r // 2]}).{'xy'[r % 2]}"
            if w.steps == BLOCK:
                yield f"let v{r} = {scale} * q8_numbers({word});"
            else:
                yield f"let n{r} = {word} >> {n}_h;"
                numbers = ", ".join(nibble(f"n{r}", 2 * i) for i in range(4))
                yield f"let v{r} = {scale} * vec4<f32>({numbers});"
