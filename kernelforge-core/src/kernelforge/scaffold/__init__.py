"""What `kernelforge plugins new` writes: a package of each kind, from the templates beside this file.

A template is a `string.Template`, and so is its file's name; `common/` is part of every package, `<kind>/` has its modules and
`test.py`.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

from kernelforge import __version__
from kernelforge.errors import AssetError, UsageError

SUFFIX = ".tmpl"
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
LONGEST = 32
"""Characters of a name: code lines with longer ones would not fit."""


@dataclass(frozen=True)
class Kind:
    """What packages of a kind have in common."""

    hook: str
    registers: str
    """The template of the name that is registered, as `plugins info` shows it."""
    summary: str
    needs: tuple[str, ...] = ()
    """Distributions besides kernelforge-core."""
    setup: str = ""
    """Steps of the workflow before the tests."""


SOFTWARE_GPU = """\
      - name: Install a software Vulkan driver
        if: runner.os == 'Linux'
        run: sudo apt-get update && sudo apt-get install -y --no-install-recommends mesa-vulkan-drivers libvulkan1
"""

KERNELS: Mapping[str, Kind] = {
    "cpu": Kind(
        "kernelforge_kernels",
        "cpu/transformer.silu/$identifier",
        "A kernel for KernelForge's cpu target.",
        ("kernelforge-cpu",),
    ),
    "gpu": Kind(
        "kernelforge_kernels",
        "gpu/transformer.silu/$identifier",
        "A kernel for KernelForge's gpu target.",
        ("kernelforge-metal",),
        SOFTWARE_GPU,
    ),
}
"""By target; the templates of all but the default one, the first, are in `kernel-TARGET/`."""

KINDS: Mapping[str, Kind] = {
    "kernel": KERNELS["cpu"],
    "pass": Kind("kernelforge_passes", "$name", "A compiler pass for KernelForge."),
    "dialect": Kind("kernelforge_dialects", "$identifier", "A dialect for KernelForge."),
    "tuner": Kind("kernelforge_tuners", "$name", "A search strategy for KernelForge's autotuning."),
    "backend": Kind("kernelforge_backends", "$name", "A target for KernelForge."),
    "command": Kind("kernelforge_commands", "$name", "A verb of the kernelforge command."),
    "architecture": Kind(
        "kernelforge_architectures",
        "${title}ForCausalLM",
        "A model architecture for KernelForge.",
        ("kernelforge-llm",),
    ),
}


@dataclass(frozen=True)
class Scaffold:
    """A package to be written. Raises UsageError for an unknown kind or target, or a name that a package cannot have."""

    name: str
    """Kebab-case; the distribution is kernelforge-NAME, the import name kernelforge_NAME, the entry point NAME."""
    kind: str
    target: str | None = None
    """What a kernel is for: one of KERNELS, None for its first. Other kinds have none."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"unknown kind of plugin '{self.kind}'", hint=f"one of: {', '.join(KINDS)}")
        if self.target is not None and self.kind != "kernel":
            raise UsageError(
                f"a plugin of kind '{self.kind}' is not written for one target",
                hint="leave out --target, or choose --kind kernel",
            )
        if self.target is not None and self.target not in KERNELS:
            raise UsageError(
                f"no kernel can be written for target '{self.target}'", hint=f"one of: {', '.join(KERNELS)}"
            )
        if not NAME.fullmatch(self.name):
            raise UsageError(
                f"'{self.name}' cannot name a plugin", hint="lower-case words joined by hyphens, such as fast-silu"
            )
        if self.name.startswith("kernelforge"):
            raise UsageError(f"'{self.name}' repeats what comes before every name", hint="leave 'kernelforge' out")
        if len(self.name) > LONGEST or keyword.iskeyword(self.name):
            reason = "is a word of Python's" if keyword.iskeyword(self.name) else f"is longer than {LONGEST} characters"
            raise UsageError(f"'{self.name}' cannot name a plugin: it {reason}", hint="choose another name")

    @property
    def distribution(self) -> str:
        return f"kernelforge-{self.name}"

    @property
    def made(self) -> Kind:
        """What packages like it have in common."""
        return KERNELS[self.target] if self.target is not None else KINDS[self.kind]

    @property
    def registers(self) -> str:
        """The name of what it registers, which must be free."""
        return Template(self.made.registers).substitute(self._values)

    @property
    def _values(self) -> Mapping[str, str]:
        kind = self.made
        identifier = self.name.replace("-", "_")
        major, minor = __version__.split(".")[:2]
        core = f">={major}.{minor},<{major}.{int(minor) + 1}"
        return {
            "name": self.name,
            "identifier": identifier,
            "title": "".join(word.capitalize() for word in self.name.split("-")),
            "distribution": self.distribution,
            "package": f"kernelforge_{identifier}",
            "summary": kind.summary,
            "dependencies": "\n".join(f'    "{needed}{core}",' for needed in ("kernelforge-core", *kind.needs)),
            "setup": kind.setup,
        }

    def texts(self) -> dict[str, str]:
        """Every file of the package: its path in the folder, and what it holds."""
        values = self._values
        code = f"src/{values['package']}"
        folder = self.kind if self.made is KINDS[self.kind] else f"{self.kind}-{self.target}"
        found = {
            ".github/workflows/ci.yml": _template("common", "ci.yml"),
            ".gitignore": _template("common", "gitignore"),
            "README.md": _template("common", "README.md"),
            "pyproject.toml": _template("common", "pyproject.toml"),
            f"{code}/__init__.py": _template("common", "init.py"),
            f"{code}/py.typed": Template(""),
            f"tests/test_{values['identifier']}.py": _template(folder, "test.py"),
            **{f"{code}/{Template(file).substitute(values)}": _template(folder, file) for file in _modules(folder)},
        }
        return {path: found[path].substitute(values) for path in sorted(found)}

    def write(self, folder: Path) -> list[Path]:
        """Write the package into `folder/DISTRIBUTION` and return its files.

        Raises UsageError when that is there already, AssetError when it cannot be written.
        """
        root = folder / self.distribution
        if root.exists():
            raise UsageError(f"{root} is there already", hint="choose another name, or another --folder")
        written: list[Path] = []
        try:
            for path, text in self.texts().items():
                written.append(root / path)
                written[-1].parent.mkdir(parents=True, exist_ok=True)
                written[-1].write_text(text, encoding="utf-8", newline="\n")
        except OSError as error:
            raise AssetError(f"cannot write {written[-1]}: {error.strerror or error}") from None
        return written


def _template(folder: str, name: str) -> Template:
    return Template((files(__name__) / folder / f"{name}{SUFFIX}").read_text(encoding="utf-8"))


def _modules(folder: str) -> Iterator[str]:
    for item in (files(__name__) / folder).iterdir():
        if item.name.endswith(SUFFIX) and item.name != f"test.py{SUFFIX}":
            yield item.name.removesuffix(SUFFIX)
