from __future__ import annotations

import random
import warnings
from collections.abc import Iterator

import pytest

from kernelforge.errors import KernelForgeWarning
from kernelforge.problem import parse_problem
from kernelforge.session import Session
from kernelforge.tune.verify import Workload
from kernelforge.variant import Accept, Reject
from kernelforge_metal.adapters import list_adapters

OP = "transformer.rms_norm"
PROBLEM = parse_problem(f"{OP}(f32[7,100]:[128,1], f32[100]) -> (f32[7,100]) {{eps=1e-05}}")


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    if not list_adapters():
        pytest.skip("no GPU adapter here; on Debian and Ubuntu: apt install mesa-vulkan-drivers libvulkan1")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", KernelForgeWarning)  # a software GPU says so
        patch.setenv("KERNELFORGE_HOME", str(tmp_path_factory.mktemp("home")))
        with Session("gpu") as opened:
            yield opened


def test_right_for_every_size_of_a_workgroup(session: Session) -> None:
    configs = list(session.registry.variant("gpu", OP, "rowwise").config_space(PROBLEM, session.device.info))
    assert [c["threads"] for c in configs] == [128, 32, 256]
    for config in configs:
        Workload(session, PROBLEM).verify(session.compile_problem(PROBLEM, variant="rowwise", config=config))


def test_right_for_small_samples_of_the_op(session: Session) -> None:
    variant = session.registry.variant("gpu", OP, "rowwise")
    problems = [p for p in session.registry.ops[OP].samples(random.Random(0)) if p.operand(0).size() < 1000]
    taken = [p for p in problems if variant.judge(p, session.device.info) == Accept()]
    assert len(taken) > 4
    for problem in taken[::2]:
        work = Workload(session, problem)
        work.verify(session.compile_problem(problem, constants=work.constants, variant="rowwise"))


def test_it_takes_part_without_being_chosen_unmeasured(session: Session) -> None:
    selection = session.select(PROBLEM)
    assert selection.variant.name == "wgsl"
    assert "rowwise" in {d.variant.name for d in selection.decisions}
    wide = parse_problem(f"{OP}(f64[7,100], f64[100]) -> (f64[7,100]) {{eps=1e-05}}")
    verdict = session.registry.variant("gpu", OP, "rowwise").judge(wide, session.device.info)
    assert verdict == Reject("takes f32, f16, bf16, not f64")
