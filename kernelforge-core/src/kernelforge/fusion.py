"""Whether a fused op runs whole or as the ops that it stands for (`OpDef.parts`), and why.

The first of these rules that applies decides. A kernel of the whole that the user named. A whole that nothing runs but the
target's fallback is taken apart. A kernel of a part that the user named. Where the whole and all parts were measured on exactly
these problems, the quicker way is taken; a problem of any size never was: who wins at one may lose at another. A whole that the
target's own kernel would run is taken apart where a plugin's kernel was chosen for a part, and no part is left to the fallback:
who brings a better kernel for an op need not know what fuses that op. Else it stays whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from kernelforge.errors import UsageError
from kernelforge.parts import part_problems
from kernelforge.plan import Fusion, PartKernel
from kernelforge.problem import Problem

if TYPE_CHECKING:
    from kernelforge.registry import Registry
    from kernelforge.selection import Selection


def weigh(
    problem: Problem, registry: Registry, target: str, select: Callable[[Problem], Selection], named: Mapping[str, str]
) -> Fusion:
    """`select` chooses a kernel or raises UsageError; `named` are the user's variants by op."""
    return _weigh(problem, registry, target, select, named)[0]


def _weigh(
    problem: Problem, registry: Registry, target: str, select: Callable[[Problem], Selection], named: Mapping[str, str]
) -> tuple[Fusion, tuple[Selection, ...]]:
    """Also the kernels that run in the end, none where a part has none."""
    home = registry.backend_spec(target).provenance.distribution

    def foreign(selection: Selection) -> bool:
        return selection.variant.provenance.distribution != home

    def chosen(inner: Problem) -> tuple[Selection, ...]:
        if registry.ops[inner.op].parts_of(inner):
            fusion, kernels = _weigh(inner, registry, target, select, named)
            if not kernels:
                raise UsageError(f"no kernel for {inner.op} or one of its parts: {fusion.reason}")
            return kernels
        return (select(inner),)

    inner = part_problems(problem, registry.ops)
    try:
        parts = tuple(selection for part in inner for selection in chosen(part))
        lacking = ""
    except UsageError as error:
        parts, lacking = (), str(error)
    try:
        whole: tuple[Selection, ...] = (select(problem),)
    except UsageError:
        whole = ()

    def as_named(selection: Selection) -> bool:
        return named.get(selection.problem.op) == selection.variant.name

    asked = next(filter(as_named, parts), None)
    kept = bool(whole) and as_named(whole[0])
    theirs = next((s for s in parts if foreign(s)), None)
    took, sum_of_parts = _seconds(whole), _seconds(parts)
    forced = kept
    if kept:
        apart, reason = False, f"'{whole[0].variant.name}' was asked for"
    elif not whole or registry.is_fallback(whole[0].variant):
        apart, reason = True, "no kernel for the whole"
    elif asked is not None:
        apart, forced, reason = True, True, f"'{asked.variant.name}' was asked for to run {asked.problem.op}"
    elif lacking:
        apart, reason = False, lacking
    elif took < math.inf and sum_of_parts < math.inf:
        apart = sum_of_parts < took
        reason = f"measured {took * 1e6:.1f} us whole, {sum_of_parts * 1e6:.1f} us in parts"
    elif theirs is not None and not foreign(whole[0]) and not any(registry.is_fallback(s.variant) for s in parts):
        apart = True
        reason = f"{theirs.variant.name} of {theirs.variant.provenance} was chosen for {theirs.problem.op}"
        if problem.dims:
            reason += "; times do not decide for a step of any size"
    else:
        apart, reason = False, "one kernel in place of several"
    kernels = tuple(PartKernel(str(s.problem), s.variant.name, str(s.variant.provenance)) for s in parts)
    return Fusion(problem.canonical(), problem.dims, apart, reason, forced, kernels), parts if apart else whole


def _seconds(selections: tuple[Selection, ...]) -> float:
    """In all; infinite when one was not measured on exactly its problem, or there is none."""
    return sum((s.seconds for s in selections), 0.0) if selections else math.inf
