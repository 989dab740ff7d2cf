"""From a module's function to a plan: fold constants, turn layout ops into views, tie in-place ops, select kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from kernelforge.constant import Constant, Folded, Named
from kernelforge.errors import PluginError, UsageError
from kernelforge.module import Function, Node
from kernelforge.op import OpDef
from kernelforge.parts import taken_apart
from kernelforge.plan import Plan, Step, Value, root_of
from kernelforge.problem import Attr, Problem, TensorType
from kernelforge.selection import Selection

Chooser = Callable[[Problem], Selection]
"""Selects a kernel for a problem (`Session` binds variants, device and records)."""

COPY = "transformer.cast"
"""A cast to the same dtype copies: used where a value must move into other memory."""
NESTED_PARTS = 8
"""How often an op is taken apart, and its parts, and theirs: more goes round in circles."""


def make_plan(
    function: Function,
    ops: Mapping[str, OpDef],
    choose: Chooser,
    *,
    target: str,
    dims: Mapping[str, int] | None = None,
    max_dims: Mapping[str, int] | None = None,
    keep_whole: Callable[[Problem], bool] = lambda _: True,
) -> Plan:
    """Plan `function` for `target`.

    `dims` fixes dynamic dimensions, so that kernels are specialised for them; the others stay dynamic. An op that stands
    for others (`OpDef.parts`) is planned as those unless `keep_whole` says otherwise (`kernelforge.fusion`). Raises
    UsageError for a dimension that the function does not have, when no kernel takes one of its problems, or when a
    quantised cache would have to be copied; PluginError for parts that lead back to their op.
    """
    for _ in range(NESTED_PARTS + 1):
        planner = _Planner(function, ops, choose, keep_whole, dict(dims or {}))
        for index, node in enumerate(function.nodes):
            planner.add(index, node)
        if not planner.apart:
            break
        apart = function.nodes[min(planner.apart)].op
        function = taken_apart(function, planner.apart, ops)
    else:
        raise PluginError(f"the parts of op '{apart}' have parts without end, so that they lead back to it")
    outputs = tuple(planner.output(v, name) for v, name in zip(function.outputs, function.output_names, strict=True))
    steps = _group(planner.values, planner.steps)
    inputs = tuple(i for i, arg in enumerate(function.args) if not arg.constant)
    live = {k: v for k, v in (max_dims or {}).items() if k not in planner.dims}
    return Plan(target, tuple(planner.values), steps, inputs, outputs, live)


class _Planner:
    def __init__(
        self,
        function: Function,
        ops: Mapping[str, OpDef],
        choose: Chooser,
        keep_whole: Callable[[Problem], bool],
        dims: dict[str, int],
    ) -> None:
        self.ops, self.choose, self.keep_whole, self.dims = ops, choose, keep_whole, dims
        self.apart: set[int] = set()
        """Nodes that must be taken apart."""
        self.values: list[Value] = []
        self.steps: list[Step] = []
        self.ids: dict[int, int] = {}  # function value -> plan value
        self.last_use: dict[int, int] = {}
        known = {d for arg in function.args for d in arg.type.shape if isinstance(d, str)}
        if unknown := set(dims) - known:
            raise UsageError(f"the module has no dynamic dimension '{min(unknown)}'", hint=f"it has: {sorted(known)}")
        for index, node in enumerate(function.nodes):
            for operand in node.operands:
                if operand is not None:
                    self.last_use[operand] = index
        for output in function.outputs:
            self.last_use[output] = len(function.nodes)
        for i, arg in enumerate(function.args):
            t = self._fixed(arg.type)
            if arg.constant:
                t = replace(t, constant=True)
                value = Value(t, "constant", arg.name, constant=Named(arg.name, t))
            else:
                value = Value(t, "input", arg.name, donated=arg.donated)
            self.ids[i] = self._new(value)

    def _new(self, value: Value) -> int:
        self.values.append(value)
        return len(self.values) - 1

    def _fixed(self, t: TensorType) -> TensorType:
        shape = tuple(d if isinstance(d, int) else self.dims.get(d, d) for d in t.shape)
        return TensorType(shape, t.dtype, t.strides, t.constant)

    def _root(self, value: int) -> int:
        return root_of(self.values, value)

    def add(self, index: int, node: Node) -> None:
        """Plan one op."""
        op = self.ops[node.op]
        operands = tuple(None if v is None else self.ids[v] for v in node.operands)
        if all(v is None or self.values[v].place == "constant" for v in operands):
            self._fold(node, operands)
        elif not self._view(op, node, operands):
            self._kernel(index, op, node, operands)

    def _fold(self, node: Node, operands: tuple[int | None, ...]) -> None:
        constants = tuple(None if v is None else self._constant(v) for v in operands)
        problem = node.problem.with_dims(self.dims)
        for i, result in enumerate(node.results):
            t = replace(problem.results[i], constant=True)
            self.ids[result] = self._new(Value(t, "constant", constant=Folded(problem, constants, i)))

    def _constant(self, value: int) -> Constant:
        constant = self.values[value].constant
        assert constant is not None
        return constant

    def _view(self, op: OpDef, node: Node, operands: tuple[int | None, ...]) -> bool:
        """Make the results views of the first operand's memory; False when the op moves data."""
        types = [None if v is None else self.values[v].type for v in operands]
        attrs = dict(node.problem.attrs)
        views = op.views(types, attrs)
        if views is None:
            return False
        first = operands[0]
        assert first is not None
        base = self._root(first)
        start = self.values[first].offset
        for result, view, t in zip(node.results, views, node.problem.results, strict=True):
            viewed = TensorType(self._fixed(t).shape, t.dtype, view.strides)
            if viewed.contiguous:
                viewed = replace(viewed, strides=None)
            self.ids[result] = self._new(Value(viewed, "view", base=base, offset=start + view.offset))
        return True

    def _kernel(self, index: int, op: OpDef, node: Node, operands: tuple[int | None, ...]) -> None:
        bound = list(operands)
        aliases = dict(op.in_place)
        results: list[int] = []
        for i, (result, t) in enumerate(zip(node.results, node.problem.results, strict=True)):
            if i in aliases:
                results.append(self._in_place(index, node, aliases[i], bound))
            else:
                results.append(self._new(Value(self._fixed(t), "arena")))
            self.ids[result] = results[-1]
        named = self._problem(node.op, bound, results, node.problem.attrs)
        if op.parts_of(named) and not self.keep_whole(named):
            self.apart.add(index)
        else:
            self._step(named, bound, results, node.location)

    def _in_place(self, index: int, node: Node, position: int, bound: list[int | None]) -> int:
        """The result that overwrites operand `position`; the operand is copied first if its memory must survive."""
        operand, source = bound[position], node.operands[position]
        assert operand is not None
        assert source is not None
        root = self.values[self._root(operand)]
        writable = root.place == "arena" or (root.place == "input" and root.donated)
        twice = any(
            v is not None and i != position and self._root(v) == self._root(operand) for i, v in enumerate(bound)
        )
        if not writable or twice or self._read_later(index, operand, source):
            if root.type.quantised:
                raise UsageError(
                    f"'{root.name}' ({root.type}) is read after {node.op} at {node.location or 'unknown place'} overwrites "
                    f"it, and {root.type.dtype} cannot be copied: its elements come in groups",
                    hint="read it before, or read the result of that op instead",
                )
            copy = self._new(Value(replace(self.values[operand].type, strides=None, constant=False), "arena"))
            self._copy(operand, copy, node.location)
            bound[position] = operand = copy
        value = self.values[operand]
        return self._new(Value(value.type, "view", base=self._root(operand), offset=value.offset))

    def _read_later(self, index: int, operand: int, source: int) -> bool:
        """Whether the memory that an op at `index` overwrites is read afterwards through another value."""
        root = self._root(operand)
        sharing = [f for f, p in self.ids.items() if self._root(p) == root]
        return any(self.last_use.get(f, -1) > index for f in sharing)

    def _problem(
        self, op: str, operands: list[int | None], results: list[int], attrs: tuple[tuple[str, Attr], ...]
    ) -> Problem:
        types = tuple(None if v is None else self.values[v].type for v in operands)
        return Problem(op, types, tuple(self.values[v].type for v in results), attrs)

    def _copy(self, value: int, to: int, location: str) -> None:
        attrs = (("dtype", self.values[value].type.dtype),)
        self._step(self._problem(COPY, [value], [to], attrs), [value], [to], location)

    def _step(self, named: Problem, operands: list[int | None], results: list[int], location: str) -> None:
        selection = self.choose(named.canonical())
        self.steps.append(
            Step(
                selection.problem,
                named.dims,
                tuple(operands),
                tuple(results),
                selection.variant.name,
                selection.config,
                0,
                location,
                selection.chosen.config_source,
            )
        )

    def output(self, value: int, name: str) -> int:
        """Give an output its place: its own buffer, or a donated input that was updated in place."""
        planned = self.ids[value]
        found, root = self.values[planned], self.values[self._root(planned)]
        if root.place == "input" and root.donated and found.offset == 0 and found.type == root.type:
            return planned
        if found.place == "arena":
            self.values[planned] = replace(found, place="output", name=name)
            return planned
        copy = self._new(Value(replace(found.type, strides=None, constant=False), "output", name))
        self._copy(planned, copy, name)
        return copy


def _group(values: list[Value], steps: list[Step]) -> tuple[Step, ...]:
    """Number the groups: a step opens a new one when it reads or writes memory that the current one writes, or writes
    memory that the current one reads."""
    group, read, written = 0, set[int](), set[int]()
    grouped: list[Step] = []
    for step in steps:
        reads = {root_of(values, v) for v in step.operands if v is not None}
        writes = {root_of(values, v) for v in step.results}
        if (reads | writes) & written or writes & read:
            group, read, written = group + 1, set(), set()
        read |= reads
        written |= writes
        grouped.append(replace(step, group=group))
    return tuple(grouped)
