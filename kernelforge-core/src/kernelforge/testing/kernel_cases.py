"""The cases of a kernel variant: what it claims through `supports`, at levels 1 to 4."""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from hashlib import sha256
from itertools import cycle, islice
from typing import Any

from kernelforge.op import OpDef
from kernelforge.problem import Problem
from kernelforge.testing.case import Case
from kernelforge.testing.families import Choice, Family, dtype_label, family_of
from kernelforge.testing.kernels import KernelRun, check_arrangement, check_kernel, check_plain
from kernelforge.testing.layouts import ARRANGEMENTS, restrided
from kernelforge.testing.pairwise import pairwise
from kernelforge.testing.values import value_names
from kernelforge.variant import Accept, Config, ConfigSpace, DeviceInfo, KernelVariant, Reject

DYNAMIC_SIZES = 3
"""Sizes that a problem with a dynamic dimension is run at."""
MOST_CONFIGS = 24
FEW_CONFIGS = 8
"""So many are run on each of the plain problems; of more, each on one of them, as each is compiled anew."""
MOST_TILE = 600
MOST_TURNS = 8
"""Sets of sizes tried for a choice of factors until one is claimed."""
MOST_NEIGHBOURS = 60

Check = Callable[..., None]
"""Gets the bench and `run`."""


class KernelCases:
    """Cases of one variant, in the making."""

    def __init__(self, variant: KernelVariant, op: OpDef, info: DeviceInfo) -> None:
        self.variant, self.op, self.info = variant, op, info
        self.family: Family = family_of(op)
        self.cases: dict[str, Case] = {}
        self._refused: dict[Problem, str] = {}
        self._claimed: dict[frozenset[tuple[str, Any]], bool] = {}

    def run(self, problem: Problem, sizes: Sequence[int] = (), values: str = "normal") -> KernelRun:
        return KernelRun(self.variant.target, self.variant.name, problem, tuple(sizes), values)

    def refusal(self, problem: Problem) -> str:
        """Why the variant does not claim a problem; empty when it does, or fails to tell: its case then fails as well."""
        if problem not in self._refused:
            try:
                verdict = self.variant.judge(problem, self.info)
            except Exception:
                verdict = Accept()
            self._refused[problem] = verdict.reason or "no reason given" if isinstance(verdict, Reject) else ""
        return self._refused[problem]

    def add(self, level: int, label: str, run: KernelRun, check: Check = check_kernel) -> None:
        """A case, unless there is the same already. What is not claimed is counted once for a problem and level."""
        refusal = self.refusal(run.problem)
        label = "refused" if refusal else label
        what = f"{run.problem}" if refusal else f"{run} {getattr(check, 'keywords', '')}"
        digest = sha256(what.encode()).hexdigest()[:8]
        dtype = dtype_label(run.problem)
        where = f"{self.variant.target}/{self.variant.op}/{self.variant.name}/{level}"
        name = f"{where}/{'.'.join([dtype.replace('*', '-').replace('->', '-to-'), label, digest])}"
        self.cases.setdefault(
            name,
            Case(name, level, self.op.full_name, self.variant.name, partial(check, run=run), dtype, refusal),
        )

    def problem(self, choice: Choice) -> Problem | None:
        return self.family.problem(self.op, choice, dynamic=bool(choice.get("dynamic")))

    def claims(self, choice: Choice) -> bool:
        key = frozenset(choice.items())
        if key not in self._claimed:
            problem = self.problem(choice)
            self._claimed[key] = problem is not None and not self.refusal(problem)
        return self._claimed[key]

    @cached_property
    def plainest(self) -> dict[tuple[str, bool], dict[str, Any]]:
        """For each dtype, and with and without a dynamic dimension, a plain choice that is claimed: one that differs in few
        values from the family's first. Where none is found, the first."""
        firsts = {
            (dtype, dynamic): self.family.first(dtype=dtype, dynamic=dynamic)
            for dynamic in (False, *([True] if self.family.dynamic else []))
            for dtype in self.family.factors["dtype"]
        }
        claimed = {key: found for key, first in firsts.items() if (found := self._near(first, 1)) is not None}
        if not claimed:
            claimed = {key: found for key, first in firsts.items() if (found := self._near(first, 3)) is not None}
        for key in firsts.keys() - claimed.keys():
            others = ({**choice, "dtype": key[0], "dynamic": key[1]} for choice in claimed.values())
            if (found := next(filter(self.claims, list(others)), None)) is not None:
                claimed[key] = found
        return {key: claimed.get(key, first) for key, first in firsts.items()}

    def _near(self, choice: dict[str, Any], steps: int) -> dict[str, Any] | None:
        """A claimed choice that differs from another in at most so many values."""
        others = {name: values for name, values in {**self.family.factors, **self.sizes}.items() if name != "dtype"}
        nearest = [choice]
        for _ in range(steps):
            if (found := next(filter(self.claims, nearest), None)) is not None:
                return found
            nearest = [{**c, k: v} for c in nearest[:MOST_NEIGHBOURS] for k, values in others.items() for v in values]
        return next(filter(self.claims, nearest), None)

    def plain_problems(self, *, dynamic: bool, claimed: bool = True) -> Iterator[Problem]:
        for (_, open_), choice in self.plainest.items():
            problem = self.problem(choice)
            if problem is None or open_ != dynamic or bool(problem.dims) != dynamic:
                continue
            if claimed and self.refusal(problem):
                continue
            yield problem

    @cached_property
    def sizes(self) -> dict[str, list[int]]:
        """Of each extent, tiles of the device's vectors included."""
        sizes = {name: list(values) for name, values in self.family.sizes.items()}
        for name in self.family.tiled:
            sizes[name] = list(dict.fromkeys([*sizes[name], *edges_of({self.info.limit("vector_bytes") // 4})]))
        return sizes

    @cached_property
    def covering(self) -> list[Problem]:
        """Problems that cover all pairs of factors, whether they are claimed or not, then all pairs that can be claimed;
        and of each extent all sizes, with those on either side of the variant's tiles."""
        factors = {**self.family.factors, **({"dynamic": (False, True)} if self.family.dynamic else {})}
        sizes = {name: list(values) for name, values in self.sizes.items()}
        tiles = edges_of(self._tiles())
        for name in self.family.tiled:
            sizes[name] = list(dict.fromkeys([*sizes[name], *tiles]))
        rng = random.Random(0)
        for values in sizes.values():
            rng.shuffle(values)

        def sized(row: Choice, number: int) -> dict[str, Any]:
            return {**row, **{name: values[number % len(values)] for name, values in sizes.items()}}

        def fitted(row: Choice, number: int) -> dict[str, Any]:
            """With the sizes whose turn it is or, where they are not claimed, with others."""
            turns = (sized(row, number + n) for n in range(MOST_TURNS))
            return next(filter(self.claims, turns), sized(row, number))

        rows = [fitted(row, i) for i, row in enumerate(pairwise(factors))]
        claimed = [row for row in rows if self.claims(row)]
        known = [*claimed, *({"dynamic": False, **c} for c in self.plainest.values() if self.claims(c))]
        more = pairwise(factors, allowed=lambda row: self.claims(fitted(row, len(rows))), start=known)
        rows += [fitted(row, len(rows) + i) for i, row in enumerate(more)]
        claimed = [row for row in rows if self.claims(row)]
        wanted = max(map(len, sizes.values()), default=0)
        for i in range(len(claimed), wanted if claimed else 0):
            rows.append(sized(rng.choice(claimed), i))
        return [problem for row in rows if (problem := self.problem(row)) is not None]

    def _tiles(self) -> set[int]:
        """Numbers in the variant's config space."""
        claimed = next(self.plain_problems(dynamic=False), None)
        if claimed is None:
            return set()
        parameters = self.variant.config_space(claimed, self.info).parameters
        return {v for _, values in parameters for v in values if isinstance(v, int)}

    def sizes_for(self, problem: Problem, start: int = 0, count: int = DYNAMIC_SIZES) -> list[tuple[int, ...]]:
        """Sizes of the dynamic dimensions, or the one empty tuple when there are none."""
        if not problem.dims:
            return [()]
        sizes = self.family.sizes[self.family.dynamic]
        return [(n,) * len(problem.dims) for n in islice(cycle(sizes), start, start + count)]


def kernel_cases(variant: KernelVariant, op: OpDef, info: DeviceInfo, levels: Container[int]) -> list[Case]:
    """The cases of a variant of these levels."""
    from kernelforge.testing.property import property_cases
    from kernelforge.testing.stress import stress_cases

    made = KernelCases(variant, op, info)
    for number, add in enumerate((_smoke, _values, _layouts, _edge_values), start=1):
        if number in levels:
            add(made)
    more = [property_cases(made) if 5 in levels else [], stress_cases(made) if 6 in levels else []]
    return [*made.cases.values(), *more[0], *more[1]]


def _smoke(made: KernelCases) -> None:
    for problem in made.plain_problems(dynamic=False, claimed=False):
        made.add(1, "guarded", made.run(problem))
        made.add(1, "plain", made.run(problem), check_plain)


def _values(made: KernelCases) -> None:
    for i, problem in enumerate(made.covering):
        for sizes in made.sizes_for(problem, DYNAMIC_SIZES * i):
            made.add(2, _shape(problem, sizes), made.run(problem, sizes))
    for label, changed in made.family.extremes.items():
        dtype = changed.get("dtype", made.family.factors["dtype"][0])
        large = made.problem({**made.plainest[dtype, False], **changed})
        if large is not None:
            made.add(2, label, made.run(large))
    plain = [*islice(made.plain_problems(dynamic=False), 2), *islice(made.plain_problems(dynamic=True), 1)]
    for turn, problem in enumerate(plain):
        configs = some_configs(made.variant.config_space(problem, made.info))
        for config in configs if len(configs) <= FEW_CONFIGS else configs[turn :: len(plain)]:
            for sizes in made.sizes_for(problem, 1, count=2):
                label = ".".join(f"{k}{v}" for k, v in config.items())
                made.add(2, label, replace(made.run(problem, sizes), config=config))


def edges_of(tiles: set[int]) -> list[int]:
    """Sizes on either side of tiles."""
    return sorted({n for tile in tiles if 1 < tile <= MOST_TILE for n in (tile - 1, tile, tile + 1)})


def some_configs(space: ConfigSpace) -> list[Config]:
    """Legal configs of a space: all pairs of values of two parameters, as far as they are legal together; `MOST_CONFIGS`
    at most."""
    if not space.parameters:
        return []
    if space.grid_size <= MOST_CONFIGS:
        return list(space)
    found = [c for c in pairwise(dict(space.parameters)) if c in space]
    rng = random.Random(0)
    for _ in range(20 * MOST_CONFIGS):
        config = {name: rng.choice(values) for name, values in space.parameters}
        if config in space and config not in found and len(found) < MOST_CONFIGS:
            found.append(config)
    return list(found[:MOST_CONFIGS])


def _layouts(made: KernelCases) -> None:
    for dynamic in (False, True):
        for problem in islice(made.plain_problems(dynamic=dynamic), 2):
            for label, strided in restrided(problem, made.op):
                made.add(3, label, made.run(strided, (5,) * len(strided.dims)))
    for problem in islice(made.plain_problems(dynamic=False), 2):
        for arrangement in ARRANGEMENTS:
            check = partial(check_arrangement, arrangement=arrangement)
            made.add(3, arrangement, made.run(problem), check)


def _edge_values(made: KernelCases) -> None:
    quick = partial(check_kernel, threads=())
    for problem in made.plain_problems(dynamic=False):
        for values in value_names(made.op, problem)[1:]:
            made.add(4, values, made.run(problem, values=values), quick)
    special = tuple(made.family.values)
    for i, problem in enumerate(made.covering):
        if special and not made.refusal(problem):
            for sizes in made.sizes_for(problem, DYNAMIC_SIZES * i, count=1):
                values = special[i % len(special)]
                if values in value_names(made.op, problem):
                    made.add(4, f"{values}.{_shape(problem, sizes)}", made.run(problem, sizes, values), quick)
    for extent in made.family.zero:
        for (_, dynamic), choice in made.plainest.items():
            empty = None if dynamic else made.problem({**choice, extent: 0})
            if empty is not None:
                made.add(4, f"no-{extent}", made.run(empty), quick)
    if made.family.dynamic in made.family.zero:
        for problem in made.plain_problems(dynamic=True):
            made.add(4, f"no-{made.family.dynamic}", made.run(problem, (0,) * len(problem.dims)), quick)


def _shape(problem: Problem, sizes: Sequence[int]) -> str:
    """For names: the sizes of the first operand, dynamic ones marked."""
    named = dict(zip(problem.dims, sizes, strict=True))
    shape = problem.operand(0).shape
    return "x".join(str(d) if isinstance(d, int) else f"n{named[d]}" for d in shape) or "scalar"
