"""The object cache: hits, keys, damage, folders that cannot be written, eviction, and a warm start without MLIR."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kernelforge.errors import KernelForgeWarning, UsageError
from kernelforge_cpu import objects
from kernelforge_cpu.emit import KernelBuilder
from kernelforge_cpu.isa import host_target
from kernelforge_cpu.jit import KERNEL, Library


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KERNELFORGE_HOME", str(tmp_path))
    monkeypatch.delenv("KERNELFORGE_CACHE_MAX_MB", raising=False)
    monkeypatch.setattr(objects, "STATS", objects.Stats())
    return tmp_path / "cache" / "objects"


def text(value: int, name: str = "store") -> str:
    k = KernelBuilder(name, host_target())
    k.buffer(0, "i64").store(value)
    return k.text()


def result(library: Library, name: str = "store") -> int:
    out = np.zeros(1, np.int64)
    buffers = (ctypes.c_void_p * 1)(out.ctypes.data)
    KERNEL(library.address(name))(ctypes.addressof(buffers), None, 0, 1)
    return int(out[0])


def test_a_second_load_compiles_nothing(empty_cache: Path) -> None:
    texts = [text(5, "five"), text(6, "six")]
    for _ in range(2):
        library = objects.load_objects(texts)
        assert (result(library, "five"), result(library, "six")) == (5, 6)
    assert (objects.STATS.compiled, objects.STATS.hits) == (2, 2)
    assert objects.STATS.compile_s > 0
    assert len(list(empty_cache.glob("*.o"))) == 2


def test_the_key_tells_apart_what_must_be() -> None:
    host = host_target()
    keys = {
        objects.key(text(1), host),
        objects.key(text(2), host),
        *(
            objects.key(text(1), changed)
            for changed in (replace(host, triple="x"), replace(host, cpu="x"), replace(host, features="x"))
        ),
        objects.key(text(1), replace(host, lanes=2)),
    }
    assert len(keys) == 6
    assert [name.split()[0] for name in objects.toolchain()] == ["torch-mlir", "llvmlite"]
    assert all(len(name.split()) == 2 for name in objects.toolchain())


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_a_damaged_object_is_named_and_rebuilt(empty_cache: Path, damage: str) -> None:
    objects.load_objects([text(7)])
    (file,) = empty_cache.glob("*.o")
    good = file.read_bytes()
    middle = len(good) // 2
    bad = {
        "truncated": good[:middle],
        "flipped": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
        "empty": b"",
        "foreign": b"\x7fELF" + good,
    }
    file.write_bytes(bad[damage])
    with pytest.warns(
        KernelForgeWarning, match=f"the cached object .*{file.name} is damaged: its kernel is compiled anew"
    ) as told:
        assert result(objects.load_objects([text(7)])) == 7
    assert len(told) == 1
    assert file.read_bytes() == good
    assert objects.STATS.rebuilt == 1


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for value in (1, 2, 1):
            assert result(objects.load_objects([text(value)])) == value
    (only,) = told
    assert only.category is KernelForgeWarning
    assert str(only.message).endswith("compiled kernels are not kept")
    assert objects.STATS.compiled == 3


def test_the_least_recently_used_objects_go_first(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[Path] = []
    for i in range(6):
        objects.load_objects([text(i)])
        (new,) = set(empty_cache.glob("*.o")) - set(files)
        files.append(new)
        os.utime(new, (1000 + i, 1000 + i))
    objects.load_objects([text(0)])  # the oldest is used again
    size = sum(f.stat().st_size for f in files)
    assert objects.evict(size) == 0
    assert objects.evict(size - 1) == 1
    assert [f.exists() for f in files] == [True, False, True, True, True, True]
    monkeypatch.setenv("KERNELFORGE_CACHE_MAX_MB", "0")
    objects.load_objects([text(99)])
    assert not list(empty_cache.glob("*.o"))
    assert objects.STATS.evicted == 7
    monkeypatch.setenv("KERNELFORGE_CACHE_MAX_MB", "lots")
    with pytest.raises(UsageError, match="KERNELFORGE_CACHE_MAX_MB is 'lots'"):
        objects.load_objects([text(100)])


def test_a_text_that_does_not_compile_leaves_nothing(empty_cache: Path) -> None:
    with pytest.raises(UsageError, match="MLIR does not accept the module"):
        objects.load_objects(["func.func @f("])
    assert not empty_cache.exists()


def test_a_warm_start_does_not_import_mlir() -> None:
    script = f"""
import sys
from kernelforge_cpu.objects import STATS, load_objects
load_objects([{text(3)!r}]).address("store")
from kernelforge_cpu.driver import driver
driver()
print(STATS.compiled, STATS.hits, any(name.startswith("torch_mlir") for name in sys.modules))
"""
    outputs = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
        outputs.append(done.stdout)
    assert outputs == ["2 0 True\n", "0 2 False\n"]


def test_no_warning_when_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objects.load_objects([text(11)])
        objects.load_objects([text(11)])


def refuse() -> list[str]:
    raise AssertionError("written again")


def test_objects_that_are_known_are_loaded_without_their_texts(empty_cache: Path) -> None:
    for texts in (lambda: [text(5, "five"), text(6, "six")], refuse):
        library = objects.load_objects(texts, name="both")
        assert (result(library, "five"), result(library, "six")) == (5, 6)
    assert (objects.STATS.compiled, objects.STATS.hits) == (2, 2)
    with pytest.raises(AssertionError, match="written again"):
        objects.load_objects(refuse, name="others")
    with pytest.raises(AssertionError, match="written again"):
        objects.load_objects(refuse, replace(host_target(), features="x"), name="both")


@pytest.mark.parametrize("kind", ["plans/*.objects", "objects/*.o"])
@pytest.mark.parametrize("damage", ["gone", "empty", "foreign"])
@pytest.mark.filterwarnings("ignore:the cached object .* is damaged")
def test_texts_are_written_again_where_a_file_is_not_what_it_was(empty_cache: Path, kind: str, damage: str) -> None:
    objects.load_objects(lambda: [text(7)], name="one")
    (file,) = empty_cache.parent.glob(kind)
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(b"" if damage == "empty" else b"../../else")
    with pytest.raises(AssertionError, match="written again"):
        objects.load_objects(refuse, name="one")
    for texts in (lambda: [text(7)], refuse):
        assert result(objects.load_objects(texts, name="one")) == 7
