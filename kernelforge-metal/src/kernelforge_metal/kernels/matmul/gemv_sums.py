"""The sums of a GEMV: each thread has a part of every one, which workgroup memory brings together at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

NARROWEST, USUAL, WIDEST = 4, 32, 128
"""Lanes of a subgroup: at least, on most GPUs, and at most."""
FEW_REGISTERS = 512
"""Threads of a workgroup from which on each has so few that text without loops is slower."""
GUARANTEED = 16384
"""Bytes of workgroup memory that every device has."""


@dataclass(frozen=True)
class Sums:
    """The sums of a workgroup: first those of its tiles, then those that it has once."""

    each: int
    """Sums of a tile, which a thread has in the variables `z0`, `z1`, ..."""
    tiles: int
    once: tuple[str, ...]
    """Variables of the others."""
    threads: int
    subgroups: bool

    @property
    def count(self) -> int:
        return self.each * self.tiles + len(self.once)

    @property
    def own(self) -> bool:
        """Whether every subgroup, however narrow, has its own part of each sum. Else narrow ones add to each other's, one after
        the other: more sums fit then, for more code, also on GPUs where it does not run."""
        return self.subgroups and self.tiles == 1 and 4 * self.count * (self.threads // NARROWEST) <= GUARANTEED

    @property
    def parts(self) -> int:
        """How many parts of a sum are in workgroup memory."""
        if not self.subgroups:
            return self.threads
        return max(1, self.threads // (NARROWEST if self.own else USUAL))

    @property
    def nbytes(self) -> int:
        """Of workgroup memory."""
        return 4 * self.count * self.parts

    @property
    def functions(self) -> str:
        """`parts`, and `total(i, ids)`: sum `i`, once all threads have theirs there."""
        n = self.count
        some = (
            f"  var sum = parts[i];\n  for (var s = 1u; s < ids.subgroups; s++) {{ sum += parts[s * {n}u + i]; }}\n"
            "  return sum;\n"
        )
        usual = max(1, self.threads // USUAL)
        if self.own:
            body = f"  if (ids.subgroups == {usual}u) {{ return {self._all_parts(usual)}; }}\n{some}"
        elif self.subgroups:
            body = f"  if (ids.subgroups < {self.parts}u) {{\n{some}  }}\n  return {self._all_parts(self.parts)};\n"
        else:
            body = "  return parts[i];\n"
        return f"var<workgroup> parts: array<f32, {n * self.parts}>;\nfn total(i: u32, ids: Ids) -> f32 {{\n{body}}}\n"

    def _all_parts(self, count: int) -> str:
        """So many of sum `i`, added in pairs, so that the loads do not wait for each other."""
        parts = [f"parts[i + {s * self.count}u]" for s in range(count)]
        while len(parts) > 1:
            pairs = zip(parts[::2], parts[1::2], strict=False)
            parts = [*(f"({a} + {b})" for a, b in pairs), *(parts[-1:] if len(parts) % 2 else [])]
        return parts[0]

    def of_tile(self, tile: str) -> Iterator[str]:
        """After a tile: its sums leave the registers."""
        n = self.each
        if not self.subgroups:
            yield from (f"parts[t * {self.count}u + {tile} * {n}u + {i}u] = z{i};" for i in range(n))
        elif n & (n - 1) == 0:
            yield f"if (ids.lanes >= {n}u && ids.subgroups * ids.lanes == {self.threads}u) {{"
            yield from self._halved(f"{tile} * {n}u")
            yield "} else {"
            yield from self._added([f"z{i}" for i in range(n)], f"{tile} * {n}u")
            yield "}"
        else:
            yield from self._added([f"z{i}" for i in range(n)], f"{tile} * {n}u")

    def of_all(self) -> Iterator[str]:
        """After all tiles."""
        first = self.each * self.tiles
        if self.subgroups:
            yield from self._added(self.once, f"{first}u")
            yield "workgroupBarrier();"
            return
        n = self.count
        yield from (f"parts[t * {n}u + {first + i}u] = {name};" for i, name in enumerate(self.once))
        yield f"for (var half = {self.threads // 2}u; half > 0u; half >>= 1u) {{"
        yield "workgroupBarrier();"
        yield f"for (var i = t * {n}u; t < half && i < (t + 1u) * {n}u; i++) {{ parts[i] += parts[i + half * {n}u]; }}"
        yield "}"
        yield "workgroupBarrier();"

    def _added(self, names: Iterable[str], place: str) -> Iterator[str]:
        """Each sum across the subgroup by itself."""
        names = list(names)
        yield from (f"{name} = subgroupAdd({name});" for name in names)
        if names:
            yield from self._kept("ids.lane == 0u", [f"{place} + {i}u" for i in range(len(names))], names)

    def _halved(self, place: str) -> Iterator[str]:
        """Sums of a power of two across a full subgroup of at least as many lanes: two lanes exchange halves of what they have,
        until each has one sum, which is that of its number. 16 sums of 32 lanes take 16 exchanges in place of 80."""
        n = self.each
        half = n // 2
        while half:
            yield f"let upper{half} = (ids.lane & {half}u) != 0u;"
            for i in range(half):
                kept, given = f"z{i}, z{i + half}, upper{half}", f"z{i + half}, z{i}, upper{half}"
                yield f"z{i} = select({kept}) + subgroupShuffleXor(select({given}), {half}u);"
            half //= 2
        if self.threads > FEW_REGISTERS:
            yield f"for (var apart = {n}u; apart < ids.lanes; apart *= 2u) {{ z0 += subgroupShuffleXor(z0, apart); }}"
        else:
            for apart in (2**i for i in range(n.bit_length() - 1, WIDEST.bit_length() - 1)):
                yield f"if (ids.lanes > {apart}u) {{ z0 += subgroupShuffleXor(z0, {apart}u); }}"
        yield from self._kept(f"ids.lane < {n}u", [f"{place} + ids.lane"], ["z0"])

    def _kept(self, who: str, places: list[str], names: list[str]) -> Iterator[str]:
        """In workgroup memory, by the threads of a subgroup for which `who` holds."""
        n, parts = self.count, self.parts
        if self.own:
            yield f"if ({who}) {{"
            for place, name in zip(places, names, strict=True):
                yield f"parts[ids.subgroup * {n}u + {place}] = {name};"
            yield "}"
            return
        yield f"if (ids.subgroups <= {parts}u) {{ if ({who}) {{"
        for place, name in zip(places, names, strict=True):
            yield f"parts[ids.subgroup * {n}u + {place}] = {name};"
        yield f"}} }} else {{ for (var turn = 0u; turn * {parts}u < ids.subgroups; turn++) {{"
        yield f"if ({who} && ids.subgroup / {parts}u == turn) {{"
        for begin, sign in (
            ("if (turn == 0u) {", "="),
            ("} else {", "+="),
        ):  # a branch for each sum takes drivers minutes
            yield begin
            for place, name in zip(places, names, strict=True):
                yield f"parts[ids.subgroup % {parts}u * {n}u + {place}] {sign} {name};"
        yield "} } workgroupBarrier(); } }"
