"""A constant with several readers is kept in one layout where kernels can read it so, and what is not so told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import fake_target
import pytest

from kernelforge import builtin
from kernelforge.cli import output
from kernelforge.cli.why_verb import why
from kernelforge.constant import ArraySource
from kernelforge.descriptors import ImporterSpec
from kernelforge.errors import KernelForgeWarning
from kernelforge.graph import Graph
from kernelforge.hookspecs import hookimpl
from kernelforge.importer import ImportedModel, Program
from kernelforge.plan import Step
from kernelforge.plugins import load_registry
from kernelforge.problem import Problem
from kernelforge.selection import RecordMatch
from kernelforge.session import Session
from kernelforge.variant import Config, ConfigSpace, DeviceInfo, KernelVariant

SPACE = ConfigSpace((("layout", ("rows", "panels8", "panels16")), ("unroll", (1, 2))))


def packs(problem: Problem, config: Config, device: DeviceInfo) -> Mapping[int, str]:
    return {} if config["layout"] == "rows" else {0: str(config["layout"])}


def product_packs(problem: Problem, config: Config, device: DeviceInfo) -> Mapping[int, str]:
    return {1: f"panels{config['width']}"}


def lookup(layouts: Any = packs) -> KernelVariant:
    return fake_target.variant("lookup", op="transformer.embedding", space=SPACE, layouts=layouts)


def product(width: int = 8, layouts: Any = product_packs) -> KernelVariant:
    return fake_target.variant("product", space=ConfigSpace((("width", (width,)),)), layouts=layouts)


class Tuned:
    """Records of one config of `lookup`."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def matches(self, problem: Problem, variant: KernelVariant, device: DeviceInfo) -> tuple[RecordMatch, ...]:
        return (RecordMatch(self.config, 1e-6, True, str(problem)),) if variant.name == "lookup" else ()

    def stamp(self) -> str:
        return str(self.config)


def tied(head: bool = True) -> str:
    """A table that is looked up, and if asked for multiplied by what was found."""
    g = Graph()
    table = g.constant("table", (50, 32), "f32")
    found = g.embedding(table, g.input("ids", ("tokens",), "i32"))
    g.output(g.matmul(found, table, transpose_rhs=True) if head else found, "y")
    return g.text()


def planned(*variants: KernelVariant, records: Any = None, head: bool = True) -> Step:
    """The step that looks up."""
    registry = fake_target.registry(*variants)
    session = Session("fake", registry=registry, records=records or Tuned({}), pipeline="")
    return session.plan(tied(head)).steps[0]


@pytest.mark.parametrize("width", [8, 16])
def test_a_kernel_that_can_reads_a_constant_as_another_packs_it(width: int) -> None:
    step = planned(lookup(), product(width))
    assert step.config == {"layout": f"panels{width}", "unroll": 1}
    assert step.config_source == "shared-layout"


def test_a_kernel_follows_in_each_of_its_constants() -> None:
    rows_or_panels = ("rows", "panels8")

    def layouts(problem: Problem, config: Config, device: DeviceInfo) -> Mapping[int, str]:
        return {i: str(config[name]) for i, name in ((1, "gate"), (2, "up")) if config[name] != "rows"}

    space = ConfigSpace((("gate", rows_or_panels), ("up", rows_or_panels)))
    both = fake_target.variant("both", op="transformer.glu_matmul", space=space, layouts=layouts)
    g = Graph()
    x, gate, up = (
        g.input("x", ("tokens", 32), "f32"),
        g.constant("gate", (50, 32), "f32"),
        g.constant("up", (50, 32), "f32"),
    )
    g.output(g.glu_matmul(x, gate, up, transpose_rhs=True), "y")
    for name, table in (("a", gate), ("b", up)):
        g.output(g.matmul(x, table, transpose_rhs=True), name)
    session = Session("fake", registry=fake_target.registry(both, product()), records=Tuned({}), pipeline="")
    step = session.plan(g.text()).steps[0]
    assert (step.config, step.config_source) == ({"gate": "panels8", "up": "panels8"}, "shared-layout")


def test_what_else_was_tuned_stays() -> None:
    step = planned(lookup(), product(), records=Tuned({"layout": "rows", "unroll": 2}))
    assert step.config == {"layout": "panels8", "unroll": 2}


@pytest.mark.parametrize(
    ("variants", "head"),
    [
        ([lookup()], False),  # nobody else reads it
        ([lookup(), product(64)], True),  # in a layout that the kernel cannot read
        ([lookup(), product(layouts=None)], True),  # in one that is not told
    ],
)
def test_otherwise_it_is_read_as_it_is(variants: list[KernelVariant], head: bool) -> None:
    """Also where another layout was measured to be faster: it would be a copy for this step alone."""
    step = planned(*variants, head=head)
    assert (step.config, step.config_source) == ({"layout": "rows", "unroll": 1}, "default")
    step = planned(*variants, records=Tuned({"layout": "panels8", "unroll": 2}), head=head)
    assert (step.config, step.config_source) == ({"layout": "rows", "unroll": 2}, "shared-layout")


def test_a_config_in_the_right_layout_stays_the_records() -> None:
    step = planned(lookup(), product(), records=Tuned({"layout": "panels8", "unroll": 2}))
    assert (step.config, step.config_source) == ({"layout": "panels8", "unroll": 2}, "record")


@pytest.mark.parametrize("wrong", [lambda problem, config, device: 1 / 0, lambda problem, config, device: {0: 8}])
def test_a_variant_that_fails_to_tell_is_left_as_it_is(wrong: Any) -> None:
    with pytest.warns(KernelForgeWarning, match="'layouts' of variant 'fake/transformer.embedding/lookup'.*left out"):
        step = planned(lookup(wrong), product())
    assert step.config == {"layout": "rows", "unroll": 1}


def test_why_of_a_model_shows_the_config_that_it_runs_with() -> None:
    class Tied:
        def claims(self, source: str) -> bool:
            return True

        def load(self, source: str, **options: object) -> ImportedModel:
            return ImportedModel(source, (Program("main", tied(), max_dims={"tokens": 4}),), ArraySource({}))

    class WithModel(fake_target.FakePlugin):
        @hookimpl
        def kernelforge_importers(self) -> list[ImporterSpec]:
            return [ImporterSpec("tied", Tied)]

    using = load_registry(entry_points=[], extra_plugins=[builtin, WithModel([lookup(), product()])])
    with output.use(fake_target.FakeOutput(using)):
        found, other = why(model="any")["problems"]
    shared = {"layout": "panels8", "unroll": 1}
    assert (found["config"], found["config_source"]) == (shared, "shared-layout")
    assert found["candidates"][0]["config"] == shared
    assert other["config_source"] == "default"
