"""Passes over modules, and pipelines of them that are written as text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from kernelforge.errors import KernelForgeError, PluginError
from kernelforge.lazy import resolve
from kernelforge.passes.spec import PassCall, parse_calls, read_options, write_call
from kernelforge.registry import lookup

if TYPE_CHECKING:
    from kernelforge.module import Module
    from kernelforge.registry import Registry

DEFAULT = (
    "canonicalize,cse,fuse-glu,fuse-epilogue,fuse-qkv,fuse-add-norm,fuse-rope-cache,fuse-rope-attention,fuse-norm-quantize,"
    "fuse-norm-matmul,canonicalize,cse"
)
"""The text of the pipeline that modules are lowered with unless another one is asked for.

The order matters where two fusions want one op. Gated pairs come first: fuse-qkv would merge their matmuls.
Epilogues come before fuse-qkv, which merges only bare matmuls: a matmul gets its bias before it is merged, and keeps
its activation or residual rather than lose it to a merger. They also come before fuse-add-norm: where a matmul's result
goes into a sum and the sum into a norm, a matmul that adds in its epilogue and then a norm touch memory four times
(residual and sum read, sum and norm written), a plain matmul and then add_rms_norm five times. What no matmul could
take is left to fuse-add-norm. fuse-rope-attention builds on what fuse-rope-cache makes. fuse-norm-quantize takes what
norms are left after that and are read in 8 bits, fuse-norm-matmul norms and 8-bit activations whose one reader is a product,
when that has all it gets from the other passes.
"""


@dataclass(frozen=True)
class Pass(ABC):
    """A rewriting of modules. Subclasses are frozen dataclasses whose fields are the pass's options.

    Options are of type bool, int, float, str or Literal, and best have defaults. `str(pass)` is its text in a pipeline.
    """

    name: ClassVar[str]
    """As in pipelines: kebab-case, the same as its PassSpec's."""

    @abstractmethod
    def run(self, module: Module) -> None:
        """Rewrite `module` in place; its context is entered. The result must verify and compute the same."""

    def __str__(self) -> str:
        return write_call(self.name, self)


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. `str(pipeline)` is its text, which parses back."""

    passes: tuple[Pass, ...] = ()

    @classmethod
    def parse(cls, text: str, registry: Registry) -> Self:
        """Read `pass,pass{option=value}`; see `kernelforge.passes.spec` for the grammar.

        Raises UsageError for bad syntax, an unknown pass, an unknown or missing option and a value that does not fit;
        PluginError when a plugin's pass is not one.
        """
        return cls(tuple(_load(call, registry) for call in parse_calls(text)))

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    def run(self, module: Module, after: Callable[[Pass, Module], None] | None = None) -> Module:
        """The rewritten copy of `module`, which stays as it is.

        `after(pass, module)` is called with the module that each pass leaves; it must not change it. Raises
        KernelForgeError, naming the pass, when one fails or leaves a module that does not verify.
        """
        module = module.clone()
        for step in self.passes:
            _apply(step, module)
            if after is not None:
                after(step, module)
        return module


def _apply(step: Pass, module: Module) -> None:
    try:
        with module.context:
            step.run(module)
    except KernelForgeError as error:
        raise KernelForgeError(f"{_who(step)} failed: {error}", hint=error.hint) from error
    except Exception as error:
        raise PluginError(f"{_who(step)} failed: {type(error).__name__}: {error}") from error
    try:
        module.verify()
    except KernelForgeError as error:
        raise KernelForgeError(f"{_who(step)} left a broken module: {error}") from error


def _who(step: Pass) -> str:
    """The pass; one of a plugin with the package that it comes from."""
    package = type(step).__module__.partition(".")[0]
    return f"pass '{step}'" + ("" if package == __name__.partition(".")[0] else f" of {package}")


def _load(call: PassCall, registry: Registry) -> Pass:
    spec = lookup("pass", registry.passes, call.name)
    cls = resolve(spec.load)
    if not (isinstance(cls, type) and issubclass(cls, Pass) and cls.name == spec.name):
        raise PluginError(f"pass '{spec.name}' of {spec.provenance}: {spec.load} is not a Pass of that name")
    loaded: Pass = cls(**read_options(cls, call.name, call.options))
    return loaded
