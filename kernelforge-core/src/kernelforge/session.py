"""Module in, executable out: lower with the pass pipeline, select kernels, plan, compile for a target."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from kernelforge.constant import ArraySource
from kernelforge.errors import KernelForgeWarning
from kernelforge.passes import DEFAULT, Pipeline
from kernelforge.plan import Fusion, Plan
from kernelforge.plan_cache import cached_plan, code_stamp, keep_plan, plan_key
from kernelforge.problem import Problem
from kernelforge.problem_plan import problem_plan
from kernelforge.selection import Lookup, NoKernelError, RefusedError, Selection, select
from kernelforge.tune.records import RecordStore

if TYPE_CHECKING:
    import numpy as np

    from kernelforge.backend import Device, Executable, TensorSource
    from kernelforge.module import Function, Module
    from kernelforge.registry import Registry
    from kernelforge.roofline import Roofline
    from kernelforge.variant import Config

    Array = np.ndarray[Any, np.dtype[Any]]


class Session:
    """An opened device of a target, with the plugins and records that decide what runs on it. A context manager: it ends with
    `close`."""

    def __init__(
        self,
        target: str = "cpu",
        *,
        device: str | None = None,
        threads: int | None = None,
        registry: Registry | None = None,
        records: Lookup | None = None,
        variants: Mapping[str, str] | None = None,
        pipeline: str | None = None,
    ) -> None:
        """Open `device` of a target by name, the target's first when None, with the target's own number of threads unless told.

        `variants` names kernels by op (`{"transformer.matmul": "blocked"}`); what one of them refuses another runs, with a
        warning. `pipeline` is a pass pipeline's text, the default one when None; `records` answers for measurements, by default
        the user's own file; `registry` holds the plugins, by default those installed. Raises UsageError for an unknown target,
        device or pass, DeviceError where there is no such device, PluginError for a target whose plugin fails.
        """
        from kernelforge.registry import default_registry

        self.registry = registry if registry is not None else default_registry()
        self.target = target
        self.device: Device = self.registry.backend(target).open(device, threads=threads)
        self.records = records if records is not None else RecordStore.default()
        self.variants = dict(variants or {})
        self._pipeline_text = DEFAULT if pipeline is None else pipeline
        if pipeline is not None:
            _ = self.pipeline  # a bad text is an error here, not when something is compiled
        self._selections: dict[Problem, Selection] = {}
        self.fusions: dict[Problem, Fusion] = {}
        """What became of each fused problem, canonical, of all plans so far."""
        self._plugins_failed = False
        self._functions: dict[str, Function] = {}
        self._told: set[tuple[str, str]] = set()
        self._sought: set[str] = set()
        """Ops that a kernel was looked for."""

    @cached_property
    def pipeline(self) -> Pipeline:
        """The passes that modules are lowered with."""
        return Pipeline.parse(self._pipeline_text, self.registry)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the device. Executables of this session must not be run afterwards."""
        self.device.close()

    def roofline(self, *, again: bool = False) -> Roofline | None:
        """What the device can do at most; see `kernelforge.roofline.device_roofline`."""
        from kernelforge.roofline import device_roofline

        return device_roofline(self.device, self.registry, again=again)

    def named(self, op: str) -> str | None:
        """The variant of `variants` to run an op by, None where it has none."""
        self._sought.add(op)
        return self.variants.get(op)

    @property
    def unused_variants(self) -> dict[str, str]:
        """Those of `variants` whose ops were in nothing that was planned so far."""
        return {op: name for op, name in self.variants.items() if op not in self._sought}

    def select(self, problem: Problem) -> Selection:
        """The kernel for `problem` on this session's device, with the reasons: the one of `variants`, or another where that
        refuses the problem, with a warning. Raises UsageError when there is none."""
        problem = problem.canonical()
        if problem not in self._selections:
            named = self.named(problem.op)
            try:
                found = self._select(problem, named)
            except RefusedError as refused:
                found = self._select(problem, None)
                self._tell_refused(problem.op, str(refused))
            self._plugins_failed |= any(d.failed for d in found.decisions)
            self._selections[problem] = found
        return self._selections[problem]

    def _select(self, problem: Problem, variant: str | None) -> Selection:
        candidates = self.registry.variants(problem.op, self.target)
        try:
            return select(problem, candidates, self.device.info, self.records, variant=variant)
        except NoKernelError as error:
            self._plugins_failed |= error.plugin_failed
            raise

    def _tell_refused(self, op: str, reason: str) -> None:
        if (op, "refused") not in self._told:
            self._told.add((op, "refused"))
            warnings.warn(KernelForgeWarning(f"another kernel takes its place: {reason}"), stacklevel=4)

    def fusion(self, problem: Problem) -> Fusion:
        """Whether a problem of an op that stands for others runs whole, and why."""
        from kernelforge.fusion import weigh

        key = problem.canonical()
        if key not in self.fusions:
            self.fusions[key] = weigh(problem, self.registry, self.target, self.select, self.variants)
        return replace(self.fusions[key], dims=problem.dims)

    def lower(self, module: str | Module) -> Module:
        """Parse `module` if it is text, and run the pass pipeline over it. Raises UsageError for text that does not parse or
        verify, KernelForgeError when a pass fails."""
        from kernelforge.module import Module

        parsed = Module.parse(module, self.registry) if isinstance(module, str) else module
        return self.pipeline.run(parsed)

    def _function(self, module: str | Module) -> Function:
        if not isinstance(module, str):
            return self.lower(module).function()
        if module not in self._functions:  # one text is planned several times: for one token, for many
            self._functions[module] = self.lower(module).function()
        return self._functions[module]

    def plan(
        self,
        module: str | Module,
        *,
        dims: Mapping[str, int] | None = None,
        max_dims: Mapping[str, int] | None = None,
    ) -> Plan:
        """Lower `module` and plan it. `dims` fixes dynamic dimensions; `max_dims` says for which sizes of the others memory is
        reserved at the start. Raises as `lower`, and UsageError for an unknown dimension and an op that no kernel takes.

        The plan of a text is kept on disk; see `kernelforge.plan_cache`.
        """
        key = self._plan_key(module, dims, max_dims) if isinstance(module, str) else None
        if key is not None and (kept := cached_plan(key)) is not None:
            self._tell(kept.fusions)
            self._sought.update(step.problem.op for step in kept.steps)
            for step in kept.steps:
                if self.variants.get(step.problem.op, step.variant) != step.variant:
                    name = self.variants[step.problem.op]
                    self._tell_refused(step.problem.op, f"variant '{name}' cannot run {step.problem}")
            return kept
        plan = self.plan_function(self._function(module), dims=dims, max_dims=max_dims)
        if key is not None and not self._plugins_failed:
            keep_plan(key, plan)
        return plan

    def plan_function(
        self,
        function: Function,
        *,
        dims: Mapping[str, int] | None = None,
        max_dims: Mapping[str, int] | None = None,
    ) -> Plan:
        """Plan the function of a lowered module, as `plan` does for a text that was not planned before; the plan is not kept."""
        from kernelforge.layouts import share_layouts  # a start that finds its plans needs neither
        from kernelforge.planning import make_plan

        fusions: dict[Problem, Fusion] = {}

        def keep_whole(problem: Problem) -> bool:
            found = fusions[problem.canonical()] = self.fusion(problem)
            return not found.apart

        plan = make_plan(
            function,
            self.registry.ops,
            self.select,
            target=self.target,
            dims=dims,
            max_dims=max_dims,
            keep_whole=keep_whole,
        )
        plan, sound = share_layouts(plan, self.registry, self.device.info)
        self._plugins_failed |= not sound
        self._tell(fusions.values())
        return replace(plan, fusions=tuple(fusions.values()))

    def _tell(self, fusions: Iterable[Fusion]) -> None:
        """Warn, once for each op, of fused ops that give way to a kernel that was asked for by name."""
        for fusion in fusions:
            self.fusions[fusion.problem] = fusion
            op = fusion.problem.op
            if fusion.apart and fusion.forced and (op, "parts") not in self._told:
                self._told.add((op, "parts"))
                warnings.warn(KernelForgeWarning(f"{op} is run in parts: {fusion.reason}"), stacklevel=3)

    def _plan_key(self, text: str, dims: Mapping[str, int] | None, max_dims: Mapping[str, int] | None) -> str | None:
        code = code_stamp(self.registry)
        if code is None:
            return None
        return plan_key(
            text,
            self._pipeline_text,
            sorted((dims or {}).items()),
            sorted((max_dims or {}).items()),
            self.device.info.target,
            self.device.info.fingerprint,
            self.device.info.threads,
            sorted(self.device.info.features),
            self.device.info.limits,
            sorted(self.variants.items()),
            self.records.stamp(),
            code,
        )

    def compile(
        self,
        module: str | Module,
        *,
        constants: TensorSource | Mapping[str, Array] | None = None,
        dims: Mapping[str, int] | None = None,
        max_dims: Mapping[str, int] | None = None,
    ) -> Executable:
        """Lower, plan and build `module`. `constants` holds the tensors that its constant arguments name. Raises as `plan` and
        `build`."""
        return self.build(self.plan(module, dims=dims, max_dims=max_dims), constants)

    def build(self, plan: Plan, constants: TensorSource | Mapping[str, Array] | None = None) -> Executable:
        """Build a plan that was made for this session's target. Raises AssetError for a constant that is missing or of another
        shape or type, PluginError for a kernel that cannot be built or compiled."""
        source = ArraySource(constants or {}) if constants is None or isinstance(constants, Mapping) else constants
        return self.device.compile(plan, source, self.registry)

    def compile_problem(
        self,
        problem: Problem,
        *,
        constants: Mapping[str, Array] | None = None,
        variant: str | None = None,
        config: Config | None = None,
    ) -> Executable:
        """An executable of one op: inputs and constants are named by the op's operands, outputs by its results.

        `variant` and `config` force the kernel. Operands whose type says `constant` are taken from `constants`. For one
        that has gaps or another order of axes the input is the memory that it lies in: see `memory_of`.
        """
        problem = problem.canonical()
        forced = variant if variant is not None else self.named(problem.op)
        selection = select(
            problem,
            self.registry.variants(problem.op, self.target),
            self.device.info,
            self.records,
            variant=forced,
            config=config,
        )
        return self.build(problem_plan(problem, selection, self.registry), constants)
