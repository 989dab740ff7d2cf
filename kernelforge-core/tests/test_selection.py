from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from kernelforge.errors import KernelForgeWarning, PluginError, UsageError
from kernelforge.problem import Problem, parse_problem
from kernelforge.provenance import Provenance
from kernelforge.selection import RecordMatch, select
from kernelforge.variant import Accept, ConfigSpace, DeviceInfo, KernelVariant, Reject, Verdict, no_choices

DEVICE = DeviceInfo("toy", "toy device", "toy-0")
PROBLEM = parse_problem("toy.dot(f32[4,8], f32[8,4]) -> (f32[4,4]) {}")
SPACE = ConfigSpace((("tile", (4, 8, 16)),), (("tile 16 is too large", lambda config: config["tile"] != 16),))


def variant(name: str, reject: str | None = None, **more: Any) -> KernelVariant:
    def supports(problem: Problem, device: DeviceInfo) -> Verdict:
        return Accept() if reject is None else Reject(reason=reject)

    options: dict[str, Any] = {"op": "toy.dot", "target": "toy", "space": lambda problem, device: SPACE, **more}
    return KernelVariant(name, build="nowhere:build", supports=supports, **options)


class Known:
    """Records, by variant name."""

    def __init__(self, matches: Mapping[str, list[RecordMatch]]) -> None:
        self._matches = matches

    def matches(self, problem: Problem, variant: KernelVariant, device: DeviceInfo) -> Iterable[RecordMatch]:
        return self._matches.get(variant.name, [])

    def stamp(self) -> str:
        return ""


def exact(median_s: float, tile: int = 8) -> RecordMatch:
    return RecordMatch({"tile": tile}, median_s, True, str(PROBLEM))


def near(median_s: float, tile: int = 8) -> RecordMatch:
    return RecordMatch({"tile": tile}, median_s, False, "toy.dot(f32[5,8], f32[8,4]) -> (f32[5,4]) {}")


def order(*variants: KernelVariant, known: Mapping[str, list[RecordMatch]] | None = None, **more: Any) -> list[str]:
    selection = select(PROBLEM, variants, DEVICE, Known(known or {}), **more)
    return [d.variant.name for d in selection.decisions]


def reasons(*variants: KernelVariant, known: Mapping[str, list[RecordMatch]] | None = None, **more: Any) -> list[str]:
    return [d.reason for d in select(PROBLEM, variants, DEVICE, Known(known or {}), **more).decisions]


def test_without_measurements_priority_decides_then_the_name() -> None:
    variants = (variant("b", priority=1), variant("c", priority=5), variant("a", priority=1))
    assert order(*variants) == ["c", "a", "b"]
    assert reasons(*variants) == ["highest priority; nothing measured", *["priority 1, the chosen one has 5"] * 2]


def test_the_only_one_says_so() -> None:
    assert reasons(variant("a"), variant("b", reject="too small")) == ["the only one that accepts", "too small"]


def test_the_fastest_measured_wins_over_priority() -> None:
    variants = (variant("slow", priority=5), variant("fast"), variant("unknown"))
    known = {"slow": [exact(3e-6)], "fast": [exact(1e-6, tile=4)]}
    assert order(*variants, known=known) == ["fast", "slow", "unknown"]
    assert reasons(*variants, known=known) == [
        "fastest measured: 1.0 us",
        "measured 3.0 us, 3.00 x the chosen one's",
        "not measured, and not of higher priority",
    ]
    chosen = select(PROBLEM, variants, DEVICE, Known(known)).chosen
    assert (chosen.config, chosen.config_source) == ({"tile": 4}, "record")


def test_one_that_was_never_measured_goes_first_if_its_priority_is_higher() -> None:
    variants = (variant("new", priority=5), variant("old"))
    assert order(*variants, known={"old": [exact(1e-6)]}) == ["new", "old"]
    assert reasons(*variants, known={"old": [exact(1e-6)]})[0] == "not measured yet, but of higher priority than 'old'"
    assert order(variant("equal", priority=5), variants[0], known={"new": [exact(1e-6)]}) == ["new", "equal"]


def test_records_of_other_shapes_lend_their_config_but_do_not_rank() -> None:
    variants = (variant("a", priority=1), variant("b"))
    selection = select(PROBLEM, variants, DEVICE, Known({"b": [near(1e-9)], "a": [near(1.0, tile=4)]}))
    assert selection.variant.name == "a"
    assert (selection.config, selection.chosen.config_source) == ({"tile": 4}, "nearest-record")


def test_a_recorded_config_that_is_no_longer_legal_is_passed_over() -> None:
    known = {"a": [exact(1e-6, tile=16), exact(2e-6, tile=32), near(1e-6, tile=8)]}
    selection = select(PROBLEM, [variant("a")], DEVICE, Known(known))
    assert (selection.config, selection.chosen.config_source) == ({"tile": 8}, "nearest-record")


def test_without_a_record_the_variant_chooses_its_config() -> None:
    selection = select(PROBLEM, [variant("a", default=lambda problem, device: {"tile": 8})], DEVICE)
    assert (selection.config, selection.chosen.config_source) == ({"tile": 8}, "default")
    assert select(PROBLEM, [variant("a")], DEVICE).config == {"tile": 4}


THEIRS = Provenance("theirs", "their-kernels", "2.0")
EMPTY = ConfigSpace((("tile", (4,)),), (("never", lambda config: False),))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"default": lambda problem, device: {"tile": 16}}, "its default config .* tile 16 is too large"),
        ({"supports": lambda problem, device: True}, "supports returned True"),
        ({"supports": "no_such_package:supports"}, "ModuleNotFoundError: No module named 'no_such_package'"),
        ({"supports": lambda: Accept()}, "TypeError: .* takes 0 positional arguments"),
        ({"space": lambda problem, device: None}, "space returned None, wants a ConfigSpace"),
        ({"space": lambda problem, device: EMPTY}, "StopIteration"),
    ],
)
def test_a_variant_that_fails_is_left_out_and_named(
    wrong: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"space": lambda problem, device: SPACE, "provenance": THEIRS, **wrong}
    bad = KernelVariant("bad", "toy.dot", "toy", "nowhere:build", **options)
    said = rf"variant 'toy/toy\.dot/bad' of plugin theirs \(their-kernels 2\.0\) is left out: .*{reason}"
    with pytest.warns(KernelForgeWarning, match=said):
        selection = select(PROBLEM, [variant("good"), bad], DEVICE)
    assert [d.variant.name for d in selection.decisions] == ["good", "bad"]
    assert isinstance(selection.decisions[1].verdict, Reject)
    with pytest.raises(PluginError, match=r"variant 'toy/toy\.dot/bad' of plugin theirs .* fails: ") as raised:
        select(PROBLEM, [variant("good"), bad], DEVICE, variant="bad")
    assert raised.value.hint == "`kernelforge plugins disable theirs` leaves it out"
    monkeypatch.setenv("KERNELFORGE_PLUGINS_STRICT", "yes")
    with pytest.raises(PluginError, match=said):
        select(PROBLEM, [variant("good"), bad], DEVICE)


def test_a_variant_of_core_that_fails_is_an_error() -> None:
    bad = KernelVariant("a", "toy.dot", "toy", build="nowhere:build", supports=lambda problem, device: True)
    with pytest.raises(PluginError, match="supports returned True"):
        select(PROBLEM, [bad], DEVICE)


def test_a_kernel_that_cannot_be_built_names_its_plugin() -> None:
    bad = variant("a", provenance=THEIRS, space=no_choices)
    with pytest.raises(
        PluginError, match=r"'toy/toy\.dot/a' of plugin theirs .* cannot be built for toy\.dot.*: Module"
    ):
        bad.build_kernel(PROBLEM, {}, DEVICE)


def test_a_variant_can_be_forced_whatever_the_records_say() -> None:
    variants = (variant("fast"), variant("slow"))
    selection = select(PROBLEM, variants, DEVICE, Known({"fast": [exact(1e-9)]}), variant="slow")
    assert (selection.variant.name, selection.chosen.reason) == ("slow", "asked for by name")
    with pytest.raises(UsageError, match=r"unknown variant 'nope' of toy\.dot on target 'toy'") as raised:
        select(PROBLEM, variants, DEVICE, variant="nope")
    assert raised.value.hint == "known: fast, slow"
    with pytest.raises(UsageError, match=r"variant 'b' cannot run toy.*: too small"):
        select(PROBLEM, [variant("a"), variant("b", reject="too small")], DEVICE, variant="b")


def test_a_config_can_be_given() -> None:
    selection = select(PROBLEM, [variant("a")], DEVICE, config={"tile": 8})
    assert (selection.config, selection.chosen.config_source) == ({"tile": 8}, "given")
    with pytest.raises(UsageError, match=r"config .* is illegal for variant 'a': tile 16 is too large"):
        select(PROBLEM, [variant("a")], DEVICE, config={"tile": 16})
    with pytest.raises(UsageError, match=r"has parameters \['unroll'\], wants \['tile'\]"):
        select(PROBLEM, [variant("a")], DEVICE, config={"unroll": 1})


def test_when_nobody_accepts_every_reason_is_given() -> None:
    with pytest.raises(UsageError, match=r"no kernel on target 'toy' can run toy\.dot") as raised:
        select(PROBLEM, [variant("a", reject="too small"), variant("b", reject="no avx2")], DEVICE)
    assert raised.value.hint == "a: too small; b: no avx2"
    with pytest.raises(UsageError, match="no kernel on target 'toy' can run") as raised:
        select(PROBLEM, [], DEVICE)
    assert raised.value.hint == "no variant is registered"


def test_variants_of_other_ops_and_targets_do_not_count() -> None:
    others = (variant("a", target="cpu"), variant("b", op="toy.sum"), variant("c"))
    assert order(*others) == ["c"]


def test_equal_problems_get_equal_answers_whatever_their_dimensions_are_called() -> None:
    text = "toy.dot(f32[{0},8], f32[8,4]) -> (f32[{0},4]) {{}}"
    first, second = (select(parse_problem(text.format(name)), [variant("a")], DEVICE) for name in ("tokens", "?0"))
    assert first.problem == second.problem
