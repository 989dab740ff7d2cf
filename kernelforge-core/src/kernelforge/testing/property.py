"""Level 5: random choices, sizes, values and layouts, made smaller by hypothesis until they just fail."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from kernelforge.errors import AssetError
from kernelforge.testing.case import Case, Failure, NotClaimed
from kernelforge.testing.kernel_cases import KernelCases
from kernelforge.testing.kernels import check_kernel
from kernelforge.testing.layouts import LAYOUTS, restrided
from kernelforge.testing.values import value_names

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from kernelforge.problem import Problem
    from kernelforge.testing.bench import Bench

EXAMPLES = 12
"""Claimed examples that are tried for a variant."""
SHRINKS = 40
"""Kernels that are run at most to make a failure smaller."""
MOST_SIZE = 70


def property_cases(made: KernelCases) -> list[Case]:
    """One case for a variant that claims anything. Raises AssetError without hypothesis."""
    variant, op = made.variant, made.op
    if not any(map(made.claims, made.plainest.values())):
        return []
    if find_spec("hypothesis") is None:
        raise AssetError(
            "cases of level 5 are made by hypothesis, which is not installed",
            hint='pip install "kernelforge-core[testing]", or --level 4',
        )
    name = f"{variant.target}/{variant.op}/{variant.name}/5/random"
    return [Case(name, 5, op.full_name, variant.name, partial(_check, made=made))]


def _check(bench: Bench, made: KernelCases) -> None:
    """Hypothesis's examples are the same at every run. Raises Failure for the smallest one found that fails."""
    import hypothesis
    from hypothesis import HealthCheck, Phase

    seen: dict[str, Exception | None] = {}
    claimed = 0

    def attempt(drawn: dict[str, Any]) -> None:
        nonlocal claimed
        problem = _problem(made, drawn)
        hypothesis.assume(problem is not None and not made.refusal(problem))
        assert problem is not None
        key = str(drawn)
        if key not in seen:
            failures = sum(error is not None for error in seen.values())
            if failures and len(seen) > EXAMPLES + SHRINKS:
                return
            names = value_names(made.op, problem)
            sizes = (drawn["open"],) * len(problem.dims)
            run = made.run(problem, sizes, names[drawn["values"] % len(names)])
            claimed += 1
            seen[key] = None
            try:
                check_kernel(bench, run, threads=())
            except Exception as error:
                seen[key] = error
        found = seen[key]
        if found is not None:
            raise found

    test = hypothesis.given(_choices(made))(attempt)
    settings = hypothesis.settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        print_blob=False,
    )
    try:
        settings(test)()
    except Failure as failure:
        raise Failure(failure.kind, str(failure)) from None
    except hypothesis.errors.Unsatisfiable:
        pass
    if not claimed:
        raise NotClaimed("no random problem was claimed")


def _choices(made: KernelCases) -> SearchStrategy[dict[str, Any]]:
    """The plainest choice of a dtype, and what is chosen otherwise; None leaves it as it is."""
    from hypothesis import strategies as st

    family = made.family
    fields: dict[str, SearchStrategy[Any]] = {
        "plain": st.sampled_from([choice for choice in made.plainest.values() if made.claims(choice)]),
        "values": st.integers(0, 30),
        "layout": st.sampled_from(("", *LAYOUTS)),
        "open": st.integers(0 if family.dynamic in family.zero else 1, MOST_SIZE),
    }
    for name, values in family.factors.items():
        if name != "dtype":
            fields[name] = st.none() | st.sampled_from(list(values))
    for name, sizes in family.sizes.items():
        least = 0 if name in family.zero else 1
        fields[name] = st.none() | st.integers(least, min(MOST_SIZE, max(sizes)))
    return st.fixed_dictionaries(fields)


def _problem(made: KernelCases, drawn: dict[str, Any]) -> Problem | None:
    names = (*made.family.factors, *made.family.sizes)
    changed = {name: drawn[name] for name in names if drawn.get(name) is not None}
    problem = made.problem({**drawn["plain"], **changed})
    if problem is None or not drawn["layout"]:
        return problem
    return next((p for label, p in restrided(problem, made.op) if label.startswith(drawn["layout"])), problem)
