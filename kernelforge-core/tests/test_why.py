"""`why`, `tune`, `records` and `emit-mlir` as verbs, on a scripted target."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_target
import pytest
from fake_target import Kernel, variant

from kernelforge import builtin
from kernelforge.cli import app, output, records_verbs, tune_verb, why_verb
from kernelforge.cli.emit_verb import Stage, decoder_block, emit_mlir
from kernelforge.cli.problems import checked_problem, find_op
from kernelforge.cli.shapes import shape_example
from kernelforge.constant import ArraySource
from kernelforge.descriptors import ImporterSpec
from kernelforge.errors import AssetError, KernelForgeWarning, PartialResult, UsageError
from kernelforge.graph import Graph
from kernelforge.hookspecs import hookimpl
from kernelforge.importer import ImportedModel, Program
from kernelforge.module import Module
from kernelforge.plugins import load_registry
from kernelforge.registry import Registry
from kernelforge.tune.records import RecordStore
from kernelforge.variant import ConfigSpace, Reject

SPACE = ConfigSpace((("tile", (4, 8, 16)),))
SIZES: dict[str, Any] = {"m": 8, "n": 4, "k": 16}


def tiled() -> Any:
    seconds = {4: 3e-3, 8: 1e-3, 16: 2e-3}
    return variant("tiled", lambda c: Kernel(seconds=seconds[int(c["tile"])]), space=SPACE, priority=1)


def registry() -> Registry:
    picky = variant("picky", supports=lambda problem, device: Reject("wants 64 columns, there are 4"))
    return fake_target.registry(tiled(), variant("plain"), picky)


class TwoLayers:
    """Reads a model that is called "toy:two"."""

    def claims(self, source: str) -> bool:
        return source.startswith("toy:")

    def load(self, source: str, **options: object) -> ImportedModel:
        assert options["device"] is fake_target.INFO, "a model is read for the device that it will run on"
        g = Graph()
        x = g.input("x", ("tokens", 16), "f32")
        for name in ("one", "two"):
            x = g.matmul(x, g.constant(name, (16, 16), "f32"))
        g.output(x, "y")
        text = g.text()
        programs = (Program("decode", text, dims={"tokens": 1}), Program("prefill", text, max_dims={"tokens": 32}))
        return ImportedModel(source, programs, ArraySource({}))


class WithModels(fake_target.FakePlugin):
    @hookimpl
    def kernelforge_importers(self) -> list[ImporterSpec]:
        return [ImporterSpec("toy", TwoLayers)]


def output_of(using: Registry | None = None, target: str = "fake") -> output.Output:
    return fake_target.FakeOutput(using or registry(), target)


def run(verb: Callable[..., Any], *arguments: Any, using: Registry | None = None, **options: Any) -> dict[str, Any]:
    """Call a verb as the command line does, and return its data."""
    with output.use(output_of(using, options.pop("target", "fake"))):
        return dict(verb(*arguments, **options))


# why


def test_why_shows_each_candidate_with_its_verdict_and_reason(capsys: pytest.CaptureFixture[str]) -> None:
    data = run(why_verb.why, "matmul", **SIZES)
    (problem,) = data["problems"]
    assert (problem["variant"], problem["config"], problem["config_source"]) == ("tiled", {"tile": 4}, "default")
    assert {(c["plugin"], c["distribution"], c["version"]) for c in problem["candidates"]} == {
        ("FakePlugin", "given as an object", "")
    }
    told = [(c["variant"], c["verdict"], c["reason"], c["plugin"]) for c in problem["candidates"]]
    assert [t[:3] for t in told] == [
        ("tiled", "chosen", "highest priority; nothing measured"),
        ("plain", "accepts", "priority 0, the chosen one has 1"),
        ("picky", "rejects", "wants 64 columns, there are 4"),
    ]
    shown = capsys.readouterr().out
    assert "chosen: tiled of FakePlugin (given as an object): " in shown
    assert "(the variant's own choice)" in shown
    assert "wants 64 columns, there are 4" in shown


def test_after_tuning_why_names_the_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    tuned = run(tune_verb.tune, "matmul", **SIZES)
    (report,) = tuned["problems"]
    assert (report["best"]["variant"], report["best"]["config"]) in (("tiled", {"tile": 8}), ("plain", {}))
    assert report["complete"]
    assert report["trials"] >= 4
    assert report["known"] == 0
    (problem,) = run(why_verb.why, "matmul", **SIZES)["problems"]
    assert problem["config_source"] == "record"
    assert problem["reason"] == "fastest measured: 1000.0 us"
    assert "(measured on this problem)" in capsys.readouterr().out
    (near,) = run(why_verb.why, "matmul", m=9, n=4, k=16)["problems"]
    assert (near["variant"], near["config"], near["config_source"]) == ("tiled", {"tile": 8}, "nearest-record")
    assert near["candidates"][0]["measured_on"] == tuned["problems"][0]["problem"]
    assert "(measured on a similar problem, transformer.matmul(f32[8,16]" in capsys.readouterr().out


def test_a_problem_can_be_named_by_its_key() -> None:
    key = run(why_verb.why, "matmul", **SIZES)["problems"][0]["problem"]
    assert run(why_verb.why, problem=key)["problems"][0]["problem"] == key
    short = "transformer.matmul(f32[8,16], f32[16,4]@const) -> (f32[8,4]) {}"
    assert run(why_verb.why, problem=short)["problems"][0]["problem"] == key


def test_a_model_is_all_its_problems(capsys: pytest.CaptureFixture[str]) -> None:
    using = load_registry(entry_points=[], extra_plugins=[builtin, WithModels([tiled()])])
    data = run(why_verb.why, model="toy:two", using=using)
    found = [(p["problem"].split(" ")[0], p["programs"], p["steps"]) for p in data["problems"]]
    assert found == [
        ("transformer.matmul(f32[1,16],", ("decode",), 2),
        ("transformer.matmul(f32[?0,16],", ("prefill",), 2),
    ]
    assert "prefill" in capsys.readouterr().out
    assert run(why_verb.why, "matmul", model="toy:two", using=using) == data
    with pytest.raises(UsageError, match=r"no step of the model 'toy:two' is a transformer\.silu"):
        run(why_verb.why, "silu", model="toy:two", using=using)
    tuned = run(tune_verb.tune, model="toy:two", using=using)
    assert [p["programs"] for p in tuned["problems"]] == [("decode",), ("prefill",)]
    assert "f32[32,16]" in tuned["problems"][1]["problem"]
    assert all(p["best"]["config"] == {"tile": 8} for p in tuned["problems"])
    after = run(why_verb.why, model="toy:two", using=using)["problems"]
    sources = [(p["config"]["tile"], p["config_source"]) for p in after]
    assert sources == [(8, "record"), (8, "nearest-record")]
    with pytest.raises(AssetError, match=r"cannot read the model 'x\.onnx': none of the importers \(toy\) reads it"):
        run(why_verb.why, model="x.onnx", using=using)
    with pytest.raises(AssetError, match="no importer is installed"):
        run(why_verb.why, model="x.onnx")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "name one of: an op"),
        ({"problem": "p()", "model": "m"}, "name one of: an op"),
        ({"op": "matmul", "problem": "p()"}, "name one of: an op"),
        ({"model": "m", "shape": "3x4"}, "--model excludes --shape"),
        ({"op": "matmul", "m": 3}, "matmul needs its sizes"),
        ({"op": "matmull"}, "unknown op 'matmull'"),
        ({"op": "softmax"}, "softmax needs the shapes of its operands"),
        ({"op": "matmul", **SIZES, "shape": "8x16,16x4"}, "--shape and --m, --n, --k exclude each other"),
        ({"op": "softmax", "shape": "3xy"}, "'3xy' is not a shape"),
        ({"op": "softmax", "shape": "3,4"}, r"transformer\.softmax does not take this problem: takes operands \(x\)"),
        ({"op": "softmax", "shape": "3", "dtype": "f32,f32"}, "--dtype names 2 types, --shape 1 operands"),
        ({"op": "softmax", "shape": "3", "attr": ["axis=x"]}, "--attr axis=x: 'x' is not of kind int"),
        ({"op": "softmax", "shape": "3", "attr": ["side=1"]}, "attribute 'side' is unknown to softmax"),
        ({"op": "rope", "shape": "4x2x64,4"}, "attribute 'max_position' is required"),
        ({"op": "matmul", **SIZES, "dtype": "i8"}, "matmul has no dtype 'i8'"),
        ({"op": "matmul", **SIZES, "variant": "nope"}, "unknown variant 'nope'"),
        ({"problem": "matmul"}, "'matmul' is not a problem"),
        (
            {"problem": "transformer.silu(f32[4], f32[4]) -> (f32[4]) {}"},
            r"transformer\.silu does not take this problem: takes operands",
        ),
        (
            {"problem": "transformer.silu(f32[4]) -> (f32[5]) {}"},
            r"transformer\.silu gives \(f32\[4\]\) for these operands",
        ),
        ({"problem": "toy.x(f32[4]) -> (f32[4]) {}"}, r"unknown op 'toy\.x'"),
    ],
)
def test_requests_that_name_no_problem(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(why_verb.why, **arguments)


def test_ops_are_found_by_either_name_and_hints_are_problems() -> None:
    using = registry()
    assert find_op(using, "matmul") is find_op(using, "transformer.matmul")
    with pytest.raises(UsageError) as raised:
        run(why_verb.why, problem="transformer.softmax(f32[4], f32[4]) -> (f32[4]) {}")
    key = str(raised.value.hint).removeprefix("one it takes: ")
    assert str(checked_problem(using, key)) == key


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("matmul --shape 8x16,16x4", "transformer.matmul(f32[8,16], f32[16,4]@const, _, _) -> (f32[8,4])"),
        ("matmul --shape 8x16,16x4,_,8x4", "transformer.matmul(f32[8,16], f32[16,4]@const, _, f32[8,4])"),
        ("matmul --shape 8x16,16x4 --dtype bf16", "transformer.matmul(f32[8,16], bf16[16,4]@const, _, _)"),
        ("matmul --shape 8x16,16x4 --dtype f16,f16", "transformer.matmul(f16[8,16], f16[16,4]@const, _, _)"),
        (
            "matmul --shape 8x64,16x64 --dtype q4 --attr transpose_rhs=true",
            "transformer.matmul(f32[8,64], q4[16,64]@const, _, _)",
        ),
        (
            "rms_norm_matmul --shape 8x64,64,16x64,16 --dtype q4 --attr transpose_rhs=true",
            "transformer.rms_norm_matmul(f32[8,64], f32[64]@const, q4[16,64]@const, f32[16]@const, _)",
        ),
        (
            "rms_norm_quantize_glu_matmul --shape 8x64,64,16x64,16x64 --dtype q4",
            "transformer.rms_norm_quantize_glu_matmul(f32[8,64], f32[64]@const, q4[16,64]@const, q4[16,64]@const)",
        ),
        ("matmul --shape 8x16,16x4 --no-constant", "transformer.matmul(f32[8,16], f32[16,4], _, _)"),
        ("rms_norm --shape ?x16,16 --dtype bf16", "transformer.rms_norm(f32[?0,16], bf16[16]@const)"),
        ("silu --shape 3x5 --dtype bf16", "transformer.silu(bf16[3,5])"),
        ("concat --shape 2x3,2x4,2x5 --attr axis=1", "transformer.concat(f32[2,3], f32[2,4], f32[2,5]) -> (f32[2,12])"),
        ("transpose --shape 2x3 --attr perm=1,0", "transformer.transpose(f32[2,3]) -> (f32[3,2])"),
        ("rope --shape 4x2x64,4 --attr max_position=9", "transformer.rope(f32[4,2,64], i32[4])"),
        ("attention --shape 2x4x8,6x2x8,6x2x8 --attr causal=false", "transformer.attention(f32[2,4,8], f32[6,2,8], "),
        ("attention --shape 1x4x8,1x64x2x8,1x64x2x8,1,1", "transformer.attention(f32[1,4,8], f32[1,64,2,8], "),
    ],
)
def test_any_op_is_asked_about_by_the_shapes_of_its_operands(
    line: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main(["why", *line.split(), "--target", "reference", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["data"]["problems"]
    assert told["problem"].startswith(problem)
    assert told["candidates"][0]["verdict"] == "chosen"


def test_every_op_has_an_example_that_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    for name, op in load_registry(entry_points=[], extra_plugins=[builtin]).ops.items():
        line = shape_example(op).removeprefix("for example ").split()
        assert app.main(["why", *line, "--target", "reference"]) == 0, name
    assert "chosen: reference" in capsys.readouterr().out


# tune


def test_tune_goes_on_where_it_stopped() -> None:
    first, second = (run(tune_verb.tune, "matmul", **SIZES)["problems"][0] for _ in range(2))
    assert (second["trials"], second["known"]) == (0, 4)
    assert first["best"] == second["best"]


def test_tune_shows_failures(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(config: object) -> Kernel:
        raise OSError("no compiler")

    data = run(tune_verb.tune, "matmul", **SIZES, using=fake_target.registry(variant("broken", broken)))
    (report,) = data["problems"]
    assert report["best"] is None
    assert report["failed"] == [
        {"variant": "broken", "config": {}, "status": "error", "message": "OSError: no compiler"}
    ]
    assert "broken {}: OSError: no compiler" in capsys.readouterr().err


def test_an_interrupted_tune_keeps_its_trials() -> None:
    turns = iter(range(100))

    def interrupt_later() -> None:
        if next(turns) == 6:
            raise KeyboardInterrupt

    space = ConfigSpace((("tile", tuple(range(9))),))
    using = fake_target.registry(variant("v", lambda c: Kernel(on_measure=interrupt_later), space=space))
    out = output_of(using)
    message = r"interrupted: \d trials of 1 problems are kept in .*autotune\.jsonl"
    with output.use(out), pytest.raises(PartialResult, match=message) as raised:
        tune_verb.tune("matmul", **SIZES)
    assert raised.value.exit_code == 15
    assert out.data["problems"][0]["trials"] == len(RecordStore.default().records) > 0


def test_an_interruption_before_the_first_trial_leaves_nothing() -> None:
    def interrupt(config: object) -> Kernel:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tune_verb.tune, "matmul", **SIZES, using=fake_target.registry(variant("v", interrupt)))
    assert RecordStore.default().records == []


# records


def test_records_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    run(tune_verb.tune, "matmul", **SIZES)
    listed = run(records_verbs.list_records)["records"]
    assert [r["number"] for r in listed] == list(range(1, len(listed) + 1))
    assert {r["variant"] for r in run(records_verbs.list_records, op="matmul", variant="plain")["records"]} == {"plain"}
    assert run(records_verbs.list_records, op="softmax")["records"] == []
    assert run(records_verbs.list_records, device="elsewhere")["records"] == []
    shown = run(records_verbs.show, 1)
    assert shown["fingerprint"] == "fake-0"
    assert "fingerprint      fake-0" in capsys.readouterr().out
    with pytest.raises(UsageError, match="there is no record 99"):
        run(records_verbs.show, 99)


def test_records_travel_to_another_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tune_verb.tune, "matmul", **SIZES)
    count = len(RecordStore.default().records)
    file = tmp_path / "out" / "records.jsonl"
    assert run(records_verbs.export, file)["exported"] == count
    assert run(records_verbs.import_records, file) == {"imported": 0, "known": count}
    monkeypatch.setenv("KERNELFORGE_HOME", str(tmp_path / "elsewhere"))
    assert run(records_verbs.import_records, file) == {"imported": count, "known": 0}
    assert run(why_verb.why, "matmul", **SIZES)["problems"][0]["config_source"] == "record"


def test_records_are_exported_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    run(tune_verb.tune, "matmul", **SIZES)
    capsys.readouterr()
    run(records_verbs.export, Path("-"), variant="plain")
    lines = capsys.readouterr().out.splitlines()
    assert {json.loads(line)["variant"] for line in lines} == {"plain"}


def test_pruning_needs_a_condition_and_all_must_hold() -> None:
    run(tune_verb.tune, "matmul", **SIZES)
    count = len(RecordStore.default().records)
    with pytest.raises(UsageError, match="say what to drop"):
        run(records_verbs.prune)
    assert run(records_verbs.prune, device="elsewhere")["dropped"] == 0
    assert run(records_verbs.prune, device="fake-0", older_than=1.0)["dropped"] == 0
    assert run(records_verbs.prune, failed=True)["dropped"] == 0
    assert run(records_verbs.prune, stale=True)["dropped"] == 0
    assert run(records_verbs.prune, device="fake device", dry_run=True)["dropped"] == count
    assert len(RecordStore.default().records) == count
    assert run(records_verbs.prune, device="fake device")["dropped"] == count
    assert RecordStore.default().records == []


def test_pruning_what_is_stale_or_unreadable() -> None:
    run(tune_verb.tune, "matmul", **SIZES)
    newer = fake_target.registry(variant("plain", version="2"))
    dropped = run(records_verbs.prune, stale=True, using=newer)["dropped"]
    left = {r.variant for r in RecordStore.default().records}
    assert dropped > 0
    # Kernels that are not here may be another machine's.
    assert left == {"tiled"}
    path = RecordStore.default().path
    path.write_text(path.read_text() + "torn\n")
    with pytest.warns(KernelForgeWarning, match="torn"):
        assert RecordStore.default().records
    assert run(records_verbs.prune, unreadable=True) == {"dropped": 0, "unreadable": 1, "dry_run": False}
    assert {r.variant for r in RecordStore.default().records} == {"tiled"}


# emit-mlir


def emitted(**options: Any) -> str:
    return str(
        run(
            emit_mlir,
            target="reference",
            using=load_registry(entry_points=[], extra_plugins=[builtin]),
            **options,
        )["text"]
    )


def test_every_stage_is_printed_and_parses_back(capsys: pytest.CaptureFixture[str]) -> None:
    catalog = fake_target.registry()
    built, fused, selected = (emitted(stage=stage) for stage in (Stage.TRANSFORMER, Stage.FUSED, Stage.SELECTED))
    for text in (built, fused, selected, emitted(after="fuse-glu")):
        assert str(Module.parse(text, catalog)) == text
    assert built == str(Module.parse(decoder_block().module, catalog))
    assert "glu_matmul" in fused
    assert "glu_matmul" not in built
    assert built in capsys.readouterr().out


def test_another_pipeline_takes_the_place_of_the_default_one() -> None:
    bare, fused = (emitted(stage=Stage.FUSED, passes=passes) for passes in ("canonicalize", "canonicalize,fuse-glu"))
    assert "glu_matmul" in fused
    assert "glu_matmul" not in bare
    with pytest.raises(UsageError, match="unknown pass 'fuse-glue'"):
        emitted(passes="fuse-glue")


def test_the_selected_stage_says_how_each_op_runs() -> None:
    text = emitted(stage=Stage.SELECTED)
    ops = [line for line in text.splitlines() if '"transformer.' in line]
    assert ops
    for line in ops:
        assert "kernelforge.kernel = " in line
    kernels = [line for line in ops if '= "transformer.matmul"(' in line]
    assert 'kernelforge.kernel = {config = {}, target = "reference", variant = "reference"}' in kernels[0]
    (apart,) = [line for line in ops if '"transformer.rope_attention"' in line]
    assert 'op = "transformer.attention"' in apart
    views = [line for line in ops if '"transformer.reshape"' in line]
    assert 'kernelforge.kernel = "view"' in views[0]


def test_constants_and_configs_are_told_apart() -> None:
    class Folding:
        def claims(self, source: str) -> bool:
            return True

        def load(self, source: str, *, device: object) -> ImportedModel:  # options that are not given need not be known
            g = Graph()
            x, w = g.input("x", ("tokens", 16), "f32"), g.constant("w", (8, 16), "f32")
            g.output(g.matmul(x, w.T), "y")
            return ImportedModel(source, (Program("main", g.text(), max_dims={"tokens": 4}),), ArraySource({}))

    class Plugin(fake_target.FakePlugin):
        @hookimpl
        def kernelforge_importers(self) -> list[ImporterSpec]:
            return [ImporterSpec("folding", Folding)]

    space = ConfigSpace((("order", ("m n", "n")), ("tile", (4, 8))))
    using = load_registry(entry_points=[], extra_plugins=[builtin, Plugin([variant("v", space=space)])])
    text = str(run(emit_mlir, model="any", stage=Stage.SELECTED, using=using)["text"])
    assert str(Module.parse(text, using)) == text
    assert 'config = {order = "m n", tile = 4 : i64}' in text
    assert run(emit_mlir, model="any", program="main", using=using)["program"] == "main"
    with pytest.raises(UsageError, match="unknown program 'decode'"):
        run(emit_mlir, model="any", program="decode", using=using)


def test_a_model_of_no_steps_is_told() -> None:
    class Empty:
        def claims(self, source: str) -> bool:
            return True

        def load(self, source: str, **options: object) -> ImportedModel:
            return ImportedModel(source, (), ArraySource({}))

    class Plugin(fake_target.FakePlugin):
        @hookimpl
        def kernelforge_importers(self) -> list[ImporterSpec]:
            return [ImporterSpec("empty", Empty)]

    using = load_registry(entry_points=[], extra_plugins=[builtin, Plugin([tiled()])])
    for verb, op in itertools.product((why_verb.why, tune_verb.tune), (None, "matmul")):
        with pytest.raises(UsageError, match=r"no step of the model 'any' needs a kernel on target 'fake'$"):
            run(verb, op, model="any", using=using)
    with pytest.raises(UsageError, match="the model 'any' has no programs"):
        run(emit_mlir, model="any", using=using)


def test_the_number_of_tokens_can_be_fixed() -> None:
    using = load_registry(entry_points=[], extra_plugins=[builtin])
    with pytest.raises(UsageError, match="the reference target has no LLVM IR"):
        run(emit_mlir, target="reference", stage=Stage.LLVM, tokens=4, using=using)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"after": "fuse-all"}, "the pipeline has no pass 'fuse-all'"),
        ({"after": "cse", "stage": Stage.FUSED}, "--after and --stage exclude each other"),
        ({"model": "m", "block": True}, "--model and --block exclude each other"),
        ({"program": "decode"}, "--program needs --model"),
        ({"activations": "q8"}, "--activations needs --model"),
        ({"kv_dtype": "q8"}, "--kv-dtype needs --model"),
        ({"context": 8}, "--context needs --model"),
    ],
)
def test_stages_that_do_not_exist(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        emitted(**options)
