"""Samplers, inputs and costs of all ops."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from kernelforge.dialects.transformer import OPS
from kernelforge.dtype import to_numpy
from kernelforge.op import OpDef
from kernelforge.problem import Problem, parse_problem
from kernelforge.quant import dequantize

CHEAP = 2e6
"""Bytes up to which a sample is evaluated here."""

each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


def samples(op: OpDef, seed: int = 0) -> list[Problem]:
    return list(op.samples(random.Random(seed)))


@each_op
def test_samples_are_static_valid_and_reproducible(op: OpDef) -> None:
    found = samples(op)
    assert len(found) >= 8
    assert found == samples(op)
    for problem in found:
        assert problem.op == op.full_name
        assert not problem.dims
        assert parse_problem(str(problem)) == problem
        assert op.problem(problem.operands, dict(problem.attrs)) == problem


@each_op
def test_the_first_samples_are_small_and_the_last_are_real(op: OpDef) -> None:
    costs = [op.problem_cost(p).bytes for p in samples(op)]
    assert max(costs[:3]) < 3e4
    assert max(costs) > 50 * max(costs[:3])


@each_op
def test_samples_cover_the_optional_operands_and_every_choice(op: OpDef) -> None:
    found = samples(op)
    for i, operand in enumerate(op.operands):
        if operand.optional:
            assert {p.operands[i] is None for p in found} == {True, False}, operand.name
    for spec in op.attributes:
        if spec.name == "transpose_rhs" and "quantize" in op.name:
            continue  # quantised weights are always stored as [N, K]
        if spec.kind == "bool":
            assert {p.attr(spec.name) for p in found} == {True, False}, spec.name
        elif spec.choices and "i8" not in spec.choices and op.name != "embedding":
            assert {p.attr(spec.name) for p in found} == set(spec.choices), spec.name


@each_op
def test_samples_cover_reduced_precision(op: OpDef) -> None:
    dtypes = {t.dtype for p in samples(op) for t in (*p.operands, *p.results) if t is not None}
    assert {"f32", "bf16", "f16"} <= dtypes


@each_op
def test_inputs_fit_and_references_give_finite_results_of_the_inferred_types(op: OpDef) -> None:
    for problem in samples(op, seed=3):
        if op.problem_cost(problem).bytes > CHEAP or sum(t.nbytes() for t in problem.operands if t) > 8 * CHEAP:
            continue
        arrays = op.make_inputs(problem, np.random.default_rng(0))
        for array, t in zip(arrays, problem.operands, strict=True):
            assert (array is None) == (t is None)
            if array is not None and t is not None:
                assert (array.shape, array.dtype) == (t.array_shape(), to_numpy(t.dtype))
        before = [None if a is None else a.copy() for a in arrays]
        outputs = op.evaluate(problem, arrays)
        for array, t in zip(outputs, problem.results, strict=True):
            assert (array.shape, array.dtype) == (t.array_shape(), to_numpy(t.dtype))
            assert array.flags.c_contiguous
            assert np.isfinite((dequantize(array) if t.quantised else array).astype(np.float64)).all()
        for given, saved in zip(arrays, before, strict=True):
            np.testing.assert_array_equal(given, saved)


@each_op
def test_costs_are_positive_and_grow_with_the_problem(op: OpDef) -> None:
    found = [op.problem_cost(p) for p in samples(op)]
    assert all(c.flops >= 0 and c.bytes > 0 for c in found)
    moves_only = op.exact
    assert all((c.flops == 0) == moves_only for c in found)
    by_bytes = sorted(c.bytes for c in found)
    assert any(a < b for a, b in pairwise(by_bytes))
