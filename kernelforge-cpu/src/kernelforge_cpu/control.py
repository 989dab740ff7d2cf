"""Loops and branches of kernel text, as `with` blocks."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from kernelforge_cpu.ssa import I64, Type, Value

if TYPE_CHECKING:
    from kernelforge_cpu.builder import Builder


class Loop:
    """A counted loop being written; see `Builder.for_`."""

    def __init__(self, k: Builder, lo: Value, hi: Value, step: Value, init: list[Value]) -> None:
        self.k, self.init, self.bounds = k, init, f"{lo.name} to {hi.name} step {step.name}"
        self.i = Value(k, k.fresh(), I64)
        self.values = [Value(k, k.fresh(), v.type) for v in init]
        self.results: list[Value] = []
        self.yielded: list[Value] | None = None

    def __enter__(self) -> Loop:
        carried = ", ".join(f"{v.name} = {i.name}" for v, i in zip(self.values, self.init, strict=True))
        types = ", ".join(str(v.type) for v in self.init)
        header = f"scf.for {self.i.name} = {self.bounds}" + (f" iter_args({carried}) -> ({types})" if self.init else "")
        self.results = self.k.many(header + " : i64 {", [v.type for v in self.init])
        return self

    def yield_(self, *values: Value) -> None:
        self.yielded = list(values)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.k.lines.append(_yield_text(self.yielded or [], [v.type for v in self.init]))
            self.k.lines.append("}")


class Branch:
    """An if being written; see `Builder.if_`."""

    def __init__(self, k: Builder, condition: Value) -> None:
        self.k, self.condition, self.start, self.name = k, condition, 0, k.fresh()
        self.results: list[Value] = []
        self.yielded: list[Value] = []

    def __enter__(self) -> Branch:
        self.start = len(self.k.lines)
        self.k.lines.append(f"scf.if {self.condition.name} {{")
        return self

    def yield_(self, *values: Value) -> None:
        self.yielded = list(values)

    def else_(self) -> Branch.Else:
        return Branch.Else(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        if self.yielded:
            types = [v.type for v in self.yielded]
            self.k.lines[self.start] = (
                f"{self.name}:{len(types)} = scf.if {self.condition.name} -> ({', '.join(map(str, types))}) {{"
            )
            self.results = [Value(self.k, f"{self.name}#{i}", t) for i, t in enumerate(types)]
            self.k.lines.append(_yield_text(self.yielded, types))
        self.k.lines.append("}")

    class Else:
        def __init__(self, branch: Branch) -> None:
            self.branch = branch

        def __enter__(self) -> None:
            branch = self.branch
            if branch.k.lines.pop() != "}":
                raise ValueError("else_ must follow its if_ at once")
            branch.k.lines.append("} else {")
            branch.yielded = []

        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
        ) -> None:
            if kind is None:
                branch = self.branch
                if branch.results:
                    branch.k.lines.append(_yield_text(branch.yielded, [v.type for v in branch.results]))
                branch.k.lines.append("}")


def _yield_text(values: Sequence[Value], types: Sequence[Type]) -> str:
    if [v.type for v in values] != list(types):
        raise TypeError(f"yielded ({', '.join(map(str, values))}) where ({', '.join(map(str, types))}) is expected")
    names = ", ".join(v.name for v in values)
    return f"scf.yield {names} : {', '.join(map(str, types))}" if values else "scf.yield"
