"""One copy of a constant for all the steps that read it.

A kernel packs a constant into a layout of its own, so that one with two readers may be kept twice: a table of embeddings
that is the output head, too, in rows for the lookup and in panels for the product. A kernel that can read a constant as it
is, and also as others pack it, says so (`KernelVariant.layouts`) and follows them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kernelforge.faults import leave_out
from kernelforge.variant import config_key

if TYPE_CHECKING:
    from kernelforge.backend import Catalog
    from kernelforge.plan import Plan, Step
    from kernelforge.variant import Config, DeviceInfo, KernelVariant

AS_IT_IS = ""
"""The layout of a constant that is not packed."""


@dataclass(frozen=True)
class _Kernel:
    """A kernel of the plan that tells its layouts."""

    step: Step
    """The first one that it runs."""
    variant: KernelVariant
    device: DeviceInfo
    layouts: Mapping[int, str]
    by_default: Mapping[int, str]
    """The layouts with the variant's default config."""

    def follows(self, operand: int) -> bool:
        """Whether others decide on the layout: by default it reads the constant as it is."""
        return operand not in self.by_default

    def config(self, operand: int, layout: str) -> Config | None:
        """The config nearest to the step's that reads the constant in `layout`, and the other operands as before."""
        problem, have = self.step.problem, self.step.config
        wanted = {**self.layouts, operand: layout}
        found = [
            c
            for c in self.variant.config_space(problem, self.device)
            if {operand: AS_IT_IS, **self.variant.packed_layouts(problem, c, self.device)} == wanted
        ]
        return max(found, key=lambda c: sum(c[name] == value for name, value in have.items()), default=None)


def share_layouts(plan: Plan, catalog: Catalog, device: DeviceInfo) -> tuple[Plan, bool]:
    """The plan with configs by which followers read each constant in a layout that another step needs, or as it is when
    none does. False beside it: a variant failed to tell its layouts, and its kernels stay as they are, with a warning.
    """
    kernels: dict[tuple[str, str, str, str], _Kernel | None] = {}
    failed: set[str] = set()
    readers: dict[str, list[tuple[int, int, _Kernel]]] = {}
    for i, step in enumerate(plan.steps):
        kernel = _kernel(step, plan.target, catalog, device, kernels, failed)
        for k, value in enumerate(step.operands):
            constant = None if value is None else plan.values[value].constant
            if constant is not None and kernel is not None:
                readers.setdefault(constant.key, []).append((i, k, kernel))
    steps = list(plan.steps)
    settled: dict[int, _Kernel] = {}
    """Kernels of steps that follow already, with what they then read."""
    for found in readers.values():
        needed = Counter(kernel.layouts.get(k, AS_IT_IS) for _, k, kernel in found if not kernel.follows(k))
        layouts = [layout for layout, _ in needed.most_common() if layout != AS_IT_IS]
        for i, k, first in found:
            kernel = settled.get(i, first)
            if kernel.follows(k) and (config := _followed(kernel, k, layouts, failed)) is not None:
                steps[i] = replace(steps[i], config=config, config_source="shared-layout")
                read = kernel.variant.packed_layouts(steps[i].problem, config, device)
                settled[i] = replace(kernel, step=steps[i], layouts=read)
    return replace(plan, steps=tuple(steps)), not failed


def _kernel(
    step: Step,
    target: str,
    catalog: Catalog,
    device: DeviceInfo,
    known: dict[tuple[str, str, str, str], _Kernel | None],
    failed: set[str],
) -> _Kernel | None:
    """None for one that does not tell its layouts."""
    key = (str(step.problem), step.variant, config_key(step.config), step.config_source)
    if key not in known:
        known[key] = None
        variant = catalog.variant(target, step.problem.op, step.variant)
        if variant.layouts is not None and variant.key not in failed:
            try:
                default = variant.default_config(step.problem, device)
                layouts = [variant.packed_layouts(step.problem, c, device) for c in (step.config, default)]
                known[key] = _Kernel(step, variant, device, *layouts)
            except Exception as error:
                _leave_out(variant, error, failed)
    return known[key]


def _followed(kernel: _Kernel, operand: int, layouts: list[str], failed: set[str]) -> Config | None:
    """The config that reads the constant in the first of `layouts` that the kernel can read, else as it is; None when that
    is the one it has."""
    for layout in (*layouts, AS_IT_IS):
        if layout == kernel.layouts.get(operand, AS_IT_IS):
            return None
        try:
            if (config := kernel.config(operand, layout)) is not None:
                return config
        except Exception as error:
            _leave_out(kernel.variant, error, failed)
            return None
    return None


def _leave_out(variant: KernelVariant, error: Exception, failed: set[str]) -> None:
    leave_out(f"'layouts' of variant '{variant.key}'", variant.provenance, error)
    failed.add(variant.key)
