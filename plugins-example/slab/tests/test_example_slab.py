from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from kernelforge.bench.matmul import matmul_problem
from kernelforge.problem import Problem, parse_problem
from kernelforge.session import Session
from kernelforge.tune.verify import Workload
from kernelforge.variant import Accept, KernelVariant, Reject

MATMUL = "transformer.matmul"


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERNELFORGE_HOME", str(tmp_path_factory.mktemp("home")))
        with Session("cpu", threads=2) as opened:
            yield opened


@pytest.fixture
def variant(session: Session) -> KernelVariant:
    return session.registry.variant("cpu", MATMUL, "slab")


def product(operands: str, result: str, **attrs: bool) -> Problem:
    given = {"transpose_lhs": False, "transpose_rhs": False, **attrs}
    text = ", ".join(f"{name}={str(value).lower()}" for name, value in given.items())
    return parse_problem(f'{MATMUL}({operands}) -> ({result}) {{epilogue="none", {text}}}')


def test_what_it_takes(session: Session, variant: KernelVariant) -> None:
    info = session.device.info
    two = "f32[3,4], f32[4,5]"
    assert variant.judge(product(f"{two}, _, _", "f32[3,5]"), info) == Accept()
    assert variant.judge(product(f"{two}, f32[5], _", "f32[3,5]"), info) == Reject("takes neither bias nor residual")
    batched = product("f32[2,3,4], f32[4,5], _, _", "f32[2,3,5]")
    assert variant.judge(batched, info) == Reject("takes two matrices")
    turned = product("f32[3,4], f32[5,4], _, _", "f32[3,5]", transpose_rhs=True)
    assert variant.judge(turned, info) == Reject("takes transpose_rhs=False, not True")


@pytest.mark.parametrize("operands", ["f32[1,70], f32[70,300]", "f32[7,33]:[50,1], f32[33,65]:[1,33]"])
def test_right_for_every_width(session: Session, variant: KernelVariant, operands: str) -> None:
    m, n = (1, 300) if "300" in operands else (7, 65)
    problem = product(f"{operands}, _, _", f"f32[{m},{n}]")
    for config in variant.config_space(problem, session.device.info):
        executable = session.compile_problem(problem, variant="slab", config=config)
        Workload(session, problem).verify(executable)


def test_some_samples_of_the_op(session: Session, variant: KernelVariant) -> None:
    samples = session.registry.ops[MATMUL].samples(random.Random(0))
    taken = [p for p in samples if variant.judge(p, session.device.info) == Accept()]
    for problem in taken[:2]:
        Workload(session, problem).verify(session.compile_problem(problem, variant="slab"))


def test_it_is_not_chosen_before_the_built_in_ones(session: Session) -> None:
    assert session.select(matmul_problem(session.registry, 8, 8, 8)).variant.name != "slab"
