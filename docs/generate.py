"""The pages that are made from the code: `ops.md` from the ops' definitions, `api.md` from signatures and docstrings."""

from __future__ import annotations

import ast
import importlib
import inspect
import random
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path

from kernelforge.lazy import resolve
from kernelforge.op import OpDef
from kernelforge.plugins import core_registry

NOTE = "<!-- Made by `python docs/build.py --fix`: do not edit. -->\n"

AUTHORS = (
    "kernelforge.hookspecs",
    "kernelforge.descriptors",
    "kernelforge.variant",
    "kernelforge.problem",
    "kernelforge.op",
    "kernelforge.graph",
    "kernelforge.module",
    "kernelforge.session",
    "kernelforge.passes",
    "kernelforge.passes.rewriting",
    "kernelforge.tune.tuner",
    "kernelforge.backend",
    "kernelforge.roofline",
    "kernelforge.importer",
    "kernelforge.testing",
    "kernelforge.cli.output",
    "kernelforge.errors",
    "kernelforge_cpu.authoring",
    "kernelforge_cpu.kernel",
    "kernelforge_cpu.emit",
    "kernelforge_cpu.builder",
    "kernelforge_cpu.pointer",
    "kernelforge_cpu.ssa",
    "kernelforge_cpu.vmath",
    "kernelforge_metal.authoring",
    "kernelforge_metal.kernel",
    "kernelforge_llm.hookspecs",
    "kernelforge_llm.architecture",
)
"""The modules whose public names are there for those who write plugins."""


def ops_page() -> str:
    ops = core_registry().ops.values()
    return "\n".join(
        [
            "# Ops",
            "",
            NOTE,
            "The ops of the `transformer` dialect, as `kernelforge.op.OpDef` defines them. `?` marks operands that may be",
            "absent, `...` those of which there are several. Kernels are compared with the numpy reference, in float64. The",
            "last line of each is one of its problems, as `kernelforge why --problem` takes them.",
            "",
            *(line for op in ops for line in _op(op)),
        ]
    )


def _op(op: OpDef) -> Iterator[str]:
    marks = {(True, False): "?", (False, True): "..."}
    operands = ", ".join(o.name + marks.get((o.optional, o.variadic), "") for o in op.operands)
    results = ", ".join(name.removeprefix("*") + ("..." if name.startswith("*") else "") for name in op.results)
    yield from (f"## {op.name}", "", f"`{op.full_name}({operands}) -> {results}`", "", op.summary, "")
    if text := _docstring(resolve(op.reference)):
        yield from (f"Reference: {text}", "")
    for result, operand in op.in_place:
        yield from (f"Works in place: `{op.results[result]}` is the memory of `{op.operands[operand].name}`.", "")
    if op.attributes:
        yield from ("| attribute | kind | default | |", "|---|---|---|---|")
        for a in op.attributes:
            allowed = f"one of {', '.join(a.choices)}" if a.choices else ""
            default = "required" if a.default is None else f"`{_literal(a.default)}`"
            yield f"| `{a.name}` | {a.kind} | {default} | {'; '.join(filter(None, (a.doc, allowed)))} |"
        yield ""
    yield from (f"    {next(op.samples(random.Random(0)))}", "")


def _literal(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


def api_page() -> str:
    return "\n".join(
        [
            "# What plugins import",
            "",
            NOTE,
            "The modules that are there for those who write plugins, with every public name in them.",
            "",
            *(line for module in AUTHORS for line in _module(module)),
        ]
    )


def _module(name: str) -> Iterator[str]:
    module = importlib.import_module(name)
    yield from (f"## {name}", "", _docstring(module), "")
    for public, (signature, text) in public_names(name).items():
        yield from (f"### {public}", "", f"`{signature}`", "", text, "")
        of = getattr(module, public)
        if isinstance(of, type) and of.__module__ == name:
            bases = takewhile(_has_no_section, of.__mro__[1:])
            lines = [*_members(of), *(line for base in bases for line in _members(base, made=False))]
            yield from (*lines, *[""] * bool(lines))


def _has_no_section(cls: type) -> bool:
    return cls.__module__.startswith("kernelforge") and cls.__module__ not in AUTHORS


def _members(cls: type, *, made: bool = True) -> Iterator[str]:
    """Fields, how it is made if that is asked, and public methods, each with the first paragraph of what is said of it."""
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    for statement, following in zip(definition.body, [*definition.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign):
            name, code, text = ast.unparse(statement.target), ast.unparse(statement), _literal_docstring(following)
        elif isinstance(statement, ast.FunctionDef):
            name, code, text = statement.name, _member(statement), _prose(ast.get_docstring(statement) or "")
            if name == "__init__" and made:
                name, code = cls.__name__, code.replace("__init__", cls.__name__, 1).removesuffix(" -> None")
        else:
            continue
        if not name.startswith("_"):
            first = " ".join(text.split("\n\n")[0].split())
            yield f"- `{code}`" + (f": {first}" if first else "")


def public_names(module_name: str) -> Mapping[str, tuple[str, str]]:
    """Signature and docstring of every public name that a module defines, in its order; "" where one lacks."""
    module = importlib.import_module(module_name)
    found: dict[str, tuple[str, str]] = {}
    body = ast.parse(inspect.getsource(module)).body
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, (ast.ClassDef, ast.FunctionDef)):
            names, signature = [statement.name], _signature(statement)
            text = _docstring(getattr(module, statement.name))
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names = [t.id for t in targets if isinstance(t, ast.Name)]
            signature, text = ast.unparse(statement), _literal_docstring(following)
        else:
            continue
        found.update({name: (signature, text) for name in names if not name.startswith("_")})
    return found


def _member(statement: ast.FunctionDef) -> str:
    """A method as it is called, or a property as it is read."""
    decorators = {ast.unparse(d) for d in statement.decorator_list}
    if decorators & {"property", "cached_property"}:
        return f"{statement.name}: {ast.unparse(statement.returns) if statement.returns else 'Any'}"
    if "staticmethod" not in decorators:
        statement.args.args = statement.args.args[1:]
    return _signature(statement)


def _signature(statement: ast.ClassDef | ast.FunctionDef) -> str:
    if isinstance(statement, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, statement.bases))
        return f"class {statement.name}({bases})" if bases else f"class {statement.name}"
    returns = f" -> {ast.unparse(statement.returns)}" if statement.returns else ""
    return f"{statement.name}({ast.unparse(statement.args)}){returns}"


def _literal_docstring(statement: ast.stmt | None) -> str:
    """The string under an assignment."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return _prose(inspect.cleandoc(str(statement.value.value)))
    return ""


def _docstring(of: object) -> str:
    own = of.__dict__.get("__doc__") if isinstance(of, type) else getattr(of, "__doc__", None)
    if own is None or (isinstance(of, type) and own.startswith(f"{of.__name__}(")):
        return ""  # a dataclass without a docstring is given its signature
    return _prose(inspect.cleandoc(own))


def _prose(text: str) -> str:
    """Indented text of a docstring is code; what looks like HTML is none."""
    return re.sub(r"<(?=\w)", r"\\<", text)


PAGES: Mapping[str, Callable[[], str]] = {"ops.md": ops_page, "api.md": api_page}


def stale_pages(folder: Path, *, fix: bool) -> Iterator[str]:
    """Say which of the pages in `folder` are not what the code says, or with `fix` write them."""
    for name, make in PAGES.items():
        page, text = folder / name, make()
        if page.exists() and page.read_text(encoding="utf-8") == text:
            continue
        if fix:
            page.write_text(text, encoding="utf-8", newline="\n")
        else:
            yield f"{folder.name}/{name}: the code it is made from has changed; python docs/build.py --fix"
