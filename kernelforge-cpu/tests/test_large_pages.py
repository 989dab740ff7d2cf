"""Constants on large pages: equal copies, apart from each other."""

from __future__ import annotations

import errno
import itertools
import mmap

import numpy as np
import pytest

from kernelforge_cpu.store import ALIGNMENT, LargePages, address

needs_madvise = pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no large pages to ask for"
)


@needs_madvise
def test_copies_are_equal_and_apart() -> None:
    """More than a chunk of them, of odd sizes and two types."""
    rng = np.random.default_rng(0)
    given = [rng.integers(0, 255, (3, 99_991 + 7 * i), np.uint8) for i in range(40)]
    given += [rng.standard_normal((17, 4099), np.float32) for _ in range(40)]
    assert sum(a.nbytes for a in given) > LargePages.CHUNK
    pages = LargePages()
    held = [pages.hold(a) for a in given]
    for before, after in zip(given, held, strict=True):
        assert np.array_equal(before, after)
        assert before.dtype == after.dtype
        assert not np.shares_memory(before, after)
        assert after.flags.c_contiguous
        assert address(after) % ALIGNMENT == 0
    spans = sorted((address(a), address(a) + a.nbytes) for a in held)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


@needs_madvise
def test_memory_outlives_the_pool() -> None:
    given = np.arange(1 << 14, dtype=np.float32)
    held = LargePages().hold(given)
    assert np.array_equal(held, given)


@pytest.mark.parametrize("nbytes", [0, 64, LargePages.SMALL - 1, LargePages.LARGE])
def test_what_would_gain_nothing_stays_where_it_is(nbytes: int) -> None:
    given = np.zeros(nbytes, np.uint8)
    assert LargePages().hold(given) is given


def test_without_large_pages_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    given = np.zeros(1 << 20, np.uint8)
    assert LargePages().hold(given) is given


@needs_madvise
def test_a_kernel_without_large_pages_gives_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    given = np.arange(1 << 14, dtype=np.float32)
    assert np.array_equal(LargePages().hold(given), given)
