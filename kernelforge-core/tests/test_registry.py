from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from kernelforge.backend import Catalog
from kernelforge.descriptors import BackendSpec, CommandSpec, DialectSpec, PassSpec
from kernelforge.errors import DeviceError, KernelForgeWarning, PluginError, UsageError
from kernelforge.hookspecs import hookimpl
from kernelforge.lazy import resolve
from kernelforge.op import OpDef, Operand
from kernelforge.plugins import load_registry
from kernelforge.registry import PluginStatus, Registry, default_registry, lookup
from kernelforge.variant import DeviceInfo, KernelVariant


class OneDevice:
    def devices(self) -> Sequence[DeviceInfo]:
        return (DeviceInfo("toy", "toy", "toy"),)


def broken_backend() -> OneDevice:
    raise OSError("no driver")


class BrokenBackend(OneDevice):
    def __init__(self) -> None:
        raise OSError("no driver")


def op(name: str) -> OpDef:
    nowhere = "nowhere:f"
    return OpDef(name, "", (Operand("x"),), ("out",), infer=nowhere, reference=nowhere, sample=nowhere, cost=nowhere)


def variant(name: str, **more: Any) -> KernelVariant:
    return KernelVariant(name, **{"op": "toy.double", "target": "toy", "build": "nowhere:f", **more})


def fallback(definition: OpDef) -> KernelVariant:
    return variant("fallback", op=definition.full_name)


class Toy:
    """A plugin with one of most things."""

    @hookimpl
    def kernelforge_dialects(self) -> list[DialectSpec]:
        return [DialectSpec("toy", lambda: None)]

    @hookimpl
    def kernelforge_passes(self) -> list[PassSpec]:
        return [PassSpec("shrink", "nowhere:Shrink")]

    @hookimpl
    def kernelforge_kernels(self) -> list[KernelVariant]:
        return [variant("b"), variant("fast", priority=5), variant("a"), variant("fast", target="other")]

    @hookimpl
    def kernelforge_backends(self) -> list[BackendSpec]:
        return [
            BackendSpec("toy", OneDevice, fallback=fallback),
            BackendSpec("instance", f"{__name__}:TOY_INSTANCE"),
            BackendSpec("broken", BrokenBackend),
            BackendSpec("missing", "no_such_package.backend:Backend"),
        ]

    @hookimpl
    def kernelforge_commands(self) -> list[CommandSpec]:
        return [CommandSpec("list", "nowhere:f", group="toys"), CommandSpec("play", "nowhere:f")]


TOY_INSTANCE = OneDevice()
OPS = (op("double"), op("halve"))


class ToyWithOps(Toy):
    @hookimpl
    def kernelforge_dialects(self) -> list[DialectSpec]:
        return [DialectSpec("toy", f"{__name__}:OPS")]


@pytest.fixture
def registry() -> Registry:
    return load_registry(entry_points=[], extra_plugins=[ToyWithOps()])


def test_descriptors_by_name(registry: Registry) -> None:
    assert list(registry.dialects) == ["toy"]
    assert list(registry.passes) == ["shrink"]
    assert list(registry.commands) == ["toys list", "play"]
    assert list(registry.backends) == ["toy", "instance", "broken", "missing"]
    assert not registry.tuners
    assert not registry.importers


def test_ops_know_their_dialect(registry: Registry) -> None:
    assert list(registry.ops) == ["toy.double", "toy.halve"]
    assert registry.ops["toy.halve"].dialect == "toy"


def test_registry_is_a_catalog(registry: Registry) -> None:
    catalog: Catalog = registry
    assert catalog.variant("toy", "toy.double", "fast").priority == 5


def test_registry_cannot_be_changed(registry: Registry) -> None:
    for mapping in (registry.plugins, registry.hooks, registry.passes, registry.commands, registry.ops):
        with pytest.raises(TypeError, match="does not support item assignment"):
            mapping["new"] = None  # type: ignore[index]  # which is the point
    with pytest.raises(AttributeError):
        registry.plugins = {}  # type: ignore[misc]  # which is the point


def test_variants_by_priority_and_name_with_the_fallback_last(registry: Registry) -> None:
    assert [v.name for v in registry.variants("toy.double", "toy")] == ["fast", "a", "b", "fallback"]
    assert [v.name for v in registry.variants("toy.halve", "toy")] == ["fallback"]
    assert [v.name for v in registry.variants("toy.double", "other")] == ["fast"]
    assert registry.variants("toy.unheard_of", "toy") == ()
    assert {v.provenance.plugin for v in registry.variants("toy.double", "toy")} == {"ToyWithOps"}


def test_unknown_variant_names_those_there_are(registry: Registry) -> None:
    with pytest.raises(UsageError, match=r"unknown variant 'fats' of toy\.double on target 'toy'") as caught:
        registry.variant("toy", "toy.double", "fats")
    assert caught.value.hint == "did you mean fast?"
    with pytest.raises(UsageError) as caught:
        registry.variant("toy", "toy.double", "xyz")
    assert caught.value.hint == "one of: a, b, fallback, fast"


def test_backends_are_made_once(registry: Registry) -> None:
    made = registry.backend("toy")
    assert isinstance(made, OneDevice)
    assert registry.backend("toy") is made


def test_backend_that_cannot_be_made(registry: Registry) -> None:
    with pytest.raises(
        PluginError, match=r"target 'broken' of plugin ToyWithOps .* cannot be loaded: OSError: no driver"
    ):
        registry.backend("broken")
    with pytest.raises(PluginError, match="ModuleNotFoundError: No module named 'no_such_package'"):
        registry.backend("missing")


def test_target_of_a_package_that_is_not_installed(registry: Registry) -> None:
    with pytest.raises(
        DeviceError, match="target 'gpu' comes with kernelforge-metal, which is not installed"
    ) as caught:
        registry.backend("gpu")
    assert caught.value.hint == "pip install kernelforge-metal, or use --target toy"
    assert caught.value.exit_code == 11


def test_unknown_target_lists_the_known_ones(registry: Registry) -> None:
    with pytest.raises(UsageError, match="unknown target 'tpu'") as caught:
        registry.backend("tpu")
    assert caught.value.hint == "one of: broken, cpu, gpu, instance, missing, toy"
    assert caught.value.exit_code == 2


def test_target_of_a_plugin_that_failed() -> None:
    status = PluginStatus("cpu", "kernelforge-cpu", "0.1.0", "failed", "ImportError: libfast")
    with pytest.raises(PluginError, match=r"target 'cpu' is not there: plugin 'cpu' .* failed: ImportError: libfast"):
        Registry({}, {"cpu": status}).backend("cpu")


def test_dialect_with_an_op_twice() -> None:
    class Twice(Toy):
        @hookimpl
        def kernelforge_dialects(self) -> list[DialectSpec]:
            return [DialectSpec("toy", f"{__name__}:TWICE")]

    with pytest.warns(KernelForgeWarning, match=r"dialect 'toy' of plugin Twice .* left out: it has op 'double' twice"):
        assert not load_registry(entry_points=[], extra_plugins=[Twice()]).ops


TWICE = (op("double"), op("double"))
NUMBERS = (7,)


@pytest.mark.parametrize(
    ("ops", "reason"),
    [
        ("no_such_package:OPS", "ModuleNotFoundError: No module named 'no_such_package'"),
        (f"{__name__}:TOYS", "has no attribute 'TOYS'"),
        (f"{__name__}:NUMBERS", "7 among its ops is no OpDef"),
        (lambda: None, "TypeError: 'function' object is not iterable"),
    ],
)
def test_dialect_that_fails_leaves_the_others(ops: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bad:
        @hookimpl
        def kernelforge_dialects(self) -> list[DialectSpec]:
            return [DialectSpec("bad", ops)]

    registry = load_registry(entry_points=[], extra_plugins=[Bad(), ToyWithOps()])
    with pytest.warns(KernelForgeWarning, match=rf"dialect 'bad' of plugin Bad .* is left out: .*{reason}") as caught:
        assert list(registry.ops) == ["toy.double", "toy.halve"]
    assert str(caught[0].message).endswith("; `kernelforge plugins disable Bad` leaves it out")
    monkeypatch.setenv("KERNELFORGE_PLUGINS_STRICT", "1")
    with pytest.raises(PluginError, match="dialect 'bad' of plugin Bad"):
        _ = load_registry(entry_points=[], extra_plugins=[Bad(), ToyWithOps()]).ops


def test_lookup_of_nothing() -> None:
    with pytest.raises(UsageError, match="unknown tuner 'grid'") as caught:
        lookup("tuner", {}, "grid")
    assert caught.value.hint == "there is none; a plugin may bring one"


def test_installed_plugins_all_load(recwarn: pytest.WarningsRecorder) -> None:
    registry = default_registry()
    assert {name: s.error for name, s in registry.plugins.items() if s.state != "loaded"} == {}
    assert not [w for w in recwarn if issubclass(w.category, KernelForgeWarning)]
    assert registry is default_registry()


def test_every_built_in_descriptor_is_there() -> None:
    """What core and the installed plugins name as "module:attr" exists."""
    registry = default_registry()
    for hook, descriptors in registry.hooks.items():
        for descriptor in descriptors:
            for attribute in ("load", "ops", "build", "supports", "space", "default", "fallback"):
                reference = getattr(descriptor, attribute, None)
                if reference is not None:
                    assert resolve(reference) is not None, (hook, descriptor)
