"""Fused ops whole or in parts: by name, by what there is, by time, by who brings a kernel."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fake_target
import pytest
from fake_target import variant

from kernelforge import builtin
from kernelforge.cli import app, output, tune_verb, why_verb
from kernelforge.cli.options import open_session
from kernelforge.constant import ArraySource
from kernelforge.descriptors import ImporterSpec
from kernelforge.errors import KernelForgeWarning, UsageError
from kernelforge.graph import Graph
from kernelforge.hookspecs import hookimpl
from kernelforge.importer import ImportedModel, Program
from kernelforge.plan import Plan
from kernelforge.plan_cache import plan_from_json, plan_to_json
from kernelforge.plugins import load_registry
from kernelforge.problem import Problem
from kernelforge.provenance import Provenance
from kernelforge.registry import Registry
from kernelforge.selection import RecordMatch
from kernelforge.session import Session
from kernelforge.tune.records import RecordStore
from kernelforge.variant import Accept, DeviceInfo, KernelVariant, Reject

WHOLE, NORM, MATMUL = (f"transformer.{op}" for op in ("rms_norm_matmul", "rms_norm", "matmul"))
THEIRS = Provenance("norms", "theirs", "1")
HOME = (variant("whole", op=WHOLE), variant("plain", op=NORM, priority=10), variant("product", op=MATMUL))
BETTER = variant("better", op=NORM, priority=20)


def text(*, silu: bool = False) -> str:
    g = Graph()
    x, weight = g.input("x", ("tokens", 64), "f32"), g.constant("weight", (64,), "f32")
    y = g.rms_norm_matmul(x, weight, g.constant("w", (64, 8), "f32"))
    g.output(g.silu(y) if silu else y, "y")
    return g.text()


class Reader:
    """Reads three models: one norm, or with one of any number of tokens, or with an activation."""

    def claims(self, source: str) -> bool:
        return source in ("norm", "norms", "silu")

    def load(self, source: str, **options: object) -> ImportedModel:
        decode = Program("decode", text(silu=source == "silu"), dims={"tokens": 1})
        programs = decode, Program("prefill", text(), max_dims={"tokens": 8})
        return ImportedModel(source, programs[: 1 + source.endswith("s")], ArraySource({}))


class WithReader(fake_target.FakePlugin):
    @hookimpl
    def kernelforge_importers(self) -> list[ImporterSpec]:
        return [ImporterSpec("norm", Reader)]


def registry(home: Sequence[KernelVariant] = HOME, theirs: Sequence[KernelVariant] = ()) -> Registry:
    """The target's kernels, and those of another distribution."""
    made = load_registry(entry_points=[], extra_plugins=[builtin, WithReader(home)])
    brought = tuple(replace(kernel, provenance=THEIRS) for kernel in theirs)
    return replace(made, hooks={**made.hooks, "kernelforge_kernels": (*made.hooks["kernelforge_kernels"], *brought)})


@dataclass
class Known:
    """Times of variants on whatever problem."""

    seconds: Mapping[str, float] = field(default_factory=dict)

    def matches(self, problem: Problem, variant: KernelVariant, device: DeviceInfo) -> Iterable[RecordMatch]:
        known = self.seconds.get(variant.name)
        return () if known is None else (RecordMatch({}, known, True, str(problem)),)

    def stamp(self) -> str:
        return ""


def plan(
    home: Sequence[KernelVariant] = HOME,
    theirs: Sequence[KernelVariant] = (),
    seconds: Mapping[str, float] | None = None,
    variants: Mapping[str, str] | None = None,
) -> Plan:
    opened = Session(
        "fake", registry=registry(home, theirs), records=Known(seconds or {}), variants=variants, pipeline=""
    )
    return opened.plan(text(), dims={"tokens": 1})


def kernels(made: Plan) -> list[str]:
    return [step.variant for step in made.steps]


def reason(made: Plan) -> str:
    (fusion,) = made.fusions
    assert fusion.apart == (len(made.steps) > 1)
    return fusion.reason


def test_it_stays_whole_beside_the_targets_own_parts() -> None:
    made = plan()
    assert kernels(made) == ["whole"]
    assert reason(made) == "one kernel in place of several"
    assert [p.variant for p in made.fusions[0].parts] == ["plain", "product"]


def test_a_plugins_kernel_that_is_chosen_for_a_part_takes_it_apart() -> None:
    made = plan(theirs=[BETTER])
    assert kernels(made) == ["better", "product"]
    assert reason(made) == f"better of norms (theirs 1) was chosen for {NORM}"
    assert kernels(plan(theirs=[replace(BETTER, priority=0)])) == ["whole"]  # not chosen
    assert kernels(plan(HOME[1:], [HOME[0], BETTER])) == ["whole"]  # the whole is a plugin's, too
    refuses = replace(BETTER, supports=lambda problem, device: Reject("not now"))
    assert kernels(plan(theirs=[refuses])) == ["whole"]


@pytest.mark.parametrize(("whole", "taken"), [(3e-6, ["whole"]), (5e-6, ["better", "product"])])
def test_the_quicker_way_is_taken_when_all_was_measured(whole: float, taken: list[str]) -> None:
    made = plan(theirs=[BETTER], seconds={"whole": whole, "better": 2e-6, "product": 2e-6, "plain": 9e-6})
    assert kernels(made) == taken
    assert reason(made) == f"measured {whole * 1e6:.1f} us whole, 4.0 us in parts"


def test_it_is_not_taken_apart_for_a_part_that_the_fallback_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Registry, "is_fallback", lambda self, kernel: kernel.name == "product")
    assert kernels(plan(theirs=[BETTER])) == ["whole"]
    assert kernels(plan(HOME[1:], [BETTER])) == ["better", "product"]  # there is no other way


def test_a_part_that_was_not_measured_leaves_it_to_the_other_rules() -> None:
    assert kernels(plan(seconds={"whole": 9e-6, "plain": 1e-6})) == ["whole"]


def test_a_kernel_that_is_asked_for_decides() -> None:
    with pytest.warns(KernelForgeWarning, match=rf"{WHOLE} is run in parts: 'plain' was asked for to run {NORM}"):
        made = plan(variants={NORM: "plain"})
    assert kernels(made) == ["plain", "product"]
    made = plan(theirs=[BETTER], variants={WHOLE: "whole"})
    assert (kernels(made), reason(made)) == (["whole"], "'whole' was asked for")


def test_a_kernel_that_is_asked_for_gives_way_where_it_refuses() -> None:
    def one_row(problem: Problem, device: DeviceInfo) -> Accept | Reject:
        return Accept() if problem.operand(0).shape[0] == 1 else Reject("takes one row")

    few = replace(HOME[1], name="few", supports=one_row)
    opened = Session("fake", registry=registry((*HOME, few)), records=Known(), variants={NORM: "few"}, pipeline="")
    with pytest.warns(
        KernelForgeWarning, match=r"another kernel takes its place: variant 'few' cannot run .*: takes one row"
    ):
        assert kernels(opened.plan(text(), dims={"tokens": 8})) == ["whole"]
    with pytest.warns(KernelForgeWarning, match="is run in parts: 'few' was asked for"):
        assert kernels(opened.plan(text(), dims={"tokens": 1})) == ["few", "product"]


def test_what_has_no_kernel_is_not_chosen() -> None:
    made = plan(HOME[1:])
    assert (kernels(made), reason(made)) == (["plain", "product"], "no kernel for the whole")
    made = plan(HOME[1:], variants={NORM: "plain"})  # nothing gives way to what is asked for: no warning
    assert (kernels(made), reason(made)) == (["plain", "product"], "no kernel for the whole")
    made = plan(HOME[:2], [BETTER])  # nothing multiplies
    assert kernels(made) == ["whole"]
    assert "no kernel on target 'fake' can run transformer.matmul" in reason(made)
    with pytest.raises(UsageError, match="no kernel on target 'fake'"):
        plan(HOME[1:2])


def test_a_plan_on_disk_keeps_what_became_of_it() -> None:
    for made in (plan(), plan(theirs=[BETTER])):
        assert plan_from_json(plan_to_json(made)) == made


def test_a_kernel_of_the_whole_that_fails_is_told_at_each_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(problem: Problem, device: DeviceInfo) -> Reject:
        raise RuntimeError("broken")

    monkeypatch.setenv("KERNELFORGE_HOME", str(tmp_path))
    monkeypatch.setattr("kernelforge.session.code_stamp", lambda _: "the same")  # plugins given as objects have none
    for _ in range(2):
        with pytest.warns(KernelForgeWarning, match="broken"):
            made = plan((replace(HOME[0], supports=fails), *HOME[1:]))
        assert kernels(made) == ["plain", "product"]


def run(verb: Any, using: Registry, **arguments: Any) -> Any:
    with output.use(fake_target.FakeOutput(using)):
        return verb(**arguments)


def test_why_says_what_was_fused_and_what_was_not_asked(capsys: pytest.CaptureFixture[str]) -> None:
    data = run(why_verb.why, registry(theirs=[replace(BETTER, priority=0)]), model="norm")
    (fusion,) = data["fusions"]
    assert (fusion["problem"].partition("(")[0], fusion["apart"]) == (WHOLE, False)
    assert [(p["problem"].partition(".")[0], p["steps"]) for p in data["problems"]] == [
        ("transformer", n) for n in (1, 0, 0)
    ]
    shown = capsys.readouterr().out
    assert "one kernel in place of several" in shown
    assert f"{NORM}: plain of" in shown
    with pytest.raises(UsageError, match=f"no step of the model 'norm' is a {NORM}") as caught:
        run(why_verb.why, registry(), op="rms_norm", model="norm")
    assert caught.value.hint == f"it is a part of {WHOLE}"
    with pytest.raises(UsageError, match=f"no step of the model 'norm' is a {WHOLE} on target 'fake'") as caught:
        run(why_verb.why, registry(HOME[1:]), op="rms_norm_matmul", model="norm")
    assert caught.value.hint == (
        f"the passes make it, but it runs there in parts (no kernel for the whole): {NORM}, {MATMUL}"
    )
    data = run(why_verb.why, registry(), problem=data["problems"][0]["problem"])
    assert [f["apart"] for f in data["fusions"]] == [False]
    assert json.dumps(data)


def test_why_shows_fusions_of_the_op_that_is_asked_for() -> None:
    using = registry((*HOME[1:], variant("active", op="transformer.silu")))
    for op, fused in ((None, [WHOLE]), ("matmul", [WHOLE]), ("silu", [])):
        found = run(why_verb.why, using, op=op, model="silu")["fusions"]
        assert [f["problem"].partition("(")[0] for f in found] == fused


def test_tuning_a_model_times_whole_and_parts_where_a_plugin_has_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERNELFORGE_HOME", str(tmp_path))

    def tuned(using: Registry) -> set[tuple[str, bool]]:
        problems = [p["problem"] for p in run(tune_verb.tune, using, model="norms")["problems"]]
        return {(key.partition("(")[0], "f32[1," in key) for key in problems}

    assert tuned(registry()) == {(WHOLE, True), (WHOLE, False)}
    # Times at one size decide nothing for a step of every size, which goes to the plugin's kernel.
    assert tuned(registry(theirs=[BETTER])) == {
        (WHOLE, True),
        (NORM, True),
        (MATMUL, True),
        (NORM, False),
        (MATMUL, False),
    }
    opened = Session("fake", registry=registry(theirs=[BETTER]))
    assert "us whole" in reason(opened.plan(text(), dims={"tokens": 1}))
    dynamic = reason(opened.plan(text(), max_dims={"tokens": 8}))
    assert f"was chosen for {NORM}; times do not decide for a step of any size" in dynamic


def test_options_name_a_kernel_and_leave_passes_out() -> None:
    out = fake_target.FakeOutput(registry())
    out.kernels, out.without_passes = ["rms_norm=plain"], ["fuse-qkv", "cse"]
    with output.use(out), open_session() as opened:
        assert opened.variants == {NORM: "plain"}
        names = [step.name for step in opened.pipeline.passes]
        assert "fuse-glu" in names
        assert not {"fuse-qkv", "cse"} & set(names)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--kernel", "attention"), "--kernel attention: not an op and a variant"),
        (("--kernel", "atention=split"), "unknown op 'atention'"),
        (("--kernel", "matmul=nobody"), "unknown variant 'nobody' of transformer.matmul on target 'reference'"),
        (("--without-pass", "fuse-all"), "unknown pass 'fuse-all'"),
        (("--without-pass", "quantize"), "the pipeline has no pass 'quantize'"),
    ],
)
def test_what_is_not_there_is_told(words: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["why", "silu", "--shape", "2x3", "--target", "reference", *words]) == 2
    assert message in capsys.readouterr().err


def test_two_kernels_for_an_op_are_refused() -> None:
    out = fake_target.FakeOutput(registry(theirs=[BETTER]))
    out.kernels = ["rms_norm=plain", "transformer.rms_norm=better"]
    with (
        output.use(out),
        pytest.raises(UsageError, match=f"two kernels to run {NORM} by: 'plain' and 'better'"),
        open_session(),
    ):
        pass


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        (("why", "silu", "--shape", "2x3", "--kernel", "silu=reference"), None),
        (("why", "silu", "--shape", "2x3", "--kernel", "gelu=reference"), "nothing ran transformer.gelu"),
        (("passes", "list", "--kernel", "gelu=reference"), "--kernel has no effect on 'passes list'"),
        (("passes", "list", "--without-pass", "cse"), "--without-pass has no effect on 'passes list'"),
    ],
)
def test_what_was_named_in_vain_is_told(
    words: tuple[str, ...], warning: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main([*words, "--target", "reference", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["warnings"]
    assert [warning in text for text in told] == [True] if warning else told == []


def test_a_plan_from_disk_uses_what_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNELFORGE_HOME", str(tmp_path))
    g = Graph()
    g.output(g.silu(g.input("x", (2, 3), "f32")), "y")
    named = {"transformer.silu": "reference", "transformer.gelu": "reference"}
    for _ in range(2):
        with Session("reference", variants=named) as opened:
            opened.plan(g.text())
            assert opened.unused_variants == {"transformer.gelu": "reference"}
    assert list(tmp_path.rglob("plans/*.json"))


def test_tuning_takes_the_kernel_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNELFORGE_HOME", str(tmp_path))
    out = fake_target.FakeOutput(registry(theirs=[BETTER]))
    out.kernels = ["rms_norm=plain"]
    with output.use(out):
        data = tune_verb.tune(op="rms_norm", shape="2x64,64")
    assert [p["best"]["variant"] for p in data["problems"]] == ["plain"]
    assert {r.variant for r in RecordStore.default().records} == {"plain"}
