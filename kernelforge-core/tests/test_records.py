from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from kernelforge import home
from kernelforge.errors import AssetError, KernelForgeWarning
from kernelforge.problem import Problem, parse_problem
from kernelforge.provenance import Provenance
from kernelforge.tune import record as record_module
from kernelforge.tune.record import Record, RecordError, kernel_hash, parse_record
from kernelforge.tune.records import NEAREST_LIMIT, RecordStore, distance
from kernelforge.variant import DeviceInfo, KernelVariant

DEVICE = DeviceInfo("toy", "toy device", "toy-0", threads=2)
VARIANT = KernelVariant("fast", "toy.dot", "toy", build="kernelforge.reference:variant", version="3")


def problem(m: int | str = 64, n: int = 64, k: int = 128, dtype: str = "f32", attrs: str = "{a=1}") -> Problem:
    return parse_problem(f"toy.dot(f32[{m},{k}], {dtype}[{k},{n}]@const) -> (f32[{m},{n}]) {attrs}")


def record(of: Problem | None = None, median_s: float = 1e-3, **changes: Any) -> Record:
    made = Record(
        problem=str(of or problem()),
        op="toy.dot",
        target="toy",
        variant="fast",
        config={"tile": 8},
        device=DEVICE.name,
        fingerprint=DEVICE.fingerprint,
        threads=2,
        plugin="core",
        distribution="kernelforge-core",
        variant_version="3",
        kernel_hash=kernel_hash(VARIANT),
        status="ok",
        samples_s=(median_s,) * 3,
        median_s=median_s,
        error=1e-7,
        timing_source="host-clock",
        versions={"python": "3.11.7"},
        unix_time=1.8e9,
    )
    return replace(made, **changes)


@pytest.fixture
def store(tmp_path: Path) -> RecordStore:
    return RecordStore(tmp_path / "deep" / "records.jsonl")


# lines


def test_a_record_is_one_line_of_json_that_reads_back() -> None:
    made = record(message="a\nb", config={"tile": 8, "order": "mn"})
    assert "\n" not in made.line()
    assert parse_record(made.line()) == made
    assert json.loads(made.line())["schema"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "of schema 2, this version reads 1"),
        ({"schema": "1"}, "not a tuning record"),
        ({"problem": None}, "field 'problem' must be of type str"),
        ({"threads": True}, "field 'threads' must be of type int"),
        ({"config": []}, "field 'config' must be of type Config"),
        ({"config": {"tile": [1]}}, "field 'config' must hold numbers and strings"),
        ({"samples_s": ["1"]}, "field 'samples_s' must hold finite numbers"),
        ({"status": "error", "samples_s": [math.inf]}, "field 'samples_s' must hold finite numbers"),
        ({"error": math.inf}, "field 'error' must be a finite number"),
        ({"status": "error", "samples_s": [10**400]}, "field 'samples_s' must hold finite numbers"),
        ({"median_s": 10**400}, "field 'median_s' must be a finite number"),
        ({"versions": {"python": math.nan}}, "field 'versions' must hold strings"),
        ({"samples_s": []}, "a successful trial needs positive, finite times"),
        ({"median_s": 0.0}, "a successful trial needs positive, finite times"),
        ({"median_s": math.nan}, "field 'median_s' must be a finite number"),
        ({"status": "fine"}, "status 'fine' is not one of ok, wrong-result, error"),
    ],
)
def test_lines_that_are_no_record(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        parse_record(json.dumps(asdict(record()) | change))


def test_lines_that_are_torn_or_foreign() -> None:
    with pytest.raises(RecordError, match=r"not JSON \(torn\?\)"):
        parse_record(record().line()[:-5])
    with pytest.raises(RecordError, match="not a tuning record"):
        parse_record("[1, 2]")
    with pytest.raises(RecordError, match="not JSON"):
        parse_record("[" * 100_000)
    data = asdict(record())
    del data["variant"]
    with pytest.raises(RecordError, match="field 'variant' is missing"):
        parse_record(json.dumps(data))


def test_the_kernel_hash_follows_source_version_and_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, source in (("kernel_one", "def build(): pass"), ("kernel_two", "def build(): return 1")):
        (tmp_path / f"{name}.py").write_text(source)
    one = replace(VARIANT, build="kernel_one:build")
    hashes = {
        kernel_hash(v)
        for v in (
            one,
            replace(VARIANT, build="kernel_two:build"),
            replace(one, version="4"),
            replace(one, provenance=Provenance("p", "d", "2.0")),
            replace(VARIANT, build="no_such_module:build"),
        )
    }
    assert len(hashes) == 5
    assert kernel_hash(one) == kernel_hash(replace(one, priority=5))
    assert "kernel_one" not in sys.modules


def test_the_kernel_hash_covers_what_kernels_of_a_package_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hashed(emitter: str, large: bytes = b"") -> str:
        """Of a kernel in a package with this emitter, as a fresh process sees it."""
        for file, text in (("__init__.py", ""), ("emitter.py", emitter), ("kernels/matmul.py", "def build(): ...")):
            (tmp_path / "shared_one" / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "shared_one" / file).write_text(text)
        (tmp_path / "shared_one" / "table.bin").write_bytes(large)
        (tmp_path / "shared_one" / "__pycache__").mkdir(exist_ok=True)
        (tmp_path / "shared_one" / "__pycache__" / "emitter.pyc").write_text(f"of {emitter}")
        record_module._source_digest.cache_clear()
        record_module._files_digest.cache_clear()
        return kernel_hash(replace(VARIANT, build="shared_one.kernels.matmul:build"))

    monkeypatch.syspath_prepend(str(tmp_path))
    first = hashed("WIDTH = 8")
    assert first == hashed("WIDTH = 8")
    assert first != hashed("WIDTH = 4")
    assert hashed("", bytes(2 << 20)) != hashed("", bytes(3 << 20))
    assert not any(name.startswith("shared_one") for name in sys.modules)


def test_a_namespace_is_not_hashed_but_the_package_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("mine", "other"):
        (tmp_path / "spread_one" / package).mkdir(parents=True)
        (tmp_path / "spread_one" / package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = replace(VARIANT, build="spread_one.mine.kernels:build")
    before = kernel_hash(mine)
    for package, differs in (("other", False), ("mine", True)):
        (tmp_path / "spread_one" / package / "emitter.py").write_text("changed")
        record_module._source_digest.cache_clear()
        record_module._files_digest.cache_clear()
        assert (kernel_hash(mine) != before) == differs


# the file


def test_a_missing_file_is_empty(store: RecordStore) -> None:
    assert store.records == []
    assert not store.path.exists()
    assert RecordStore.default().path == home.records_path()


def test_appended_records_are_there_at_once_and_for_the_next_reader(store: RecordStore) -> None:
    store.append(record())
    store.append(record(median_s=2e-3))
    assert [r.median_s for r in store.records] == [1e-3, 2e-3]
    assert RecordStore(store.path).records == store.records


def test_the_file_is_read_once(store: RecordStore) -> None:
    store.append(record())
    store.path.write_text("")
    assert len(store.records) == 1
    assert store.matches(problem(), VARIANT, DEVICE)


def test_unreadable_lines_are_skipped_and_named_once(store: RecordStore) -> None:
    store.append(record())
    with store.path.open("ab") as file:
        file.write(b'{"schema": 9}\n\n\xff\xfe not text\n' + record().line().encode()[:40])
    fresh = RecordStore(store.path)
    with pytest.warns(KernelForgeWarning) as caught:
        assert len(fresh.records) == 1
    assert len(fresh.records) == 1
    (warning,) = caught
    text = str(warning.message)
    assert text.startswith("skipped 3 lines that are no tuning record: ")
    assert f"{store.path}:2: of schema 9" in text
    assert f"{store.path}:4: not JSON" in text
    assert f"{store.path}:5: not JSON" in text


def test_a_torn_last_line_does_not_swallow_the_next_record(store: RecordStore) -> None:
    store.append(record())
    with store.path.open("a") as file:
        file.write('{"schema":1,"prob')
    with pytest.warns(KernelForgeWarning, match=":2: not JSON"):
        RecordStore(store.path).append(record(median_s=2e-3))
    with pytest.warns(KernelForgeWarning, match="skipped 1 line that is no tuning record"):
        assert [r.median_s for r in RecordStore(store.path).records] == [1e-3, 2e-3]


def test_many_unreadable_lines_are_counted(store: RecordStore) -> None:
    store.path.parent.mkdir()
    store.path.write_text("x\n" * 9)
    with pytest.warns(KernelForgeWarning, match="skipped 9 lines .*; and 4 more"):
        assert store.records == []


def test_threads_and_processes_do_not_tear_each_others_lines(store: RecordStore) -> None:
    def write(of: RecordStore) -> None:
        for i in range(50):
            of.append(record(message="x" * 3000, config={"tile": i}))

    stores = [RecordStore(store.path) for _ in range(4)]
    threads = [threading.Thread(target=write, args=(s,)) for s in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(RecordStore(store.path).records) == 200


def test_a_file_that_cannot_be_read_or_written(store: RecordStore) -> None:
    store.path.mkdir(parents=True)
    with pytest.warns(KernelForgeWarning, match="cannot read the records file .*; going on without records"):
        assert store.records == []
    with pytest.raises(AssetError, match="cannot write the records file") as raised:
        store.append(record())
    assert "KERNELFORGE_HOME" in str(raised.value.hint)


def test_a_file_in_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = RecordStore(tmp_path / "file" / "autotune.jsonl")
    assert store.prune(lambda record: True) == ([], 0), "there is nothing to write"


def test_records_that_cannot_be_dropped(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store.append(record())
    monkeypatch.setattr(home, "write_atomic", full)
    with pytest.raises(AssetError, match=r"cannot write the records file .*: No space left on device"):
        store.prune(lambda record: True)


def test_merging_adds_what_is_new(store: RecordStore, tmp_path: Path) -> None:
    other = RecordStore(tmp_path / "other.jsonl")
    other.append(record())
    other.append(record(median_s=2e-3, fingerprint="other machine"))
    store.append(record())
    assert store.merge(other.path) == (1, 1)
    assert store.merge(other.path) == (0, 2)
    assert len(RecordStore(store.path).records) == 2


def test_merging_what_is_no_records_file(store: RecordStore, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"cannot read the records file .*gone\.jsonl"):
        store.merge(tmp_path / "gone.jsonl")
    (tmp_path / "readme.md").write_text("# Hello\n")
    with pytest.raises(AssetError, match=r"readme\.md is not a records file: line 1 is not JSON"):
        store.merge(tmp_path / "readme.md")


def test_pruning_replaces_the_file_and_keeps_foreign_lines(store: RecordStore) -> None:
    for median in (1e-3, 2e-3, 3e-3):
        store.append(record(median_s=median))
    with store.path.open("a") as file:
        file.write('{"schema": 9, "from": "the future"}\n')

    def slow(r: Record) -> bool:
        return r.median_s > 1.5e-3

    before = store.path.read_text()
    assert len(store.prune(slow, dry_run=True)[0]) == 2
    assert store.path.read_text() == before
    assert len(store.prune(slow)[0]) == 2
    assert store.path.read_text() == before.splitlines(keepends=True)[0] + before.splitlines(keepends=True)[3]
    with pytest.warns(KernelForgeWarning, match="schema 9"):
        assert [r.median_s for r in store.records] == [1e-3]
    assert store.prune(slow, unreadable=True) == ([], 1)
    assert len(RecordStore(store.path).records) == 1
    assert list(store.path.parent.iterdir()) == [store.path]


# answers for selection


def test_exact_records_come_first_by_median(store: RecordStore) -> None:
    store.append(record(median_s=3e-3, config={"tile": 4}))
    store.append(record(median_s=1e-3, config={"tile": 8}))
    store.append(record(problem(65), median_s=1e-6, config={"tile": 16}))
    found = store.matches(problem(), VARIANT, DEVICE)
    assert [(m.config["tile"], m.exact, m.median_s) for m in found] == [
        (8, True, 1e-3),
        (4, True, 3e-3),
        (16, False, 1e-6),
    ]
    assert found[0].problem == str(problem())


def test_the_latest_measurement_of_a_config_counts(store: RecordStore) -> None:
    store.append(record(median_s=1e-3, unix_time=200.0))
    store.append(record(median_s=5e-3, unix_time=300.0))
    store.append(record(median_s=2e-3, unix_time=100.0))
    (match,) = store.matches(problem(), VARIANT, DEVICE)
    assert match.median_s == 5e-3
    assert store.current(problem(), VARIANT, DEVICE)['{"tile":8}'].median_s == 5e-3


@pytest.mark.parametrize(
    "change",
    [
        {"variant_version": "2"},
        {"kernel_hash": "0"},
        {"fingerprint": "toy-1"},
        {"threads": 4},
        {"variant": "other"},
        {"target": "cpu"},
        {"op": "toy.other"},
        {"status": "wrong-result"},
        {"problem": "not a problem"},
        {"problem": str(problem("tokens"))},
    ],
)
def test_records_of_something_else_do_not_match(store: RecordStore, change: dict[str, Any]) -> None:
    store.append(record(**change))
    assert store.matches(problem(), VARIANT, DEVICE) == []


def test_failures_are_known_but_never_match(store: RecordStore) -> None:
    store.append(record(status="error", message="no"))
    assert store.matches(problem(), VARIANT, DEVICE) == []
    assert store.current(problem(), VARIANT, DEVICE)['{"tile":8}'].status == "error"


def test_the_nearest_shape_comes_first(store: RecordStore) -> None:
    for m in (16, 128, 512):
        store.append(record(problem(m), config={"tile": m}))
    found = store.matches(problem(100), VARIANT, DEVICE)
    assert [m.config["tile"] for m in found] == [128, 512, 16]
    assert not any(m.exact for m in found)


def test_distance_counts_each_dimension_once_and_is_bounded() -> None:
    here = problem()
    assert distance(here, here) == 0.0
    assert distance(here, problem(m=128)) == 1.0
    assert distance(here, problem(m=128, n=32)) == 2.0
    assert distance(here, problem(k=1024)) == 3.0 == NEAREST_LIMIT
    assert distance(problem(m=0), problem(m=1)) == 0.0


@pytest.mark.parametrize(
    "other",
    [
        problem(dtype="bf16"),
        problem(attrs="{a=2}"),
        parse_problem("toy.dot(f32[64,128], f32[128,64]) -> (f32[64,64]) {a=1}"),
        parse_problem("toy.dot(f32[64,128], f32[128,64]@const, f32[64]) -> (f32[64,64]) {a=1}"),
        parse_problem("toy.dot(f32[64,128], _) -> (f32[64,64]) {a=1}"),
        parse_problem("toy.dot(f32[64,128]:[256,1], f32[128,64]@const) -> (f32[64,64]) {a=1}"),
        parse_problem("toy.dot(f32[1,64,128], f32[128,64]@const) -> (f32[64,64]) {a=1}"),
        parse_problem("toy.sum(f32[64,128], f32[128,64]@const) -> (f32[64,64]) {a=1}"),
    ],
    ids=str,
)
def test_problems_that_differ_in_more_than_sizes_are_never_near(other: Problem) -> None:
    assert distance(problem(), other) == math.inf


def test_shapes_that_are_too_far_lend_nothing(store: RecordStore) -> None:
    store.append(record(problem(m=64 * 9)))
    assert store.matches(problem(), VARIANT, DEVICE) == []


def test_a_dynamic_dimension_matches_every_size_and_prefers_the_larger(store: RecordStore) -> None:
    for m in (1, 256, 16):
        store.append(record(problem(m), config={"tile": m}))
    found = store.matches(problem("tokens").canonical(), VARIANT, DEVICE)
    assert [(m.config["tile"], m.exact) for m in found] == [(256, False), (16, False), (1, False)]


# cost


def test_reading_records_imports_nothing_heavy(store: RecordStore) -> None:
    store.append(record())
    code = (
        "import sys; from pathlib import Path; from kernelforge.tune.records import RecordStore\n"
        f"assert len(RecordStore(Path({str(store.path)!r})).records) == 1\n"
        "print([m for m in ('numpy', 'torch_mlir', 'typer', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
