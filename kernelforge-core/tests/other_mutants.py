"""Passes, tuners, dialects and backends that each have one plausible flaw, with the kind of failure that must name it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
from mutant_target import Array, MutantBackend, MutantDevice, MutantExecutable

from kernelforge.backend import Buffer, Catalog, TensorSource, Timing
from kernelforge.dialects.transformer import OPS
from kernelforge.dtype import to_numpy
from kernelforge.mlir import ir
from kernelforge.module import Module
from kernelforge.op import Attrs, OpDef, OperandTypes, OpError, Part, View
from kernelforge.passes import Pass
from kernelforge.passes.rewriting import Body, tensor_type
from kernelforge.plan import Plan
from kernelforge.problem import Problem, TensorType
from kernelforge.reference import HostBuffer
from kernelforge.testing.case import Kind
from kernelforge.variant import Config, ConfigSpace

T = "transformer."

# --- passes ---


def _each(module: Module, name: str) -> Iterator[tuple[Body, Any]]:
    body = Body(module)
    for op in body.walk(T + name):
        yield body, op


@dataclass(frozen=True)
class Mutant(Pass):
    name: ClassVar[str] = "mutant"


@dataclass(frozen=True)
class HonestPass(Mutant):
    def run(self, module: Module) -> None:
        """a + b becomes b + a where both are of one type."""
        for body, op in _each(module, "add"):
            a, b = op.operands
            if a.type == b.type and str(a.get_name()) > str(b.get_name()):
                body.replace(op, body.create(op.name, [b, a], op.attrs, before=op, of=[op]))


@dataclass(frozen=True)
class DropsUse(Mutant):
    def run(self, module: Module) -> None:
        """a + b becomes a."""
        for body, op in _each(module, "add"):
            if op.operands[0].type == op.result.type:
                body.replace(op, [op.operands[0]])


@dataclass(frozen=True)
class SwapsParts(Mutant):
    def run(self, module: Module) -> None:
        """The narrower part first."""
        for body, op in _each(module, "concat"):
            if tensor_type(op.operands[0]).shape[-1] == tensor_type(op.operands[-1]).shape[-1]:
                continue
            if str(op.operands[0].type) < str(op.operands[-1].type):
                continue
            made = body.create(op.name, list(reversed(op.operands)), op.attrs, before=op, of=[op])
            if made[0].type == op.result.type:
                body.replace(op, made)


@dataclass(frozen=True)
class DropsBias(Mutant):
    def run(self, module: Module) -> None:
        for body, op in _each(module, "matmul"):
            if op.operands[2] is not None:
                operands = [*op.operands[:2], None, op.operands[3]]
                body.replace(op, body.create(op.name, operands, op.attrs, before=op, of=[op]))


@dataclass(frozen=True)
class DropsResidual(Mutant):
    def run(self, module: Module) -> None:
        for body, op in _each(module, "matmul"):
            if op.operands[3] is not None:
                operands = [*op.operands[:3], None]
                body.replace(op, body.create(op.name, operands, op.attrs, before=op, of=[op]))


@dataclass(frozen=True)
class DropsWindow(Mutant):
    def run(self, module: Module) -> None:
        for body, op in _each(module, "attention"):
            if op.attrs["window"]:
                body.replace(op, body.create(op.name, op.operands, {**op.attrs, "window": 0}, before=op, of=[op]))


@dataclass(frozen=True)
class OtherRope(Mutant):
    def run(self, module: Module) -> None:
        """Pairs of neighbours are thought to be halves."""
        for body, op in _each(module, "rope"):
            if op.attrs["interleaved"]:
                attrs = {**op.attrs, "interleaved": False}
                body.replace(op, body.create(op.name, op.operands, attrs, before=op, of=[op]))


@dataclass(frozen=True)
class OtherEps(Mutant):
    def run(self, module: Module) -> None:
        for body, op in _each(module, "rms_norm"):
            if op.attrs["eps"] == 1e-5:
                body.replace(op, body.create(op.name, op.operands, {"eps": 1e-2}, before=op, of=[op]))


@dataclass(frozen=True)
class ForgetsRounding(Mutant):
    def run(self, module: Module) -> None:
        """A cast to bf16 and back is thought to do nothing."""
        for body, op in _each(module, "cast"):
            inner = body.producer(op.operands[0], T + "cast")
            source = None if inner is None else inner.operands[0]
            if source is not None and source.type == op.result.type:
                body.replace(op, [source])


@dataclass(frozen=True)
class OtherGelu(Mutant):
    def run(self, module: Module) -> None:
        for body, op in _each(module, "gelu"):
            if op.attrs["approximate"] == "none":
                body.replace(op, body.create(op.name, op.operands, {"approximate": "tanh"}, before=op, of=[op]))


@dataclass(frozen=True)
class Grows(Mutant):
    def run(self, module: Module) -> None:
        """Leaves an op that nobody uses, each time."""
        for body, op in _each(module, "add"):
            body.create(T + "silu", [op.operands[0]], {}, before=op, of=[op])


@dataclass(frozen=True)
class TurnsInCircles(Mutant):
    def run(self, module: Module) -> None:
        """a + b becomes b + a, always."""
        for body, op in _each(module, "add"):
            a, b = op.operands
            if a.type == b.type:
                body.replace(op, body.create(op.name, [b, a], op.attrs, before=op, of=[op]))


@dataclass(frozen=True)
class ForgetsOption(Mutant):
    fast: bool = False

    def run(self, module: Module) -> None:
        """Nothing."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class BreaksTypes(Mutant):
    def run(self, module: Module) -> None:
        for _, op in _each(module, "silu"):
            op.result.set_type(ir.Type.parse("tensor<3x3xi8>"))


@dataclass(frozen=True)
class RenamesInput(Mutant):
    def run(self, module: Module) -> None:
        attributes = module.main.attributes
        attributes["arg_attrs"] = ir.Attribute.parse(str(attributes["arg_attrs"]).replace('"x0"', '"x"'))


@dataclass(frozen=True)
class GivesUp(Mutant):
    def run(self, module: Module) -> None:
        for _ in _each(module, "matmul"):
            raise KeyError("matmul")


PASSES: list[tuple[type[Mutant], Kind]] = [
    (DropsUse, "wrong-values"),
    (SwapsParts, "wrong-values"),
    (DropsBias, "wrong-values"),
    (DropsResidual, "wrong-values"),
    (DropsWindow, "wrong-values"),
    (OtherRope, "wrong-values"),
    (OtherEps, "wrong-values"),
    (ForgetsRounding, "wrong-values"),
    (OtherGelu, "wrong-values"),
    (RenamesInput, "wrong-values"),
    (Grows, "not-idempotent"),
    (TurnsInCircles, "not-idempotent"),
    (ForgetsOption, "round-trip"),
    (BreaksTypes, "error"),
    (GivesUp, "error"),
]

# --- tuners ---


class HonestTuner:
    """At random, without repetition."""

    def __init__(self, space: ConfigSpace, default: Config, *, trials: int, seed: int = 0) -> None:
        self.space, self.default, self.trials = space, default, trials
        self.rng = random.Random(seed)
        self.left = [dict(c) for c in space]
        self.rng.shuffle(self.left)
        self.told: list[tuple[Config, float | None]] = []

    def ask(self) -> Config | None:
        if not self.trials or not self.left:
            return None
        self.trials -= 1
        return self.left.pop()

    def tell(self, config: Config, median_s: float | None) -> None:
        self.told.append((config, median_s))


class Repeats(HonestTuner):
    def ask(self) -> Config | None:
        if self.trials:
            self.trials -= 1
            return self.rng.choice([dict(c) for c in self.space])
        return None


class IgnoresConstraints(HonestTuner):
    def __init__(self, space: ConfigSpace, default: Config, *, trials: int, seed: int = 0) -> None:
        super().__init__(ConfigSpace(space.parameters), default, trials=trials, seed=seed)


class InventsValues(HonestTuner):
    def ask(self) -> Config | None:
        config = super().ask()
        return config and {k: v + 1 if isinstance(v, int) else v for k, v in config.items()}


class ProposesFloats(HonestTuner):
    """As a search in continuous space does that forgets to go back."""

    def ask(self) -> Config | None:
        config = super().ask()
        floats: dict[str, Any] = {k: float(v) if isinstance(v, int) else v for k, v in (config or {}).items()}
        return config and floats


class KeepsAndChanges(HonestTuner):
    """Works on in the very config that it is told of."""

    def tell(self, config: Config, median_s: float | None) -> None:
        assert isinstance(config, dict)
        config["median_s"] = median_s
        super().tell(config, median_s)


class NoBudget(HonestTuner):
    def ask(self) -> Config | None:
        return self.left.pop() if self.left else None


class StopsEarly(HonestTuner):
    def ask(self) -> Config | None:
        return super().ask() if len(self.left) > 1 or len(list(self.space)) == 1 else None


class StaysNear(HonestTuner):
    """Changes the first parameter only."""

    def __init__(self, space: ConfigSpace, default: Config, *, trials: int, seed: int = 0) -> None:
        super().__init__(space, default, trials=trials, seed=seed)
        self.left = [c for c in self.left if all(c[n] == default[n] for n, _ in space.parameters[1:])]


class CountsOnSuccess(HonestTuner):
    def tell(self, config: Config, median_s: float | None) -> None:
        assert median_s is not None
        self.told.append((config, median_s * 1e6))


class StopsAtFailure(HonestTuner):
    def tell(self, config: Config, median_s: float | None) -> None:
        if median_s is None:
            self.left = []


class OwnRandomness(HonestTuner):
    def __init__(self, space: ConfigSpace, default: Config, *, trials: int, seed: int = 0) -> None:
        super().__init__(space, default, trials=trials, seed=random.SystemRandom().randrange(1 << 30))


class RemembersBest(HonestTuner):
    """Begins a search with the best of the last one in that space."""

    best: ClassVar[dict[str, tuple[float, Config]]] = {}

    def __init__(self, space: ConfigSpace, default: Config, *, trials: int, seed: int = 0) -> None:
        super().__init__(space, default, trials=trials, seed=seed)
        _, known = self.best.pop(str(space.parameters), (0.0, None))
        if known is not None:
            self.left.remove(dict(known))
            self.left.append(dict(known))

    def tell(self, config: Config, median_s: float | None) -> None:
        key = str(self.space.parameters)
        if median_s is not None and median_s < self.best.get(key, (float("inf"), config))[0]:
            self.best[key] = median_s, dict(config)


class OneListForAll(HonestTuner):
    """What is left to try belongs to the class."""

    shared: ClassVar[list[dict[str, int | str]]] = []

    def __init__(self, space: ConfigSpace, default: Config, *, trials: int, seed: int = 0) -> None:
        super().__init__(space, default, trials=trials, seed=seed)
        self.shared[:] = self.left
        self.left = self.shared


class WaitsForAnswers(HonestTuner):
    """Asks the same as long as it is not told."""

    def ask(self) -> Config | None:
        if not self.trials or len(self.told) >= len(self.left):
            return None
        return self.left[len(self.told)]

    def tell(self, config: Config, median_s: float | None) -> None:
        super().tell(config, median_s)
        self.trials -= 1


TUNERS: list[tuple[type[HonestTuner], Kind]] = [
    (Repeats, "repeated-config"),
    (WaitsForAnswers, "repeated-config"),
    (IgnoresConstraints, "illegal-config"),
    (InventsValues, "illegal-config"),
    (ProposesFloats, "illegal-config"),
    (KeepsAndChanges, "input-mutated"),
    (NoBudget, "over-budget"),
    (StopsEarly, "optimum-missed"),
    (StaysNear, "optimum-missed"),
    (StopsAtFailure, "optimum-missed"),
    (CountsOnSuccess, "error"),
    (OwnRandomness, "not-deterministic"),
    (RemembersBest, "not-deterministic"),
    (OneListForAll, "not-deterministic"),
]

# --- dialects ---

BY_NAME = {op.name: op for op in OPS}


def _op(base: str, **changed: Any) -> OpDef:
    """An op of the transformer dialect in a dialect of one's own, with something changed."""
    op = replace(BY_NAME[base], dialect="wrong", **changed)

    def sample(rng: random.Random) -> Iterator[Problem]:
        for problem in BY_NAME[base].samples(rng):
            yield Problem(f"wrong.{base}", problem.operands, problem.results, problem.attrs)

    return op if "sample" in changed else replace(op, sample=sample)


def _any_inner(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    """Of a product, whatever its inner dimensions are."""
    lhs, rhs = operands[0], operands[1]
    assert lhs is not None
    assert rhs is not None
    if min(lhs.rank, rhs.rank) < 2:
        raise OpError("operands that are no matrices")
    shape = list(lhs.shape)
    shape[-2 if attrs["transpose_lhs"] else -1] = rhs.shape[-1 if attrs["transpose_rhs"] else -2]
    fitting = replace(lhs, shape=tuple(shape))
    return BY_NAME["matmul"].infer_types([fitting, *operands[1:]], attrs)


def _same(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    assert operands[0] is not None
    return (TensorType(operands[0].shape, operands[0].dtype),)


def _static_one(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    (t,) = _same(operands, attrs)
    return (TensorType(tuple(1 if isinstance(d, str) else d for d in t.shape), t.dtype),)


def _no_rank_0(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    (t,) = _same(operands, attrs)
    if not {"f32": 1, "bf16": 1, "f16": 1}[t.dtype]:
        raise AssertionError
    return (t,)


def _copying_mutating(arrays: Sequence[Any], attrs: Attrs) -> tuple[Array, ...]:
    out = arrays[0].copy()
    arrays[0][...] = 0
    return (out,)


def _single(arrays: Sequence[Any], attrs: Attrs) -> tuple[Array, ...]:
    x = arrays[0].astype(np.float32)
    return (x / (1 + np.exp(-x)),)


def _noisy(arrays: Sequence[Any], attrs: Attrs) -> tuple[Array, ...]:
    return (arrays[0] + np.random.default_rng().standard_normal(arrays[0].shape),)


def _in_memory_order(arrays: Sequence[Any], attrs: Attrs) -> tuple[Array, ...]:
    return (np.cumsum(arrays[0].ravel("K")).reshape(arrays[0].shape),)


def _shorter(arrays: Sequence[Any], attrs: Attrs) -> tuple[Array, ...]:
    return (arrays[0][:-1],)


def _off_by_one(operands: OperandTypes, attrs: Attrs) -> tuple[View, ...] | None:
    views = BY_NAME["slice"].views(operands, attrs)
    return views and tuple(replace(v, offset=0) for v in views)


def _untransposed(operands: OperandTypes, attrs: Attrs) -> tuple[View, ...] | None:
    views = BY_NAME["transpose"].views(operands, attrs)
    return views and tuple(replace(v, strides=tuple(sorted(v.strides, reverse=True))) for v in views)


def _another_op(problem: Problem) -> tuple[Part, ...]:
    return (Part("transformer.gelu", ("x",), ("out",)),)


def _without_operand(problem: Problem) -> tuple[Part, ...]:
    return (Part("transformer.silu", ("y",), ("out",)),)


def _unseeded(rng: random.Random) -> Iterator[Problem]:
    n = random.SystemRandom().randrange(2, 1 << 16)
    t = TensorType((n,), "f32")
    yield Problem("wrong.silu", (t,), (t,))


def _big(rng: random.Random) -> Iterator[Problem]:
    t = TensorType((1 << 12, 1 << 12), "f32")
    yield Problem("wrong.silu", (t,), (t,))


def _foreign(rng: random.Random) -> Iterator[Problem]:
    t = TensorType((4,), "f32")
    yield Problem("wrong.silu", (t,), (TensorType((5,), "f32"),))


DIALECTS: list[tuple[str, OpDef, Kind]] = [
    ("any-inner-dimension", _op("matmul", infer=_any_inner), "not-refused"),
    ("forgotten-dynamic", _op("silu", infer=_static_one), "wrong-shape"),
    ("unexpected-error", _op("silu", infer=_no_rank_0), "error"),
    ("reference-in-f32", _op("silu", reference=_single), "wrong-dtype"),
    ("reference-changes-moved-operand", _op("cast", reference=_copying_mutating), "input-mutated"),
    ("noisy-reference", _op("silu", reference=_noisy), "not-deterministic"),
    ("memory-order", _op("silu", reference=_in_memory_order), "not-deterministic"),
    ("shorter-reference", _op("silu", reference=_shorter), "wrong-shape"),
    ("view-from-the-start", _op("slice", view=_off_by_one), "wrong-values"),
    ("view-not-transposed", _op("transpose", view=_untransposed), "wrong-values"),
    ("parts-of-another-op", _op("silu", parts=_another_op), "wrong-values"),
    ("parts-without-operand", _op("silu", parts=_without_operand), "error"),
    ("unseeded-samples", _op("silu", sample=_unseeded), "not-deterministic"),
    ("large-samples", _op("silu", sample=_big), "error"),
    ("foreign-samples", _op("silu", sample=_foreign), "round-trip"),
]

NAMED = SimpleNamespace(**{name.replace("-", "_"): (op,) for name, op, _ in DIALECTS})
"""What descriptors refer to."""

# --- backends ---


class Unchecked(HostBuffer):
    def write(self, array: Array) -> None:
        if array.shape == self.array.shape:
            self.array[...] = array.astype(self.array.dtype)
        else:
            super().write(array)


class Copied(HostBuffer):
    """What is read was read when the buffer was made."""

    def __init__(self, array: Array) -> None:
        super().__init__(array)
        self.first = array.copy()

    def numpy(self) -> Array:
        return self.first


class Late(HostBuffer):
    """What is fetched is what is there when it is looked at."""

    def fetch(self, *index: int) -> Callable[[], Array]:
        return lambda: np.asarray(self.array[index])


class LateDevice(MutantDevice):
    def allocate(self, shape: tuple[int, ...], dtype: str) -> HostBuffer:
        return Late(np.zeros(shape, to_numpy(dtype)))


class UninitialisedDevice(MutantDevice):
    def allocate(self, shape: tuple[int, ...], dtype: str) -> HostBuffer:
        return HostBuffer(np.ones(shape, to_numpy(dtype)))


class UncheckedDevice(MutantDevice):
    def allocate(self, shape: tuple[int, ...], dtype: str) -> HostBuffer:
        return Unchecked(np.zeros(shape, to_numpy(dtype)))


class CopiedDevice(MutantDevice):
    def allocate(self, shape: tuple[int, ...], dtype: str) -> HostBuffer:
        return Copied(np.zeros(shape, to_numpy(dtype)))


class SharedDevice(MutantDevice):
    """One memory for all buffers of a shape."""

    def __init__(self, threads: int | None) -> None:
        super().__init__(threads)
        self.memory: dict[tuple[object, ...], Array] = {}

    def allocate(self, shape: tuple[int, ...], dtype: str) -> HostBuffer:
        return HostBuffer(self.memory.setdefault((shape, dtype), np.zeros(shape, to_numpy(dtype))))


class FlatDevice(MutantDevice):
    def allocate(self, shape: tuple[int, ...], dtype: str) -> HostBuffer:
        return HostBuffer(np.zeros(int(np.prod(shape)), to_numpy(dtype)))


Run = Callable[
    [MutantExecutable, Mapping[str, Array | Buffer], Mapping[str, Array | Buffer] | None], tuple[Array | Buffer, ...]
]


def _device(run: Run | None = None, **methods: Any) -> type[MutantDevice]:
    """A device whose executables run otherwise."""

    class Executable(MutantExecutable):
        def run(
            self, inputs: Mapping[str, Array | Buffer], out: Mapping[str, Array | Buffer] | None = None
        ) -> tuple[Array | Buffer, ...]:
            return super().run(inputs, out) if run is None else run(self, inputs, out)

    for name, method in methods.items():
        setattr(Executable, name, method)

    class Device(MutantDevice):
        def compile(self, plan: Plan, constants: TensorSource, catalog: Catalog) -> MutantExecutable:
            return Executable(plan, constants, catalog, self.info)

    return Device


Inputs = Mapping[str, Array | Buffer]
Out = Mapping[str, Array | Buffer] | None


def _ignores_out(self: MutantExecutable, inputs: Inputs, out: Out) -> tuple[Array | Buffer, ...]:
    return MutantExecutable.run(self, inputs, out and {n: np.empty_like(a) for n, a in out.items()})


def _ignores_unknown(self: MutantExecutable, inputs: Inputs, out: Out) -> tuple[Array | Buffer, ...]:
    known = {self.plan.values[i].name for i in self.plan.inputs}
    return MutantExecutable.run(self, {n: a for n, a in inputs.items() if n in known}, out)


def _casts(self: MutantExecutable, inputs: Inputs, out: Out) -> tuple[Array | Buffer, ...]:
    types = {self.plan.values[i].name: to_numpy(self.plan.values[i].type.dtype) for i in self.plan.inputs}
    given = {n: a.astype(types[n]) if isinstance(a, np.ndarray) and n in types else a for n, a in inputs.items()}
    return MutantExecutable.run(self, given, out)


def _one_output(self: MutantExecutable, inputs: Inputs, out: Out) -> tuple[Array | Buffer, ...]:
    """The same array for all results of a shape."""
    kept = vars(self).setdefault("kept", {})
    outputs = MutantExecutable.run(self, inputs, out)
    if out is not None:
        return outputs
    mine = []
    for o in outputs:
        array = kept.setdefault(o.shape, np.empty_like(o)) if isinstance(o, np.ndarray) else o
        if isinstance(array, np.ndarray):
            array[...] = o
        mine.append(array)
    return tuple(mine)


def _copies_buffers(self: MutantExecutable, inputs: Inputs, out: Out) -> tuple[Array | Buffer, ...]:
    copies = {n: HostBuffer(a.array.copy()) if isinstance(a, HostBuffer) else a for n, a in inputs.items()}
    return MutantExecutable.run(self, copies, out)


def _two_samples(self: MutantExecutable, inputs: Inputs, *, repeats: int) -> Timing:
    return Timing((1e-3, 1e-3), "host-clock")


class AnyDevice(MutantBackend):
    def open(self, device: str | None = None, *, threads: int | None = None) -> MutantDevice:
        return MutantDevice(threads)


class OpensOnce(MutantBackend):
    opened: ClassVar[list[MutantDevice]] = []

    def open(self, device: str | None = None, *, threads: int | None = None) -> MutantDevice:
        made = super().open(device, threads=threads)
        if self.opened:
            raise RuntimeError("the device is in use")
        self.opened.append(made)
        return made


def _forgotten(after_close: Callable[[MutantExecutable], tuple[Array | Buffer, ...]]) -> type[MutantDevice]:
    """A device whose executables do something else once it was closed."""

    class Device(MutantDevice):
        def compile(self, plan: Plan, constants: TensorSource, catalog: Catalog) -> MutantExecutable:
            made = super().compile(plan, constants, catalog)
            run = made.run
            self.open = True

            def checked(inputs: Inputs, out: Out = None) -> tuple[Array | Buffer, ...]:
                return run(inputs, out) if self.open else after_close(made)

            vars(made)["run"] = checked
            return made

        def close(self) -> None:
            self.open = False

    return Device


def _stale(executable: MutantExecutable) -> tuple[Array | Buffer, ...]:
    values = executable.plan.values
    return tuple(
        np.zeros(values[i].type.static_shape(), to_numpy(values[i].type.dtype)) for i in executable.plan.outputs
    )


def _raises(executable: MutantExecutable) -> tuple[Array | Buffer, ...]:
    raise AttributeError("'NoneType' object has no attribute 'queue'")


def _backend(device: type[MutantDevice]) -> type[MutantBackend]:
    return type("Backend", (MutantBackend,), {"device": device})


BACKENDS: list[tuple[str, type[MutantBackend], Kind]] = [
    ("any-device", AnyDevice, "not-refused"),
    ("uninitialised", _backend(UninitialisedDevice), "wrong-values"),
    ("unchecked-writes", _backend(UncheckedDevice), "not-refused"),
    ("read-once", _backend(CopiedDevice), "wrong-values"),
    ("fetches-late", _backend(LateDevice), "wrong-values"),
    ("one-memory", _backend(SharedDevice), "wrong-values"),
    ("flat-buffers", _backend(FlatDevice), "wrong-shape"),
    ("ignores-out", _backend(_device(_ignores_out)), "wrong-values"),
    ("ignores-unknown", _backend(_device(_ignores_unknown)), "not-refused"),
    ("casts-inputs", _backend(_device(_casts)), "not-refused"),
    ("one-output", _backend(_device(_one_output)), "wrong-values"),
    ("copies-buffers", _backend(_device(_copies_buffers)), "error"),
    ("two-samples", _backend(_device(measure=_two_samples)), "error"),
    ("opens-once", OpensOnce, "error"),
    ("zeros-once-closed", _backend(_forgotten(_stale)), "wrong-values"),
    ("breaks-once-closed", _backend(_forgotten(_raises)), "error"),
]
