"""A kernel variant: one way to run a problem on a target, with the configurations it can be tuned over."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from kernelforge.errors import KernelForgeError, PluginError, UsageError
from kernelforge.faults import failed
from kernelforge.lazy import Ref, resolve
from kernelforge.provenance import BUILTIN, Provenance

if TYPE_CHECKING:
    from kernelforge.problem import Problem

Config = Mapping[str, int | str]
"""A point of a config space: parameter name to value."""


def config_key(config: Config) -> str:
    """Canonical text of a config: JSON with sorted keys."""
    return json.dumps(dict(config), sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class Accept:
    """The variant can run the problem."""


@dataclass(frozen=True)
class Reject:
    """The variant cannot run the problem, and why, in words for `kernelforge why`."""

    reason: str


Arithmetic = Literal["f32", "int8"]
"""What a kernel multiplies."""

Verdict = Accept | Reject
"""What `supports` returns."""


INT8_ACTIVATIONS = "int8-activations"
"""The feature of devices on which products of quantised weights are fastest with quantised activations."""

ASYNCHRONOUS = "asynchronous"
"""The feature of devices that work on a run while the host goes on, if all its outputs stay on the device."""


@dataclass(frozen=True)
class DeviceInfo:
    """What selection may know of a device. It is data, so that choices for a device can be tested without it."""

    target: str
    name: str
    fingerprint: str
    """Stable text that tells apart devices whose measurements must not be mixed."""
    features: frozenset[str] = frozenset()
    """Optional abilities by the backend's names: "avx2", "avx512f", "shader-f16", "subgroup"; of the CPU also its core by LLVM's
    name ("znver5")."""
    limits: tuple[tuple[str, int], ...] = ()
    """Sorted (name, value) pairs: "l2_bytes", "vector_bytes", "max_workgroup_storage"."""
    threads: int = 1
    missing: tuple[tuple[str, str], ...] = ()
    """(ability, reason) of those that users may expect and that cannot be used: the reasons are told by `why` and `doctor`."""

    def limit(self, name: str, default: int = 0) -> int:
        return dict(self.limits).get(name, default)


@dataclass(frozen=True)
class ConfigSpace:
    """The legal configurations of a variant for one problem: a grid, less what the constraints forbid."""

    parameters: tuple[tuple[str, tuple[int | str, ...]], ...] = ()
    constraints: tuple[tuple[str, Callable[[Config], bool]], ...] = ()
    """(reason, predicate) pairs; a config is legal when every predicate holds."""

    def __post_init__(self) -> None:
        for name, values in self.parameters:
            if not values or len(set(values)) != len(values):
                raise PluginError(f"config parameter '{name}' needs distinct values, got {values}")

    def __iter__(self) -> Iterator[Config]:
        """Every legal config once, in the grid's order."""
        names = [name for name, _ in self.parameters]
        for values in product(*(values for _, values in self.parameters)):
            config = dict(zip(names, values, strict=True))
            if self.violation(config) is None:
                yield config

    @cached_property
    def grid_size(self) -> int:
        """Points of the grid, legal or not."""
        return prod(len(values) for _, values in self.parameters)

    def violation(self, config: Config) -> str | None:
        """Why `config` is not in this space, or None when it is."""
        if set(config) != {name for name, _ in self.parameters}:
            return f"has parameters {sorted(config)}, wants {sorted(name for name, _ in self.parameters)}"
        for name, values in self.parameters:
            if (type(config[name]), config[name]) not in [(type(v), v) for v in values]:  # 8.0 and True equal integers
                return f"{name}={config[name]!r} is not one of {values}"
        for reason, holds in self.constraints:
            if not holds(config):
                return reason
        return None

    def __contains__(self, config: Config) -> bool:
        return self.violation(config) is None


def no_choices(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    """The space of a variant that has nothing to tune."""
    return ConfigSpace()


def accept_all(problem: Problem, device: DeviceInfo) -> Verdict:
    """The `supports` of a variant that runs every problem of its op."""
    return Accept()


@dataclass(frozen=True)
class KernelVariant:
    """A way to run the problems of one op on one target."""

    name: str
    """Short, unique among the variants of (op, target)."""
    op: str
    """Full op name, `dialect.op`."""
    target: str
    build: Ref
    """`(problem, config, device_info) -> kernel`, in the form that the target's backend runs."""
    summary: str = ""
    supports: Ref = accept_all
    """`(problem, device_info) -> Accept | Reject`: whether it computes the problem correctly on that device."""
    space: Ref = no_choices
    """`(problem, device_info) -> ConfigSpace`."""
    default: Ref | None = None
    """`(problem, device_info) -> Config` of the space; None: the first legal config."""
    layouts: Ref | None = None
    """`(problem, config, device_info) -> Mapping[int, str]`: the layouts that constant operands are packed into, by index;
    those that it does not name are read as they are. Names as the backend keys packed constants by. A plan shares the
    copies of kernels that tell (`kernelforge.layouts`); None: not told."""
    priority: int = 0
    """Order among accepting variants when no measurement decides: highest first."""
    version: str = "1"
    """Changed with the kernel's code: records of another version are not used."""
    arithmetic: Arithmetic = "f32"
    """Which of the device's peaks its speed is compared with: "int8" for one that multiplies bytes."""
    provenance: Provenance = BUILTIN

    def __post_init__(self) -> None:
        if "." not in self.op:
            raise PluginError(f"variant '{self.name}': op '{self.op}' is not of the form dialect.op")
        if not self.name or any(c.isspace() for c in self.name):
            raise PluginError(f"variant name '{self.name}' must be one word")

    @property
    def key(self) -> str:
        return f"{self.target}/{self.op}/{self.name}"

    def judge(self, problem: Problem, device: DeviceInfo) -> Verdict:
        """`supports`, checked: anything but Accept or Reject is a PluginError that names the variant."""
        verdict = resolve(self.supports)(problem, device)
        if not isinstance(verdict, Accept | Reject):
            raise PluginError(f"variant '{self.key}': supports returned {verdict!r}, wants Accept() or Reject(reason)")
        return verdict

    def config_space(self, problem: Problem, device: DeviceInfo) -> ConfigSpace:
        """`space`, checked: anything but a ConfigSpace is a PluginError that names the variant."""
        found = resolve(self.space)(problem, device)
        if not isinstance(found, ConfigSpace):
            raise PluginError(f"variant '{self.key}': space returned {found!r}, wants a ConfigSpace")
        return found

    def default_config(self, problem: Problem, device: DeviceInfo) -> Config:
        """The config used without a record. Raises PluginError when it is not in the variant's own space."""
        space = self.config_space(problem, device)
        if self.default is None:
            return next(iter(space))
        config: Config = resolve(self.default)(problem, device)
        if (reason := space.violation(config)) is not None:
            raise PluginError(f"variant '{self.key}': its default config {config_key(config)} is illegal: {reason}")
        return config

    def packed_layouts(self, problem: Problem, config: Config, device: DeviceInfo) -> Mapping[int, str]:
        """`layouts`, checked: anything but layout names by operand index is a PluginError that names the variant. Empty
        when it is not told."""
        found = {} if self.layouts is None else resolve(self.layouts)(problem, config, device)
        if not isinstance(found, Mapping) or not all(
            isinstance(k, int) and isinstance(v, str) for k, v in found.items()
        ):
            raise PluginError(f"variant '{self.key}': layouts returned {found!r}, wants names by operand index")
        return found

    def build_kernel(self, problem: Problem, config: Config, device: DeviceInfo) -> Any:
        """The kernel, in the backend's form. Raises UsageError for a config that is not in the space, PluginError when
        `build` fails otherwise than by a KernelForgeError."""
        if (reason := self.config_space(problem, device).violation(config)) is not None:
            raise UsageError(f"variant '{self.key}': config {config_key(config)} is illegal: {reason}")
        try:
            return resolve(self.build)(problem, config, device)
        except KernelForgeError:
            raise
        except Exception as error:
            raise failed(f"variant '{self.key}'", self.provenance, f"cannot be built for {problem}", error) from error
