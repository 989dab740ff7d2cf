"""The text of pipelines: grammar, options, errors, round trip."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pytest

from kernelforge.descriptors import PassSpec
from kernelforge.errors import PluginError, UsageError
from kernelforge.passes import Pass, Pipeline
from kernelforge.passes.spec import parse_calls
from kernelforge.registry import Registry

if TYPE_CHECKING:
    from kernelforge.module import Module


class _Idle(Pass):
    def run(self, module: Module) -> None:
        """Leaves the module as it is."""


@dataclass(frozen=True)
class Plain(_Idle):
    name: ClassVar[str] = "plain"


@dataclass(frozen=True)
class Every(_Idle):
    name: ClassVar[str] = "every-kind"
    flag: bool = True
    count: int = 3
    rate: float = 0.5
    label: str = "x"
    mode: Literal["fast", "exact"] = "fast"
    level: Literal[1, 2] = 1


@dataclass(frozen=True)
class Needs(_Idle):
    name: ClassVar[str] = "needs"
    width: int


@dataclass(frozen=True)
class Odd(_Idle):
    name: ClassVar[str] = "odd"
    shape: tuple[int, ...] = field(default_factory=tuple)


@dataclass(frozen=True)
class Misnamed(_Idle):
    name: ClassVar[str] = "another-name"


def _registry(**passes: Any) -> Registry:
    specs = tuple(PassSpec(name.replace("_", "-"), load) for name, load in passes.items())
    plugins: Mapping[str, Any] = MappingProxyType({})
    return Registry(hooks={"kernelforge_passes": specs}, plugins=plugins)


REGISTRY = _registry(plain=Plain, every_kind=Every, needs=Needs, odd=Odd, misnamed=Misnamed, no_pass=int)


def test_calls() -> None:
    calls = parse_calls(' a , b-c{x=1 y="two words" z=}'.replace("z=", 'z=""') + ",a{ }")
    assert [(c.name, dict(c.options)) for c in calls] == [
        ("a", {}),
        ("b-c", {"x": "1", "y": "two words", "z": ""}),
        ("a", {}),
    ]
    assert parse_calls("  ") == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,", "wanted a pass name at column 3, found its end"),
        (",a", "wanted a pass name at column 1, found ',a'"),
        ("a b", "wanted a comma at column 3, found 'b'"),
        ("a{x}", "wanted option=value or } of pass 'a' at column 3, found 'x}'"),
        ("a{x=1", "wanted option=value or } of pass 'a' at column 6, found its end"),
        ("a{x=1,y=2}", "wanted option=value or } of pass 'a' at column 6, found ',y=2}'"),
        ("a}", "wanted a comma at column 2, found '}'"),
        ('a{x="\\q"}', "wanted a JSON string at column 5"),
        ("a{x=1 x=2}", "pass 'a' is given option 'x' twice"),
    ],
)
def test_syntax_errors(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        parse_calls(text)


def test_options_are_read_and_defaults_left_out() -> None:
    pipeline = Pipeline.parse('plain,every-kind{flag=false rate=2 label="a b" mode=exact level=2},plain{}', REGISTRY)
    assert pipeline.passes == (Plain(), Every(flag=False, rate=2.0, label="a b", mode="exact", level=2), Plain())
    assert str(pipeline) == 'plain,every-kind{flag=false rate=2.0 label="a b" mode=exact level=2},plain'
    assert str(Every()) == "every-kind"
    assert str(Needs(4)) == "needs{width=4}"
    assert Pipeline.parse("", REGISTRY) == Pipeline()
    assert str(Pipeline()) == ""


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("plane", "unknown pass 'plane'", "did you mean plain?"),
        ("zzz", "unknown pass 'zzz'", "one of: every-kind, misnamed, needs, no-pass, odd, plain"),
        ("every-kind{flog=true}", "pass 'every-kind' has no option 'flog'", "did you mean flag?"),
        ("plain{x=1}", "pass 'plain' has no option 'x'", "its options: none"),
        ("every-kind{flag=1}", "option 'flag' of pass 'every-kind' must be one of true, false, got '1'", None),
        ("every-kind{count=1.5}", "option 'count' of pass 'every-kind' must be a whole number, got '1.5'", None),
        ("every-kind{rate=high}", "option 'rate' of pass 'every-kind' must be a number, got 'high'", None),
        ("every-kind{mode=slow}", "option 'mode' of pass 'every-kind' must be one of fast, exact, got 'slow'", None),
        ("needs", "pass 'needs' needs option 'width'", "write needs{width=...}"),
    ],
)
def test_unknown_and_bad(text: str, message: str, hint: str | None) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        Pipeline.parse(text, REGISTRY)
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("odd{shape=1}", "pass 'odd': option 'shape' is of type tuple[int, ...]"),
        ("misnamed", "is not a Pass of that name"),
        ("no-pass", "is not a Pass of that name"),
    ],
)
def test_broken_plugin_passes(text: str, message: str) -> None:
    with pytest.raises(PluginError, match=re.escape(message)):
        Pipeline.parse(text, REGISTRY)


@pytest.mark.parametrize("seed", range(50))
def test_text_round_trip(seed: int) -> None:
    rng = random.Random(seed)
    letters = 'ab1 ={},"\\\n\té'

    def one() -> Pass:
        mode: Literal["fast", "exact"] = rng.choice(("fast", "exact"))
        level: Literal[1, 2] = rng.choice((1, 2))
        label = "".join(rng.choices(letters, k=rng.randrange(6)))
        every = Every(rng.random() < 0.5, rng.randrange(-9, 9), rng.choice((0.5, 1e-30, -2.5e20)), label, mode, level)
        return rng.choice((Plain(), every, Needs(rng.randrange(9))))

    pipeline = Pipeline(tuple(one() for _ in range(rng.randrange(5))))
    text = str(pipeline)
    assert Pipeline.parse(text, REGISTRY) == pipeline
    assert str(Pipeline.parse(text, REGISTRY)) == text
