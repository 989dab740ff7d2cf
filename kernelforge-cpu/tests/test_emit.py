"""Every op of the kernel builder, run natively at each level that this machine has, against numpy."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from kernelforge.errors import UsageError
from kernelforge_cpu.emit import F32, I64, Builder, Function, KernelBuilder, Pointer, Type, Value, module_text, vec
from kernelforge_cpu.isa import CpuTarget, host_target, host_targets
from kernelforge_cpu.jit import KERNEL, assembly, compile_object, load

Array = np.ndarray[Any, np.dtype[Any]]
TARGETS = host_targets()
each_target = pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.level)


def run(k: KernelBuilder, buffers: Sequence[Array | None], dims: Sequence[int] = (), parts: int = 1) -> None:
    """Compile and run all parts, last one first."""
    library = load([compile_object(k.text(), cpu=k.target)])
    call = KERNEL(library.address(k.name))
    pointers = (ctypes.c_void_p * len(buffers))(*(None if b is None else b.ctypes.data for b in buffers))
    sizes = (ctypes.c_int64 * max(1, len(dims)))(*dims)
    for part in reversed(range(parts)):
        call(ctypes.addressof(pointers), ctypes.addressof(sizes), part, parts)


def map_lanes(target: CpuTarget, write: Callable[[Builder, Value], Value], x: Array, out: str, lanes: int = 0) -> Array:
    """`write` on every vector of `x` (its length a multiple of the lanes)."""
    k = KernelBuilder("mapped", target)
    source, result = k.buffer(0, ELEMENT[x.dtype.name]), k.buffer(1, out)
    n = lanes or target.lanes
    with k.for_(0, k.dim(0), n) as loop:
        result.store(write(k, source.load(loop.i, n)), loop.i)
    y = np.zeros(len(x), DTYPE[out])
    run(k, [x, y], [len(x)])
    return y


DTYPE: dict[str, Any] = {
    "f32": np.float32,
    "f64": np.float64,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "i8": np.int8,
    "i16": np.int16,
    "i32": np.int32,
    "i64": np.int64,
}
ELEMENT = {np.dtype(dtype).name: element for element, dtype in DTYPE.items()}


def ints(rng: np.random.Generator, n: int, low: int = -1000, high: int = 1000) -> Array:
    return rng.integers(low, high, n).astype(np.int64)


@each_target
def test_scalar_integer_arithmetic_is_pythons(target: CpuTarget, rng: np.random.Generator) -> None:
    a, b = ints(rng, 200), ints(rng, 200)
    b[b == 0] = 7
    k = KernelBuilder("arithmetic", target)
    x, y, out = k.buffer(0, "i64"), k.buffer(1, "i64"), k.buffer(2, "i64")
    with k.for_(0, k.dim(0)) as loop:
        p, q = x.load(loop.i), y.load(loop.i)
        results = [p + q, p - q, p * q, p // q, p % q, p // 8, p % 8, -p, p & q, p | q, p ^ q, p << 3, p >> 3]
        results += [k.shift_right_logical(p, 3), k.max(p, q), k.min(p, q), 5 - p, p + 0, 1 * p, k.abs(p)]
        results += [k.select(c, p, q) for c in (p.lt(q), p.le(q), p.gt(q), p.ge(q), p.eq(q), p.ne(q))]
        for i, result in enumerate(results):
            out.store(result, loop.i * len(results) + i)
    got = np.zeros((200, 26), np.int64)
    run(k, [a, b, got], [200])
    want = [a + b, a - b, a * b, a // b, a % b, a // 8, a % 8, -a, a & b, a | b, a ^ b, a << 3, a >> 3]
    want += [
        (a.view(np.uint64) >> np.uint64(3)).view(np.int64),
        np.maximum(a, b),
        np.minimum(a, b),
        5 - a,
        a,
        a,
        abs(a),
    ]
    want += [np.where(c, a, b) for c in (a < b, a <= b, a > b, a >= b, a == b, a != b)]
    np.testing.assert_array_equal(got, np.stack(want, 1))


@each_target
@pytest.mark.parametrize("lanes", [0, 4, 8, 16])
def test_float_arithmetic(target: CpuTarget, lanes: int, rng: np.random.Generator) -> None:
    x = rng.standard_normal(64).astype(np.float32)
    x[:3] = [np.inf, -np.inf, 0]

    def write(k: Builder, v: Value) -> Value:
        w = (2.0 * v + 1.0) / (v - 0.5)
        return k.select(w.lt(0.0), -w, k.max(k.min(w, 3.0), 1.0)) * k.abs(v)

    with np.errstate(invalid="ignore"):
        w = (np.float32(2) * x + np.float32(1)) / (x - np.float32(0.5))
        want = np.where(w < 0, -w, np.maximum(np.where(w < 3, w, np.float32(3)), np.float32(1))) * abs(x)
    np.testing.assert_array_equal(map_lanes(target, write, x, "f32", lanes or 1), want)


@each_target
def test_rounding_and_square_root(target: CpuTarget) -> None:
    x = np.linspace(-8, 8, 64, dtype=np.float32)
    np.testing.assert_array_equal(map_lanes(target, lambda k, v: k.unary("roundeven", v), x, "f32"), np.rint(x))
    np.testing.assert_array_equal(map_lanes(target, lambda k, v: k.unary("floor", v), x, "f32"), np.floor(x))
    np.testing.assert_array_equal(map_lanes(target, lambda k, v: k.sqrt(k.abs(v)), x, "f32"), np.sqrt(abs(x)))


@each_target
def test_special_constants(target: CpuTarget) -> None:
    k = KernelBuilder("constants", target)
    out = k.buffer(0, "f32")
    values = [np.inf, -np.inf, np.nan, 1.1, 1e-45, -0.0, 3.4e38, 0.1]
    for i, value in enumerate(values):
        out.store(value, i)
    out.store(k.consts(values, "f32"), 8)
    got = np.zeros(16, np.float32)
    run(k, [got])
    np.testing.assert_array_equal(got.view(np.int32), np.array(values * 2, np.float32).view(np.int32))


@each_target
@pytest.mark.parametrize("element", ["bf16", "f16"])
def test_halves_convert_exactly(target: CpuTarget, element: str, rng: np.random.Generator) -> None:
    every = np.arange(2**16, dtype=np.uint16).view(DTYPE[element])
    with np.errstate(invalid="ignore"):
        want = every.astype(np.float32)
    np.testing.assert_array_equal(map_lanes(target, lambda k, v: k.convert(v, "f32"), every, "f32"), want)
    bits = rng.integers(0, 2**32, 2**18, dtype=np.uint64).astype(np.uint32)
    ties = (
        want.view(np.uint32)[:, None] + np.array([0, 0x7FFF, 0x8000, 0x8001, 0xFFF, 0x1000, 0x1001], np.uint32)
    ).ravel()
    x = np.concatenate([bits, ties]).view(np.float32)
    x = x[: len(x) // 16 * 16]
    got = map_lanes(target, lambda k, v: k.convert(v, element), x, element)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(got.astype(np.float32), x.astype(DTYPE[element]).astype(np.float32))


@each_target
def test_integer_conversions(target: CpuTarget, rng: np.random.Generator) -> None:
    x = rng.integers(-128, 128, 64).astype(np.int8)
    for out in ("i16", "i32", "i64", "f32", "bf16"):
        got = map_lanes(target, lambda k, v, out=out: k.convert(v, out), x, out)  # type: ignore[misc]  # bound per loop
        np.testing.assert_array_equal(got, x.astype(DTYPE[out]))
    got = map_lanes(target, lambda k, v: k.convert(v, "i32", unsigned=True), x, "i32")
    np.testing.assert_array_equal(got, x.view(np.uint8).astype(np.int32))
    y = (rng.standard_normal(64) * 50).astype(np.float32)
    np.testing.assert_array_equal(map_lanes(target, lambda k, v: k.convert(v, "i32"), y, "i32"), y.astype(np.int32))
    np.testing.assert_array_equal(map_lanes(target, lambda k, v: k.convert(v, "i8"), x.astype(np.int32), "i8"), x)


@each_target
@pytest.mark.parametrize("element", ["f32", "bf16", "f16", "i32", "i8"])
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 100])
def test_vectorize_touches_exactly_its_elements(target: CpuTarget, element: str, n: int) -> None:
    k = KernelBuilder("scaled", target)
    x, y = k.buffer(0, element), k.buffer(1, element)
    lo, hi = k.share(k.dim(0))

    def body(i: Value, valid: Value | None) -> None:
        y.store(x.load_f32(i, k.lanes, valid=valid) * 2.0, i, valid=valid)

    k.vectorize(lo, hi, body)
    page = 4096 // np.dtype(DTYPE[element]).itemsize
    source = (np.arange(page) % 50).astype(DTYPE[element])
    target_array = np.full(page, 99, DTYPE[element])
    run(k, [source[page - n :] if n else source, target_array[page - n :] if n else target_array], [n], parts=3)
    want = np.full(page, 99, DTYPE[element])
    if n:
        want[page - n :] = source[page - n :] * DTYPE[element](2)
    np.testing.assert_array_equal(target_array, want)


@each_target
@pytest.mark.parametrize("element", ["f32", "bf16", "f16", "i8"])
def test_a_partial_store_leaves_its_neighbours_alone(target: CpuTarget, element: str) -> None:
    """Also for counts that are known when compiling, which take another path."""
    n = target.lanes
    k = KernelBuilder("partial", target)
    x, out = k.buffer(0, "f32").load(0, n), k.buffer(1, element)
    for count in range(n + 1):
        out.at(2 * n * count).store(k.convert(x, element), valid=k.i64(count))
        out.at(2 * n * (n + 1 + count)).store(k.convert(x, element), valid=k.dim(0) + count)
    got = np.full((2 * (n + 1), 2 * n), 99, DTYPE[element])
    run(k, [np.arange(1, n + 1, dtype=np.float32), got], [0])
    lanes = np.arange(2 * n)
    for count, row in enumerate(got):
        want = np.where(lanes < count % (n + 1), lanes + 1, 99).astype(DTYPE[element])
        np.testing.assert_array_equal(row.astype(np.float32), want.astype(np.float32))


@each_target
def test_vectorize_carries_values_and_ignores_empty_ranges(target: CpuTarget, rng: np.random.Generator) -> None:
    k = KernelBuilder("total", target)
    x, out = k.buffer(0, "f32"), k.buffer(1, "f32")
    zero = k.f32(0.0, k.lanes)
    total = k.vectorize(3, k.dim(0), lambda i, valid, acc: [acc + x.load(i, k.lanes, valid=valid)], init=[zero])[0]
    none = k.vectorize(k.dim(0), 3, lambda i, valid, acc: [acc + 1.0], init=[zero])[0]
    out.store(k.reduce_add(total), 0)
    out.store(k.reduce_add(none), 1)
    values, got = rng.integers(0, 100, 77).astype(np.float32), np.zeros(2, np.float32)
    run(k, [values, got], [77])
    assert got.tolist() == [values[3:].sum(), 0.0]


@each_target
def test_split_covers_everything_once(target: CpuTarget) -> None:
    k = KernelBuilder("covered", target)
    out = k.buffer(0, "i64")
    lo, hi = k.share(k.dim(0), grain=4)
    with k.for_(lo, hi) as loop:
        out.store(out.load(loop.i) + 1, loop.i)
    for n in (0, 1, 7, 40, 41):
        for parts in (1, 2, 3, 8, 50):
            counts = np.zeros(50, np.int64)
            run(k, [counts], [n], parts)
            np.testing.assert_array_equal(counts, [1] * n + [0] * (50 - n))


@each_target
def test_lanes(target: CpuTarget, rng: np.random.Generator) -> None:
    n = target.lanes
    x = rng.standard_normal((n, n)).astype(np.float32)
    k = KernelBuilder("lanes", target)
    source, out = k.buffer(0, "f32"), k.buffer(1, "f32")
    rows = [source.load(n * i, n) for i in range(n)]
    for i, row in enumerate(k.transpose(rows)):
        out.store(row, n * i)
    rest = out.at(n * n)
    rest.store(k.reduce_max(rows[0]), 0)
    rest.store(k.reduce_min(rows[0]), 1)
    rest.store(k.reduce_add(rows[1]), 2)
    rest.store(k.extract(rows[2], 1), 3)
    rest.store(k.extract(rows[2], k.dim(0)), 4)
    rest.store(k.concat(k.slice(rows[0], 2, 2), k.slice(rows[1], 0, 2)), 5)
    rest.store(k.insert(k.broadcast(k.extract(rows[0], 0), 4), k.f32(7.0), 2), 9)
    got = np.zeros(n * n + 13, np.float32)
    run(k, [x, got], [2])
    np.testing.assert_array_equal(got[: n * n].reshape(n, n), x.T)
    want = [x[0].max(), x[0].min(), x[1].sum(), x[2, 1], x[2, 2], *x[0, 2:4], *x[1, :2], x[0, 0], x[0, 0], 7, x[0, 0]]
    np.testing.assert_allclose(got[n * n :], want, rtol=1e-6, atol=1e-6)


@each_target
@pytest.mark.parametrize("element", ["bf16", "f16", "i8"])
def test_lanes_of_narrow_types_move_without_conversion(target: CpuTarget, element: str) -> None:
    n = target.lanes
    k = KernelBuilder("narrow", target)
    source, out = k.buffer(0, element), k.buffer(1, element)
    row = source.load(0, n)
    out.store(k.shuffle(row, row, range(n)[::-1]), 0)
    out.store(k.insert(row, k.extract(row, 0), k.dim(0)), n)
    out.store(k.select(k.dim(0).eq(1), row, source.load(0, n)), 2 * n)
    x, got = np.arange(n).astype(DTYPE[element]), np.zeros(3 * n, DTYPE[element])
    run(k, [x, got], [1])
    inserted = x.copy()
    inserted[1] = x[0]
    np.testing.assert_array_equal(got.astype(np.float32), np.concatenate([x[::-1], inserted, x]).astype(np.float32))


def test_types_are_spelled_as_in_mlir() -> None:
    assert [str(Type(*t)) for t in (("f32",), ("i1", 4), ("ptr",))] == ["f32", "vector<4xi1>", "!llvm.ptr"]
    assert (Type("bf16", 8).movable, Type("f32", 8).movable) == (Type("i16", 8), Type("f32", 8))


@each_target
def test_branches_loops_calls_and_scratch(target: CpuTarget) -> None:
    """Collatz steps through a private function, into stack scratch, with a branch that has results."""
    k = KernelBuilder("collatz", target)

    def write(f: Builder, n: Value) -> list[Value]:
        with f.if_((n % 2).eq(0)) as even:
            even.yield_(n // 2)
        with even.else_():
            even.yield_(n * 3 + 1)
        return even.results

    step = k.function("collatz_step", [I64], write)
    assert step == Function("collatz_step", (I64,), (I64,))
    scratch, out = k.alloca("i64", 16), k.buffer(0, "i64")
    with k.for_(0, 16, init=[k.dim(0)]) as loop:
        scratch.store(loop.values[0], loop.i)
        loop.yield_(*k.call(step, loop.values[0]))
    with k.for_(0, 16) as copy, k.if_(copy.i.ge(2)):
        out.store(scratch.load(copy.i), copy.i)
    got = np.zeros(16, np.int64)
    run(k, [got], [27])
    want = [27]
    while len(want) < 16:
        want.append(want[-1] // 2 if want[-1] % 2 == 0 else want[-1] * 3 + 1)
    assert got.tolist() == [0, 0, *want[2:]]


def test_a_kernel_that_wants_more_stack_than_there_is_is_refused() -> None:
    k = KernelBuilder("greedy", host_target())
    k.alloca("f32", 1)
    with pytest.raises(UsageError, match="a kernel may have 655360 bytes of stack, not 655424"):
        k.alloca("f32", 640 * 1024 // 4)


@each_target
def test_null_buffers_pointers_and_prefetch(target: CpuTarget) -> None:
    k = KernelBuilder("optional", target)
    x, absent, out = k.buffer(0, "f32"), k.buffer(1, "f32"), k.buffer(2, "i64")
    x.prefetch(k.dim(0))
    moved = x.at(k.dim(0)).at(2).of("i32")
    out.store(k.convert(moved.load(), "i64"))
    address = k.op(f"llvm.ptrtoint {absent.name} : !llvm.ptr to i64", I64)
    out.store(k.select(address.eq(0), k.i64(1), k.i64(2)), 1)
    got = np.zeros(2, np.int64)
    run(k, [np.arange(9, dtype=np.int32), None, got], [3])
    assert got.tolist() == [5, 1]


def test_intrinsics_reach_the_instruction() -> None:
    target = next((t for t in TARGETS if t.level == "x86-64-v3"), None)
    if target is None:
        pytest.skip("needs AVX2")
    k = KernelBuilder("madd", target)
    a, b, out = k.buffer(0, "i16"), k.buffer(1, "i16"), k.buffer(2, "i32")
    product = k.intrinsic("llvm.x86.avx2.pmadd.wd", vec(8, "i32"), a.load(0, 16), b.load(0, 16))
    out.store(product)
    x, y, got = np.arange(16, dtype=np.int16), np.arange(16, dtype=np.int16)[::-1].copy(), np.zeros(8, np.int32)
    run(k, [x, y, got])
    np.testing.assert_array_equal(got, (x.astype(np.int32) * y).reshape(8, 2).sum(1))
    assert "vpmaddwd" in assembly(k.text(), cpu=target)


def test_kernels_of_one_module_share_equal_functions_and_refuse_different_ones() -> None:
    def kernel(name: str, factor: float) -> KernelBuilder:
        k = KernelBuilder(name, TARGETS[0])
        scaled = k.function("scaled", [F32], lambda f, x: [x * factor])
        k.buffer(0, "f32").store(k.call(scaled, k.buffer(0, "f32").load())[0])
        return k

    text = module_text(kernel("first", 2.0), kernel("second", 2.0))
    assert text.count("@scaled(") == 3
    library = load([compile_object(text)])
    assert library.address("first") != library.address("second")
    with pytest.raises(ValueError, match="two different functions are named 'scaled'"):
        module_text(kernel("first", 2.0), kernel("second", 3.0))
    with pytest.raises(UsageError, match="function 'scaled' cannot be loaded: Symbols not found"):
        library.address("scaled")


def test_a_function_can_be_kept_out_of_line() -> None:
    def code(inline: bool) -> str:
        k = KernelBuilder("caller", TARGETS[0])
        f = k.function("callee", [F32], lambda f, x: [x * 2.0], inline=inline)
        k.buffer(0, "f32").store(k.call(f, k.buffer(0, "f32").load())[0])
        return assembly(k.text())

    assert "callee" in code(inline=False)
    assert "callee" not in code(inline=True)


def test_misuse_is_refused_where_it_is_written() -> None:
    k = KernelBuilder("misuse", TARGETS[0])
    x: Pointer = k.buffer(0, "f32")
    with pytest.raises(TypeError, match="a value of type i64 cannot be used as f32: convert it first"):
        x.load() + k.i64(1)
    with pytest.raises(TypeError, match="no 'div' for i64; use // for integers"):
        k.dim(0) / 2
    with pytest.raises(TypeError, match="has no truth at emission time"):
        bool(k.dim(0).lt(1))
    with pytest.raises(TypeError, match="only a scalar can be broadcast"):
        k.broadcast(x.load(0, 4), 8)
    with pytest.raises(TypeError, match=r"yielded \(\) where \(f32\) is expected"), k.for_(0, 4, init=[x.load()]):
        pass
    with pytest.raises(ValueError, match="unknown element type 'f8'; known: i1, i8"):
        str(vec(4, "f8"))
