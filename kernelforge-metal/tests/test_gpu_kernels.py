"""The kernels of every op against the op's reference: its own samples as far as they are small, with every feature and none."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from kernelforge.dialects.transformer import OPS
from kernelforge.problem import Problem, parse_problem
from kernelforge.session import Session
from kernelforge.tolerance import expect
from kernelforge.tune.verify import Workload
from kernelforge.variant import Accept, DeviceInfo, KernelVariant, Reject
from kernelforge_metal.adapters import SOFTWARE
from kernelforge_metal.bindings import Bindings, Bound
from kernelforge_metal.executable import GpuExecutable
from kernelforge_metal.inputs import Given
from kernelforge_metal.kernel import GpuKernel, shader
from kernelforge_metal.kernels import rope_cache
from kernelforge_metal.kernels.catalog import VARIANTS
from kernelforge_metal.rolled import rolled

SMALL = 20_000
"""Elements of all operands and results: software computes them in no time."""

DEFS = {op.full_name: op for op in OPS}
MINE = [v for v in VARIANTS if not v.op.endswith("matmul")]


def samples(variant: KernelVariant) -> Iterator[Problem]:
    for problem in DEFS[variant.op].samples(random.Random(5)):
        if sum(t.size() for t in (*problem.operands, *problem.results) if t is not None) <= SMALL:
            yield problem


@pytest.mark.parametrize("device", ["gpu", "plain_gpu"])
@pytest.mark.parametrize("variant", MINE, ids=lambda v: f"{v.op.partition('.')[2]}-{v.name}")
def test_samples(request: pytest.FixtureRequest, variant: KernelVariant, device: str) -> None:
    session: Session = request.getfixturevalue(device)
    taken = [p for p in samples(variant) if variant.judge(p, session.device.info) == Accept()]
    assert taken
    chosen = taken if device == "gpu" else taken[:: max(1, len(taken) // 3)]
    for problem in chosen:
        work = Workload(session, problem)
        work.verify(session.compile_problem(problem, constants=work.constants, variant=variant.name))


def device(*features: str, **limits: int) -> DeviceInfo:
    named = {name.replace("_", "-"): value for name, value in limits.items()}
    return DeviceInfo("gpu", "null", "null", frozenset(features), tuple(sorted(named.items())))


def built(variant: KernelVariant, problem: Problem, info: DeviceInfo) -> GpuKernel:
    kernel = variant.build_kernel(problem, variant.default_config(problem, info), info)
    assert isinstance(kernel, GpuKernel)
    return kernel


@pytest.mark.parametrize("variant", MINE, ids=lambda v: f"{v.op.partition('.')[2]}-{v.name}")
def test_shaders_are_written_without_a_device(variant: KernelVariant) -> None:
    """For a device with everything and one with nothing: all names that are used are declared, features only where they are."""
    rich, poor = device("shader-f16", "subgroup", "immediates"), device()
    for problem in samples(variant):
        for info in (rich, poor):
            verdict = variant.judge(problem, info)
            if isinstance(verdict, Reject):
                assert verdict.reason
                continue
            kernel = built(variant, problem, info)
            for dispatch in kernel.dispatches:
                text = shader(problem, kernel, dispatch, immediates=info is rich)
                assert "fn main(" in text
                assert ("subgroup_size" in text) <= (info is rich)
                assert ("enable f16;" in text) <= (info is rich)
                assert ("var<immediate>" in text) == (info is rich and "struct Parameters" in text)
                assert min(dispatch.grid([1] * len(problem.dims))) >= 1


ON_HARDWARE = (
    ("attention", "tile"),
    ("attention", "split"),
    ("rope_attention", "split"),
    ("matmul", "gemm"),
    ("glu_matmul", "gemm"),
)
"""Kernels whose default config for a processor has less text than that for other devices."""


@pytest.mark.parametrize(("op", "name"), ON_HARDWARE)
def test_what_hardware_runs_by_default(gpu: Session, op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernelforge_metal.device.rolled", lambda code: code)
    variant = next(v for v in VARIANTS if (v.op, v.name) == (f"transformer.{op}", name))
    info = gpu.device.info
    hardware, software = info.features - {SOFTWARE}, info.features | {SOFTWARE}
    problem = next(p for p in samples(variant) if variant.judge(p, info) == Accept())
    config = variant.default_config(problem, replace(info, features=hardware))
    assert config != variant.default_config(problem, replace(info, features=software))
    work = Workload(gpu, problem)
    work.verify(gpu.compile_problem(problem, constants=work.constants, variant=name, config=config))


def test_only_loops_that_begin_at_a_number_are_kept_from_being_written_out() -> None:
    main = "fn main(ids: Ids) { for (var i = 3u; i < 9u; i++) { f(); } for (var j = ids.thread; j < 9u; j++) { f(); } }"
    found = rolled(main)
    assert "for (var i = 3u + rolled_zero; i < 9u; i++)" in found
    assert "for (var j = ids.thread; j < 9u; j++)" in found
    assert found.startswith("fn main(ids: Ids) { rolled_zero = ids.groups.x >> 16u;")
    assert found.count("var<private> rolled_zero: u32;") == 1
    for untouched in (main.replace("3u", "k"), main.replace("main(ids: Ids)", "main(place: Place)")):
        assert rolled(untouched) == untouched


def test_reasons_to_refuse() -> None:
    kernels = {(v.op.partition(".")[2], v.name): v for v in VARIANTS}

    def reason(op: str, name: str, text: str, *features: str, **limits: int) -> str:
        verdict = kernels[op, name].judge(parse_problem(text), device(*features, **limits))
        assert isinstance(verdict, Reject)
        return verdict.reason

    assert "not f64" in reason("silu", "wgsl", "transformer.silu(f64[4]) -> (f64[4]) {}")
    attrs = "{causal=true, scale=0.0, softcap=0.0, window=0}"
    odd = "transformer.attention(f32[1,1,6], f32[4,1,6], f32[4,1,6], _, _, _) -> (f32[1,1,6]) " + attrs
    assert "a multiple of 4 elements" in reason("attention", "tile", odd)
    many = "transformer.attention(f32[64,1,8], f32[64,1,8], f32[64,1,8], _, _, _) -> (f32[64,1,8]) " + attrs
    assert "takes 1 to 8 tokens" in reason("attention", "split", many)


def test_a_table_larger_than_a_binding_is_looked_up_in_pieces(gpu: Session) -> None:
    problem = parse_problem('transformer.embedding(f32[1100,64]@const, i32[9]) -> (f32[9,64]) {dtype="f32"}')
    variant = next(v for v in VARIANTS if v.op == problem.op and v.name == "wgsl")
    info = device(max_storage_buffer_binding_size=512 * 64 * 4)
    kernel = built(variant, problem, info)
    tables = [d.bindings[0] for d in kernel.dispatches]
    assert [(t.start, t.nbytes) for t in tables] == [(0, 131072), (131072, 131072), (262144, 19456)]


@pytest.mark.parametrize("table", ["f32[700,64]", *(f"{t}[700,64]@const" for t in ("f32", "f16", "q8", "q4"))])
def test_an_id_outside_a_table_gives_zeros(gpu: Session, table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = gpu.device.info
    row = {"f32": 256, "f16": 128, "q8[": 64, "q4[": 32}[table[:3]]
    limits = {**dict(known.limits), "max-storage-buffer-binding-size": 300 * row}
    small = replace(known, limits=tuple(sorted(limits.items())))
    if "@const" in table:  # in pieces
        monkeypatch.setattr(gpu.device, "_info", small)
        monkeypatch.setattr(gpu.device, "_kernels", {})
    problem = parse_problem(f'transformer.embedding({table}, i32[9]) -> (f32[9,64]) {{dtype="f32"}}')
    work = Workload(gpu, problem)
    executable = gpu.compile_problem(problem, constants=work.constants)
    ids = np.array([-1, 0, 700, 7, -(2**31), 699, 2**31 - 1, 400, 2**30], np.int32)
    inputs = {"ids": np.clip(ids, 0, 699)}
    if "@const" not in table:
        inputs["table"] = np.random.default_rng(0).standard_normal((700, 64)).astype(np.float32)
    wanted = np.asarray(executable.run(inputs)[0])
    out = np.asarray(executable.run({**inputs, "ids": ids})[0])
    outside = (ids < 0) | (ids >= 700)
    assert not out[outside].any()
    np.testing.assert_array_equal(out[~outside], wanted[~outside])
    assert wanted[~outside].any(axis=-1).all()


def test_a_window_without_causality_sees_all_later_keys(gpu: Session) -> None:
    attrs = "{causal=false, scale=0.0, softcap=0.0, window=1}"
    shapes = "f32[2,2,16], f32[2,300,1,16], f32[2,300,1,16], i32[2], i32[2], i32[2]"
    problem = parse_problem(f"transformer.attention({shapes}) -> (f32[2,2,16]) {attrs}")
    for name in ("split", "tile", "wgsl"):
        for _ in range(3):  # positions and lengths are drawn
            Workload(gpu, problem).verify(gpu.compile_problem(problem, variant=name))


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("name", ["split", "tile", "wgsl"])
def test_nan_reaches_the_rows_that_see_it_and_no_other(gpu: Session, name: str, softcap: float) -> None:
    attrs = f"{{causal=true, scale=0.0, softcap={softcap}, window=0}}"
    shapes = "f32[3,4,16], f32[1,9,2,16], f32[1,9,2,16], i32[3], i32[3], _"
    problem = parse_problem(f"transformer.attention({shapes}) -> (f32[3,4,16]) {attrs}")
    rng = np.random.default_rng(0)
    arrays = {
        n: rng.standard_normal(s, np.float32) for n, s in (("q", (3, 4, 16)), *((n, (1, 9, 2, 16)) for n in "kv"))
    }
    arrays |= {"positions": np.array([2, 3, 4], np.int32), "slots": np.zeros(3, np.int32)}
    executable = gpu.compile_problem(problem, variant=name)
    whole = np.asarray(executable.run(arrays)[0])
    arrays["v"][0, 3, 0, 5] = np.nan  # of the heads 0 and 1
    arrays["k"][0, 4, 1, 0] = np.nan  # of the heads 2 and 3
    spoilt = np.zeros((3, 4, 16), bool)
    spoilt[1:, :2, 5] = spoilt[2:, 2:] = True
    found = np.asarray(executable.run(arrays)[0])
    np.testing.assert_array_equal(np.isnan(found), spoilt)
    np.testing.assert_allclose(found[~spoilt], whole[~spoilt], rtol=1e-5)


def test_few_keys_are_not_shared_out(gpu: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """One executable, on either side of what a workgroup takes; a position that the host does not see may be any."""
    attrs = "{causal=true, scale=0.0, softcap=0.0, window=0}"
    shapes = "f32[2,6,16], f16[2,80,2,16], f16[2,80,2,16], i32[2], i32[2], _"
    problem = parse_problem(f"transformer.attention({shapes}) -> (f32[2,6,16]) {attrs}")
    op, rng = DEFS[problem.op], np.random.default_rng(0)
    executable = gpu.compile_problem(problem, variant="split", config={"chunk": 32, "early": 16})
    assert isinstance(executable, GpuExecutable)
    q, k, v, _, slots, _ = op.make_inputs(problem, rng)
    buffer = gpu.device.allocate((2,), "i32")
    for places, dispatches in (((31, 4), 1), ((32, 4), 2), ((-1, 0), 1), ((79, -1), 2), ((31, 4), 1)):
        positions = np.array(places, np.int32)
        (want,) = expect(problem, op, [q, k, v, positions, slots, None])
        buffer.write(positions)
        for given, ran in ((positions, dispatches), (buffer, 2)):
            submitted = record(executable, monkeypatch)
            arrays = {"q": q, "k": k, "v": v, "positions": given, "slots": slots}
            found = np.asarray(executable.run({n: a for n, a in arrays.items() if a is not None})[0])
            assert (abs(found - want.exact) <= want.allowed).all()
            assert submitted == [ran]


def record(executable: GpuExecutable, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many dispatches each run from now on binds or has bound."""
    counts: list[int] = []
    bindings: Bindings = vars(executable)["_bindings"]
    bound = bindings.of

    def of(given: Given) -> Bound:
        found = bound(given)
        counts.append(sum(map(len, found.steps)))
        return found

    monkeypatch.setattr(bindings, "of", of)
    return counts


def test_a_device_that_binds_few_buffers_rotates_queries_in_a_dispatch_of_their_own(
    gpu: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = "factor=1.0, high_freq_factor=4.0, interleaved=false, low_freq_factor=1.0, max_position=21"
    attrs = f'{{{names}, original_max_position=0, rotary_dim=4, scaling="none", theta=10000.0}}'
    shapes = "f32[5,3,6], f32[5,1,6], f32[5,1,6], f16[2,21,1,6], f16[2,21,1,6], i32[5], i32[5]"
    results = "f32[5,3,6], f16[2,21,1,6], f16[2,21,1,6]"
    problem = parse_problem(f"transformer.rope_cache_update({shapes}) -> ({results}) {attrs}")
    variant = next(v for v in VARIANTS if v.op == problem.op)
    limits = {"max_storage_buffers_per_shader_stage": 9}
    assert len(built(variant, problem, device(**limits)).dispatches) == 1
    few = built(variant, problem, device())
    assert [len(d.bindings) for d in few.dispatches] == [4, 7]
    monkeypatch.setattr(rope_cache, "BUFFERS", 1000)
    Workload(gpu, problem).verify(gpu.compile_problem(problem, variant=variant.name))
