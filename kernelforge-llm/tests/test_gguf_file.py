"""The GGUF container as untrusted input: what the reader says to files that are broken in every way."""

from __future__ import annotations

import itertools
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import add_tensor, finish, small_writer

from kernelforge.errors import AssetError
from kernelforge_llm.gguf import open_gguf
from kernelforge_llm.gguf.file import GgufFile


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A model without layers, with values of every type."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = small_writer(path)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab", "<end>"])
    writer.add_token_types([1, 1, 1, 3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(3)
    writer.add_array("numbers", [1.5, -2.0])
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"value.{kind}", 7)
    writer.add_float32("value.float32", 0.5)
    writer.add_float64("value.float64", 0.25)
    writer.add_bool("value.bool", True)
    rng = np.random.default_rng(0)
    for name, dtype in (("token_embd.weight", "q4"), ("blk.0.attn_q.weight", "q8"), ("output_norm.weight", "f32")):
        add_tensor(writer, name, rng.standard_normal((4, 32), np.float32), dtype)
    finish(writer)
    return path.read_bytes()


def opened(content: bytes, path: Path) -> GgufFile:
    path.write_bytes(content)
    return GgufFile.open(path)


def test_values_and_tensors(small: bytes, tmp_path: Path) -> None:
    file = opened(small, tmp_path / "m.gguf")
    values = {k.removeprefix("value."): v for k, v in file.metadata.items() if k.startswith("value.")}
    integers = dict.fromkeys(("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"), 7)
    assert values == {**integers, "float32": 0.5, "float64": 0.25, "bool": True}
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "b", "ab", "<end>"]
    assert file.metadata["numbers"].tolist() == [1.5, -2.0]
    assert [(e.type.name, e.shape, e.stop - e.start) for e in file.entries.values()] == [
        ("Q4_0", (4, 32), 72),
        ("Q8_0", (4, 32), 136),
        ("F32", (4, 32), 512),
    ]
    assert not file.data.flags.writeable


def header(tensors: int = 0, pairs: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, pairs)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def described(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def placed(*tensors: bytes, data: int) -> bytes:
    start = header(len(tensors)) + b"".join(tensors)
    return start + bytes(-len(start) % 32 + data)


HUGE = 1 << 62
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no GGUF file: it has 0 bytes"),
    "magic": (header(magic=b"GGML"), "begins with b'GGML'"),
    "no version": (b"GGUF\3", "is cut off: a number at byte 4"),
    "version": (header(version=1), "has version 1"),
    "big-endian": (header(version=3 << 24), "is a big-endian file"),
    "tensor count": (header(tensors=HUGE), f"claims to hold {HUGE} tensors"),
    "pair count": (header(pairs=HUGE), f"claims to hold {HUGE} metadata pairs"),
    "key length": (header(pairs=1) + struct.pack("<Q", HUGE) + bytes(99), "a metadata key at byte 24 has"),
    "key": (header(pairs=1) + pair(b"\xff", 0, b"\0" * 9), "a metadata key is not UTF-8"),
    "value type": (header(pairs=1) + pair("a", 99, bytes(9)), "'a' has a value of unknown type 99"),
    "value": (header(pairs=1) + pair("abcdefgh", 10, b"\0"), "is cut off: a number"),
    "string": (header(pairs=1) + pair("a", 8, struct.pack("<Q", HUGE)), "the value of 'a' at byte"),
    "array type": (header(pairs=1) + pair("a", 9, struct.pack("<IQ", 9, 1) + bytes(20)), "array of values of type 9"),
    "array count": (header(pairs=1) + pair("a", 9, struct.pack("<IQ", 4, HUGE)), "elements of 'a', in 0 bytes"),
    "strings count": (header(pairs=1) + pair("a", 9, struct.pack("<IQ", 8, HUGE)), "strings in 'a', in 0 bytes"),
    "strings": (header(pairs=1) + pair("a", 9, struct.pack("<IQQ", 8, 1, HUGE)), "is cut off in a string of 'a'"),
    "two keys": (header(pairs=2) + pair("a", 0, b"\0") * 2, "metadata key 'a' is there twice"),
    "long key": (header(pairs=1) + pair("a" * 60000, 99, bytes(9)), r"metadata key 'a{56}\.\.\. has a value"),
    "alignment": (header(pairs=1) + pair("general.alignment", 4, struct.pack("<I", 12)), "general.alignment is 12"),
    "no alignment": (header(pairs=1) + pair("general.alignment", 4, bytes(4)), "general.alignment is 0"),
    "alignment type": (header(pairs=1) + pair("general.alignment", 8, text("x")), "general.alignment is 'x'"),
    "name": (placed(described("n" * 65, (1,)), data=32), "a tensor's name at byte 24 has 65 bytes"),
    "two tensors": (placed(described("a", (1,)), described("a", (1,)), data=64), "tensor 'a' is there twice"),
    "rank": (placed(described("a", (1,) * 5), data=32), "has 5 dimensions"),
    "no rank": (placed(described("a", ()), data=32), "has 0 dimensions"),
    "type": (placed(described("a", (256,), 12), data=256), "is stored as Q4_K"),
    "unknown type": (placed(described("a", (1,), 77), data=32), "is stored as number 77"),
    "no elements": (placed(described("a", (0, 4)), data=32), r"of shape \[4, 0\] cannot be"),
    "many elements": (placed(described("a", (HUGE, HUGE)), data=32), "cannot be in a file of"),
    "row": (placed(described("a", (33,), 2), data=32), "rows of 33 elements, Q4_0 wants 32"),
    "end": (placed(described("a", (9,)), data=32), "is cut off: tensor 'a' ends at byte"),
    "offset": (placed(described("a", (8,), 0, 64), data=96), "tensor 'a' at byte 128 is not where it should be"),
    "overlap": (placed(described("a", (16,)), described("b", (8,), 0, 32), data=64), "'b' at byte 128 overlaps"),
    "rest": (placed(described("a", (8,)), data=64), "has 32 bytes after the last tensor"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_fault_has_its_message(name: str, tmp_path: Path) -> None:
    content, message = BROKEN[name]
    with pytest.raises(AssetError, match=message) as caught:
        opened(content, tmp_path / "broken.gguf")
    assert str(tmp_path / "broken.gguf") in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="cannot be read"):
        GgufFile.open(tmp_path / "absent.gguf")


def refused_or_read(content: bytes, path: Path) -> bool:
    """Whether the file is refused as it should be: by an AssetError, or one thing it says is wrong but allowed."""
    path.write_bytes(content)
    try:
        source = open_gguf(path)
        for name in source.tensors.names():
            source.tensors.tensor(name)
    except AssetError:
        return True
    return False


def test_every_truncation_is_refused(small: bytes, tmp_path: Path) -> None:
    lengths = [*range(0, len(small) - 512, 7), *range(len(small) - 600, len(small), 13)]
    accepted = [n for n in lengths if not refused_or_read(small[:n], tmp_path / "cut.gguf")]
    assert not accepted


CHANGES: dict[str, Callable[[bytearray, int, random.Random], None]] = {
    "flip": lambda data, at, rng: data.__setitem__(at, data[at] ^ 1 << rng.randrange(8)),
    "ones": lambda data, at, rng: data.__setitem__(slice(at, at + 8), b"\xff" * min(8, len(data) - at)),
    "drop": lambda data, at, rng: data.__delitem__(slice(at, at + rng.randrange(1, 9))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_bytes_are_refused_or_harmless(change: str, small: bytes, tmp_path: Path) -> None:
    rng = random.Random(0)
    end = small.index(b"output_norm.weight") + 60
    refused = 0
    tracemalloc.start()
    for at in itertools.chain(range(0, end, 3), (rng.randrange(len(small)) for _ in range(20))):
        data = bytearray(small)
        CHANGES[change](data, at, rng)
        refused += refused_or_read(bytes(data), tmp_path / "changed.gguf")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused > 20
    assert peak < 1 << 24


def test_vast_sizes_are_allocated_by_no_one(tmp_path: Path) -> None:
    contents: list[Any] = [content for content, _ in BROKEN.values()]
    tracemalloc.start()
    for content in contents:
        refused_or_read(content, tmp_path / "m.gguf")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 22
