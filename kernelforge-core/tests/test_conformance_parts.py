"""What the conformance suite is made of: guarded memory, covering choices, expectations, generated problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product

import numpy as np
import pytest
from mutant_target import Plugin, honest, registry, variant

from kernelforge.errors import AssetError, PluginError
from kernelforge.problem import Problem
from kernelforge.registry import default_registry
from kernelforge.testing.bench import Bench
from kernelforge.testing.case import LEVELS, Outcome, reproduce
from kernelforge.testing.collect import Scope, collect
from kernelforge.testing.expectations import expectations_of, parse
from kernelforge.testing.families import family_of
from kernelforge.testing.kernel_cases import KernelCases, edges_of, kernel_cases, some_configs
from kernelforge.testing.layouts import restrided
from kernelforge.testing.memory import POISONS, Guarded
from kernelforge.testing.pairwise import pairwise
from kernelforge.testing.values import fill, value_names
from kernelforge.variant import Accept, ConfigSpace, DeviceInfo, Reject, Verdict

FACTORS = {"a": (1, 2, 3), "b": ("x", "y"), "c": (True, False), "d": (0, 1, 2, 3)}


def pairs(choices: Sequence[Mapping[str, object]]) -> set[tuple[object, ...]]:
    return {(m, c[m], n, c[n]) for c in choices for m, n in combinations(FACTORS, 2)}


def test_pairs_are_covered_by_few_choices() -> None:
    found = pairwise(FACTORS)
    every = [dict(zip(FACTORS, values, strict=True)) for values in product(*FACTORS.values())]
    assert pairs(found) == pairs(every)
    assert len(found) <= 18 < len(every)
    assert found == pairwise(FACTORS)


def test_only_what_is_allowed_is_chosen() -> None:
    found = pairwise(FACTORS, allowed=lambda c: not (c["a"] == 1 and c["b"] == "x"))
    assert ("a", 1, "b", "x") not in pairs(found)
    assert ("a", 1, "b", "y") in pairs(found)
    assert len(pairs(found)) == 44 - 1
    assert pairwise(FACTORS, allowed=lambda c: False) == []
    assert sorted(c["a"] for c in pairwise({"a": (1, 2)})) == [1, 2]


@pytest.mark.parametrize("dtype", ["f32", "bf16", "i32", "f16"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 5)])
def test_guarded_memory_sees_what_is_written(dtype: str, shape: tuple[int, ...]) -> None:
    guarded = Guarded(shape, dtype, POISONS[1])
    assert guarded.array.shape == shape
    assert guarded.array.ctypes.data % 64 == guarded.array.itemsize or not guarded.array.size
    assert guarded.unwritten().all()
    assert not guarded.mutated()
    assert guarded.overrun() is None
    if guarded.array.size:
        guarded.array[(0,) * len(shape)] = 1
        assert guarded.mutated()
        assert guarded.unwritten().sum() == guarded.array.size - 1
    assert guarded.overrun() is None
    guarded._memory[guarded._inside.stop] ^= 1
    assert guarded.overrun() == guarded.nbytes
    guarded.spoil()
    guarded._memory[guarded._inside.start - 1] ^= 1
    assert guarded.overrun() == -1


def test_expectations_are_strict() -> None:
    text = """
        [[xfail]]
        case = "cpu/*/mine/4/*"
        kind = "wrong-values"
        reason = "flushed"
        [[tolerance]]
        variant = "cpu/x.y/mine"
        factor = 4
        reason = "bf16 inside"
    """
    found = parse(text)
    assert found.factors == {"cpu/x.y/mine": 4}
    failed = Outcome("cpu/x.y/mine/4/a", "failed", "wrong-values", "off")
    assert found.judge(failed).status == "expected-failure"
    assert found.judge(failed).message == "flushed: off"
    passed = found.judge(Outcome("cpu/x.y/mine/4/a", "passed"))
    assert (passed.status, passed.kind) == ("failed", "unexpected-pass")
    other = found.judge(Outcome("cpu/x.y/mine/4/a", "failed", "crashed", "gone"))
    assert (other.status, other.kind) == ("failed", "crashed")
    assert "announced as wrong-values" in other.message
    assert found.judge(Outcome("cpu/x.y/mine/1/a", "failed", "error")).status == "failed"
    assert found.unused(["cpu/x.y/mine/1/a"]) == ["cpu/*/mine/4/*"]
    assert not expectations_of("kernelforge").failures


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[xfail", "is not TOML"),
        ("[xfails]", "unknown table 'xfails'"),
        ('[[xfail]]\ncase = "x"', "has no reason"),
        ('[[xfail]]\ncase = "x"\nreason = ""', "reason = '' is not for"),
        ('[[xfail]]\ncase = "x"\nreason = "y"\nkind = "odd"', "unknown kind 'odd'"),
        ('[[tolerance]]\nvariant = "x"\nfactor = 0.5\nreason = "y"', "must be above 1"),
        ('[[tolerance]]\nvariant = "x"\nfactor = 2\nreason = "y"\nop = "z"', "op = 'z' is not for"),
        ('xfail = ["x"]', r"write \[\[xfail\]\]"),
    ],
)
def test_wrong_expectations_are_refused(text: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        parse(text)


def narrow(problem: Problem, device: DeviceInfo) -> Verdict:
    """Takes bare f32 products of whole tiles only."""
    lhs, rhs, bias, residual = problem.operands
    plain = bias is None and residual is None and problem.attr("epilogue") == "none"
    if not plain or lhs is None or rhs is None or (lhs.dtype, rhs.dtype) != ("f32", "f32"):
        return Reject("bare f32 only")
    if problem.attr("transpose_rhs") or problem.attr("transpose_lhs") or lhs.rank != 2 or rhs.rank != 2:
        return Reject("two matrices as they are")
    return Accept() if rhs.shape[1] in (64, 129) else Reject("64 or 129 columns")


def test_what_a_narrow_kernel_claims_is_found_and_tested() -> None:
    tested = variant("narrow", "transformer.matmul", honest, narrow)
    with Bench(registry(Plugin([tested]))) as bench:
        op, info = bench.registry.ops[tested.op], bench.session("mutant").device.info
        cases = kernel_cases(tested, op, info, LEVELS)
    claimed = [case for case in cases if not case.not_claimed]
    assert {case.level for case in claimed} == {1, 2, 3, 4, 5, 6}
    assert len([case for case in claimed if case.level == 2]) >= 10
    assert any("bare f32 only" in case.not_claimed for case in cases)
    assert len({case.id for case in cases}) == len(cases)


def test_cases_are_the_same_in_every_process() -> None:
    tested = variant("x", "transformer.rope", honest)
    with Bench(registry(Plugin([tested]))) as bench:
        op, info = bench.registry.ops[tested.op], bench.session("mutant").device.info
        one, two = ([case.id for case in kernel_cases(tested, op, info, LEVELS)] for _ in range(2))
    assert one == two


def test_a_backends_fallback_is_tested_for_how_tensors_get_there() -> None:
    with Bench(registry(Plugin([variant("own", "transformer.silu", honest)]))) as bench:
        cases = collect(bench, Scope("Plugin", op="silu"))
    levels = {name: {c.level for c in cases if c.name == name and not c.not_claimed} for name in ("own", "numpy")}
    assert levels == {"own": {1, 2, 3, 4, 5, 6}, "numpy": {1, 3}}


def test_random_problems_need_hypothesis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernelforge.testing.property.find_spec", lambda name: None)
    with Bench(registry(Plugin([variant("own", "transformer.silu", honest)]))) as bench:
        with pytest.raises(AssetError, match="made by hypothesis, which is not installed") as raised:
            collect(bench, Scope("Plugin", op="silu"))
        assert collect(bench, Scope("Plugin", 4, op="silu"))
    assert raised.value.hint == 'pip install "kernelforge-core[testing]", or --level 4'


def test_configs_cover_pairs_and_are_legal() -> None:
    space = ConfigSpace(
        (("a", tuple(range(8))), ("b", tuple(range(8)))),
        (("a + b is odd", lambda c: (int(c["a"]) + int(c["b"])) % 2 == 0),),
    )
    found = some_configs(space)
    assert 10 < len(found) <= 24
    assert all(config in space for config in found)
    assert some_configs(ConfigSpace()) == []


def test_tile_edges() -> None:
    assert edges_of({1, 8, 4096}) == [7, 8, 9]


def test_layouts_keep_shapes_and_never_overlap() -> None:
    tested = variant("x", "transformer.attention", honest)
    with Bench(registry(Plugin([tested]))) as bench:
        made = KernelCases(tested, bench.registry.ops[tested.op], bench.session("mutant").device.info)
        problem = next(made.plain_problems(dynamic=False))
        found = dict(restrided(problem, made.op))
    assert {label.rpartition("-")[0] for label in found} == {"rows-apart", "packed", "transposed", "steps"}
    for strided in found.values():
        assert [t and t.shape for t in strided.operands] == [t and t.shape for t in problem.operands]
        assert strided != problem


def test_every_kind_of_values_fits_every_op() -> None:
    with Bench(registry(Plugin())) as bench:
        info = bench.session("mutant").device.info
        for op in bench.registry.ops.values():
            made = KernelCases(variant("x", op.full_name, honest), op, info)
            for problem in made.plain_problems(dynamic=False):
                for name in value_names(op, problem):
                    arrays = fill(name, op, problem, np.random.default_rng(0))
                    for a, t in zip(arrays, problem.operands, strict=True):
                        assert (a is None) == (t is None)
                        assert a is None or t is None or t.quantised or a.shape == t.shape


def test_a_case_is_repeated_by_one_line() -> None:
    assert reproduce("cpu", "cpu/a.b/c/1/d") == "kernelforge conformance run cpu --case cpu/a.b/c/1/d"
    assert reproduce("x", "a b", threads=4) == "kernelforge conformance run x --case 'a b' --threads 4"


def test_ops_that_share_a_family_have_problems_of_their_own() -> None:
    ops = default_registry().ops
    assert family_of(ops["transformer.add"]) is family_of(ops["transformer.mul"])
    for name in ("add", "mul", "add"):
        op = ops[f"transformer.{name}"]
        problem = family_of(op).problem(op, family_of(op).first())
        assert problem is not None
        assert problem.op == op.full_name
