"""What plugins may rely on is documented and tested: every hook, every public name, every block of code."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kernelforge import hookspecs
from kernelforge.descriptors import BackendSpec, CommandSpec, DialectSpec, ImporterSpec, PassSpec, TunerSpec
from kernelforge.hookspecs import GROUP, hookimpl
from kernelforge.plugins import DESCRIPTORS, core_registry, load_registry
from kernelforge.registry import default_registry
from kernelforge.scaffold import KINDS
from kernelforge.variant import KernelVariant
from kernelforge_llm.architecture import ArchitectureSpec

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
HOOKS = {
    name: function
    for module in (hookspecs, importlib.import_module("kernelforge_llm.hookspecs"))
    for name, function in vars(module).items()
    if inspect.isfunction(function) and hasattr(function, f"{GROUP}_spec")
}
SAMPLES: dict[str, Any] = {
    "kernelforge_kernels": KernelVariant("gate", "transformer.silu", "cpu", "gate:build"),
    "kernelforge_passes": PassSpec("gate", "gate:Pass"),
    "kernelforge_dialects": DialectSpec("gate", "gate:OPS"),
    "kernelforge_tuners": TunerSpec("gate", "gate:Tuner"),
    "kernelforge_backends": BackendSpec("gate", "gate:Backend"),
    "kernelforge_importers": ImporterSpec("gate", "gate:Importer"),
    "kernelforge_commands": CommandSpec("gate", "gate:verb"),
    "kernelforge_architectures": ArchitectureSpec("Gate", "gate", "gate:Architecture"),
}


def generated() -> ModuleType:
    """`docs/generate.py`."""
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = generated()
EVERY_HOOK = pytest.mark.parametrize("hook", HOOKS)


# --- hooks ---


def sections() -> dict[str, str]:
    """The sections of hooks.md whose heading is a hook, by heading."""
    text = (DOCS / "hooks.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)[1:]
    return {heading: body for heading, body in zip(parts[::2], parts[1::2], strict=True) if "`" in heading}


def signature(hook: str) -> str:
    returned = HOOKS[hook].__annotations__["return"]
    return f"`{hook}({', '.join(inspect.signature(HOOKS[hook]).parameters)}) -> {returned}`"


def test_there_are_sections_for_the_hooks_and_no_others() -> None:
    assert set(sections()) == {signature(hook) for hook in HOOKS}


@EVERY_HOOK
def test_its_section_has_the_contract_and_a_plugin(hook: str) -> None:
    section = sections()[signature(hook)]
    contract = inspect.cleandoc(HOOKS[hook].__doc__ or "")
    assert contract
    assert contract in section
    shown = [Path(path) for path in re.findall(r"<!-- include: (\S+) -->", section)]
    assert any(f"def {hook}(" in (ROOT / path).read_text(encoding="utf-8") for path in shown) or shown == [
        Path("kernelforge-llm/src/kernelforge_llm/importer.py")
    ]


@EVERY_HOOK
def test_it_is_called_and_what_it_returns_is_registered(hook: str) -> None:
    sample = SAMPLES[hook]
    function = hookimpl(lambda: [sample])
    plugin = ModuleType("gate")
    setattr(plugin, hook, function)
    assert isinstance(sample, DESCRIPTORS.get(hook, ArchitectureSpec))
    (found,) = [d for d in load_registry(extra_plugins=[plugin]).hooks[hook] if d.provenance.plugin == "gate"]
    assert found.name == sample.name


@EVERY_HOOK
def test_an_installed_plugin_implements_it(hook: str) -> None:
    owners = {d.provenance.distribution for d in default_registry().hooks[hook]}
    if hook in {kind.hook for kind in KINDS.values()}:
        assert any(owner.startswith("kernelforge-example-") for owner in owners)
    else:
        assert hook == "kernelforge_importers"  # the one of kernelforge-llm is the example
        assert owners


# --- names ---


def names() -> Iterator[tuple[str, str]]:
    for module in GENERATE.AUTHORS:
        for name in GENERATE.public_names(module):
            yield module, name


@pytest.mark.parametrize("module", GENERATE.AUTHORS)
def test_every_public_name_is_documented(module: str) -> None:
    lacking = [name for name, (_, text) in GENERATE.public_names(module).items() if not text]
    assert not lacking
    assert importlib.import_module(module).__doc__


def test_every_class_and_function_is_used_by_a_test() -> None:
    used = set(used_names())
    callables = [(m, n) for m, n in names() if callable(getattr(importlib.import_module(m), n)) and defined(m, n)]
    assert [f"{m}.{n}" for m, n in callables if (m, n) not in used and n not in HOOKS] == []


def defined(module: str, name: str) -> bool:
    """Whether it is a class or function of that module; types that only have a name there are not."""
    of = getattr(importlib.import_module(module), name)
    return inspect.isclass(of) or inspect.isfunction(of)


def defining(module: str, name: str) -> str:
    """The module that defines what another one lends its name to, such as `kernelforge_cpu.emit`."""
    lent = getattr(importlib.import_module(module), name, None) if module.startswith("kernelforge_cpu.") else None
    return str(getattr(lent, "__module__", module)) if inspect.isclass(lent) or inspect.isfunction(lent) else module


def used_names() -> Iterator[tuple[str, str]]:
    """(module, name) of what the tests refer to."""
    for folder in (*ROOT.glob("kernelforge-*/tests"), *ROOT.glob("plugins-example/*/tests"), ROOT / "tests"):
        for file in folder.rglob("*.py"):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            imported: dict[str, tuple[str, str]] = {}
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.module:
                    imported.update({a.asname or a.name: (defining(node.module, a.name), a.name) for a in node.names})
            for node in ast.walk(tree):
                if isinstance(node, ast.Name) and node.id in imported:
                    yield imported[node.id]
                elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    module, name = imported.get(node.value.id, ("", ""))
                    yield f"{module}.{name}", node.attr


# --- code ---


def loose_code() -> Iterator[tuple[str, str]]:
    """Python blocks that come neither from a file nor, as those of the tutorial, go into one."""
    block = re.compile(r"(<!-- (?:include|file): \S+ -->\n)?^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))):
        for number, match in enumerate(block.finditer(page.read_text(encoding="utf-8"))):
            if not match[1]:
                yield f"{page.name}-{number}", match[2]


@pytest.mark.parametrize("code", [pytest.param(code, id=name) for name, code in loose_code()])
def test_code_runs(code: str, tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_pages_made_from_code_are_fresh(tmp_path: Path) -> None:
    assert list(GENERATE.stale_pages(DOCS, fix=False)) == []
    pages: dict[str, Callable[[], str]] = GENERATE.PAGES
    for name in pages:
        (tmp_path / name).write_text("old")
    assert len(list(GENERATE.stale_pages(tmp_path, fix=False))) == len(pages)
    assert list(GENERATE.stale_pages(tmp_path, fix=True)) == []
    assert list(GENERATE.stale_pages(tmp_path, fix=False)) == []


def test_every_op_has_a_section() -> None:
    headings = re.findall(r"^## (.*)$", (DOCS / "ops.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings == [op.name for op in core_registry().ops.values()]
