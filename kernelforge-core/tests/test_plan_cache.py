"""Plans on disk: the same plan comes back, anything that decides it makes another key, damage is said and mended."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kernelforge import plan_cache
from kernelforge.errors import KernelForgeWarning
from kernelforge.graph import Graph
from kernelforge.hookspecs import hookimpl
from kernelforge.plan_cache import plan_from_json, plan_to_json
from kernelforge.plugins import core_registry, load_registry
from kernelforge.provenance import Provenance
from kernelforge.selection import NO_RECORDS, NoRecords
from kernelforge.session import Session
from kernelforge.variant import KernelVariant


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KERNELFORGE_HOME", str(tmp_path))
    return tmp_path / "cache" / "plans"


def module() -> str:
    g = Graph("main")
    x = g.input("x", ("tokens", 8), "f32")
    q, k = (g.constant(name, (4, 8), "bf16") for name in ("q", "k"))
    cache = g.input("cache", (1, 16, 2, 2), "f32", donated=True)
    positions, slots = (g.input(name, ("tokens",), "i32") for name in ("positions", "slots"))
    keys = g.matmul(x, k, transpose_rhs=True).reshape(-1, 2, 2)
    g.output(g.kv_cache_update(cache, keys, positions, slots), "cache_out")
    g.output(g.matmul(x, q, transpose_rhs=True), "y")
    return g.text()


def session(**options: object) -> Session:
    return Session("reference", registry=core_registry(), records=NO_RECORDS, **options)  # type: ignore[arg-type]


def test_a_plan_round_trips_through_json() -> None:
    plan = session().plan(module(), max_dims={"tokens": 4})
    assert any(v.constant is not None for v in plan.values)
    assert plan_from_json(plan_to_json(plan)) == plan


def test_a_second_session_reuses_the_plan_without_lowering(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = session().plan(module())
    assert len(list(state.glob("*.json"))) == 1

    def refuse(*_: object) -> None:
        raise AssertionError("lowered again")

    monkeypatch.setattr(Session, "lower", refuse)
    again = session().plan(module())
    assert again == plan
    with pytest.raises(AssertionError, match="lowered again"):
        session().plan(module(), dims={"tokens": 1})
    with pytest.raises(AssertionError, match="lowered again"):
        session(pipeline="cse").plan(module())
    with pytest.raises(AssertionError, match="lowered again"):
        session(variants={"transformer.matmul": "reference"}).plan(module())


def test_changed_code_and_changed_records_make_another_key(monkeypatch: pytest.MonkeyPatch, state: Path) -> None:
    session().plan(module())
    monkeypatch.setattr(plan_cache, "_stamp", lambda packages: f"other code of {packages}")
    session().plan(module())
    assert len(list(state.glob("*.json"))) == 2
    monkeypatch.setattr(NoRecords, "stamp", lambda self: "other records")
    session().plan(module())
    assert len(list(state.glob("*.json"))) == 3


def test_a_plugin_given_as_an_object_is_never_cached(state: Path) -> None:
    class Mine:
        """Brings a kernel whose code may change without a trace."""

        @hookimpl
        def kernelforge_kernels(self) -> list[KernelVariant]:
            return [KernelVariant("mine", "transformer.silu", "reference", "nowhere:build")]

    registry = load_registry(allow=["core"], extra_plugins=[Mine()])
    Session("reference", registry=registry, records=NO_RECORDS).plan(module())
    assert not list(state.glob("*.json"))


@pytest.mark.parametrize("broken", ["supports", "layouts"])
def test_a_plan_made_without_a_plugin_that_failed_is_not_kept(state: Path, broken: str) -> None:
    wrong: dict[str, str] = {broken: "nowhere:function"}
    bad = KernelVariant("bad", "transformer.matmul", "reference", "nowhere:build", **wrong)  # type: ignore[arg-type]

    class Theirs:
        """As an installed plugin: its descriptors have the provenance of a distribution."""

        @hookimpl
        def kernelforge_kernels(self) -> list[KernelVariant]:
            return [bad]

    registry = load_registry(allow=["core"], extra_plugins=[Theirs()])
    hooks = {**registry.hooks, "kernelforge_kernels": (replace(bad, provenance=Provenance("theirs", "theirs", "1")),)}
    installed = replace(registry, hooks=hooks)
    for _ in range(2):
        with pytest.warns(KernelForgeWarning, match=r"variant 'reference/transformer.matmul/bad'.* of plugin theirs"):
            Session("reference", registry=installed, records=NO_RECORDS).plan(module())
    assert not list(state.glob("*.json"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t[: len(t) // 2],
        lambda t: t.replace('"format":3', '"format":99'),
        lambda t: t.replace('"default"]', '"hearsay"]'),
        lambda t: t.replace('"arena"', '"moon"', 1).replace('"output"', '"moon"', 1),
        lambda t: t.replace("transformer.matmul(", "transformer matmul("),
        lambda t: t.replace('"inputs":[0', '"inputs":[999'),
        lambda t: "[]",
    ],
)
def test_a_damaged_file_is_said_and_replaced(damage: object, state: Path) -> None:
    plan = session().plan(module())
    (file,) = state.glob("*.json")
    whole = file.read_text()
    broken = damage(whole)  # type: ignore[operator]
    assert broken != whole
    file.write_text(broken)
    with pytest.warns(KernelForgeWarning, match="is damaged"):
        again = session().plan(module())
    assert again == plan
    assert file.read_text() == whole


def test_a_cached_plan_computes_the_same(state: Path) -> None:
    rng = np.random.default_rng(0)
    import ml_dtypes

    weights = {n: rng.standard_normal((4, 8)).astype(ml_dtypes.bfloat16) for n in ("q", "k")}
    inputs = {
        "x": rng.standard_normal((3, 8)).astype(np.float32),
        "cache": np.zeros((1, 16, 2, 2), np.float32),
        "positions": np.arange(3, dtype=np.int32),
        "slots": np.zeros(3, np.int32),
    }
    first = session().compile(module(), constants=weights).run(inputs)
    second = session().compile(module(), constants=weights).run(inputs)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package's file of kernels, older than this process."""
    folder = tmp_path / "site" / "acme_stamped"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "kernels.py").write_text("SIZE = 1\n")
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.setattr(plan_cache, "STARTED", time.time() + 60)
    return folder / "kernels.py"


def stamp(*packages: str) -> str | None:
    return plan_cache._fresh_stamp(packages)


def test_the_stamp_is_of_packages_that_are_not_imported_yet(package: Path) -> None:
    first = stamp("acme_stamped")
    assert first == stamp("acme_stamped")
    package.write_text("SIZE = 2\n")
    assert first != stamp("acme_stamped")
    assert len({first, stamp("acme_stamped", "kernelforge"), stamp("acme_missing"), stamp("kernelforge")}) == 4


def test_code_that_changed_after_the_process_began_has_no_stamp(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process may run what the file held before: that must not be kept as what it holds now."""
    monkeypatch.setattr(plan_cache, "STARTED", time.time() - 60)
    assert stamp("acme_stamped") is None
    if sys.platform != "win32":
        os.utime(package, (1, 1))
        assert stamp("acme_stamped") is None


def test_what_code_made_that_changed_meanwhile_is_not_kept(
    package: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_cache, "_stamps", {})
    assert plan_cache._stamp(("acme_stamped",))
    plan_cache.keep_text("a", "text", "made by what is stamped")
    package.write_text("SIZE = 2\n")
    plan_cache.keep_text("b", "text", "made by nobody knows what")
    assert [file.name for file in state.iterdir()] == ["a.text"]
