"""Cooperative matrices: products of small matrices that a subgroup computes together (tensor cores, `simdgroup_matrix`).

WGSL has them by `enable wgpu_cooperative_matrix`, an experimental feature of wgpu that has been wrong before: what it wrote for
Metal took rows for columns (wgpu pull request 9451). So nothing here is believed: a kind of matrices is used on a device only
after one product of it, written in the way kernels write it, gave the right numbers there.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from kernelforge import home
from kernelforge.errors import KernelForgeError, KernelForgeWarning
from kernelforge.variant import DeviceInfo
from kernelforge_metal.adapters import COOPERATIVE, SOFTWARE, Adapter
from kernelforge_metal.encoder import Region
from kernelforge_metal.errors import DeviceLost, OutOfMemory
from kernelforge_metal.kernel import extensions
from kernelforge_metal.wgsl import F16, SUBGROUP, SUBGROUP_IDS

if TYPE_CHECKING:
    from pathlib import Path

    from kernelforge_metal.native import Gpu

    Array = np.ndarray[Any, np.dtype[Any]]

Multiply = Callable[[str, "Array"], "Array"]
"""Runs a shader on the numbers in `x` and returns those in `y`, both f32 arrays of the same length."""

THREADS = 128
"""Of the feature test: several subgroups on every GPU."""

NONE = "the adapter has no cooperative matrices"
"""Why there are none, where nothing else is known."""

NOT_TRIED = "cooperative matrices were not tried this time"

LOST = "the test lost the device"
"""Kept after the first time, which may have had another cause."""


@dataclass(frozen=True)
class Matrices:
    """`size` x `size` numbers of type `scalar`, with sums in f32."""

    size: int
    scalar: str
    """f32 or f16."""
    loads_turned: bool = False
    """Whether loading takes rows for columns: see the head of this file."""
    stores_turned: bool = False

    @property
    def key(self) -> str:
        """The name of the limit by which a device tells of them; its value is `form`."""
        return f"{COOPERATIVE}-{self.scalar}-{self.size}"

    @property
    def form(self) -> int:
        """Bits: `loads_turned` and `stores_turned`."""
        return self.loads_turned + 2 * self.stores_turned

    def type(self, role: str) -> str:
        """The type of left ("A") and right ("B") factors and of sums ("C")."""
        return f"coop_mat{self.size}x{self.size}<{'f32' if role == 'C' else self.scalar}, {role}>"

    def load(self, role: str, first: str, step: int, *, by_rows: bool) -> str:
        """The matrix at `first`, an element of an array in workgroup memory, whose rows, or else columns, are `step` apart."""
        turned = "T" if by_rows != self.loads_turned else ""
        return f"coopLoad{turned}<{self.type(role)}>(&{first}, {step}u)"

    def store(self, value: str, first: str, step: int) -> str:
        """A statement that writes sums by rows."""
        return f"coopStore{'' if self.stores_turned else 'T'}({value}, &{first}, {step}u);"


def usable(device: DeviceInfo, scalar: str) -> Matrices | None:
    """The largest matrices of that type that gave right numbers on a device."""
    for size in (16, 8):
        kind = Matrices(size, scalar)
        if (form := device.limit(kind.key, -1)) >= 0:
            return replace(kind, loads_turned=bool(form & 1), stores_turned=bool(form & 2))
    return None


def candidates(adapter: Adapter) -> tuple[Matrices, ...]:
    """The kinds to try. wgpu does not tell which ones an adapter has, and a driver may do anything with one that it has not:
    Apple's GPUs have 8 x 8, Mesa's software GPU too, others through Vulkan f16 of 16 x 16."""
    if adapter.api == "Metal" or adapter.kind == SOFTWARE:
        return Matrices(8, "f32"), Matrices(8, "f16")
    return (Matrices(16, "f16"),)


def examine(gpu: Gpu, adapter: Adapter) -> DeviceInfo:
    """What selection may know of an opened device. The first time, its cooperative matrices are tried; what came of it is kept
    in the cache folder, for this adapter, driver, wgpu and text of the test. A device that computes wrongly has none, with a
    warning; one that has no memory for the test has none this time.

    Raises DeviceLost when the test loses the device. The next start tries again, the one after a second loss does without.
    """
    info = replace(adapter, features=gpu.features).info
    if COOPERATIVE not in gpu.features:
        refused = gpu.refused.get(COOPERATIVE)
        return _without(info, NONE if refused is None else f"wgpu does not hand out cooperative matrices: {refused}")
    if not {SUBGROUP, F16} <= gpu.features:
        return _without(info, f"cooperative matrices are used with {SUBGROUP} and {F16} only")
    kinds = candidates(adapter)
    key = "\0".join((info.fingerprint, gpu.version, *map(trial_shader, kinds)))
    found = _kept(key, kinds)
    lost_before = found is not None and LOST in found.values()
    if found is None or lost_before:
        again = f"delete {_file(key)} to try again"
        # A driver may end the process: then the next start must not try again.
        _keep(key, {kind.key: f"the test did not end; {again}" for kind in kinds})
        try:
            found = tried(kinds, lambda code, x: multiply(gpu, code, x))
        except OutOfMemory as error:
            _file(key).unlink(missing_ok=True)
            warnings.warn(KernelForgeWarning(f"{NOT_TRIED}: {error}"), stacklevel=3)
            return _without(info, f"{NOT_TRIED}: {error}")
        except DeviceLost:
            _keep(
                key, {kind.key: f"the test lost the device twice; {again}" if lost_before else LOST for kind in kinds}
            )
            raise
        _keep(key, found)
        if wrong := {name: text for name, text in found.items() if isinstance(text, str)}:
            told = "; ".join(f"{name}: {text}" for name, text in wrong.items())
            warnings.warn(KernelForgeWarning(f"{info.name}: the feature test failed, {told}"), stacklevel=3)
    forms = {name: form for name, form in found.items() if isinstance(form, int)}
    if not forms:
        return _without(info, "feature test failed: " + "; ".join(f"{name}: {text}" for name, text in found.items()))
    limits = tuple(sorted({**dict(info.limits), **forms}.items()))
    return replace(info, features=info.features | {COOPERATIVE}, limits=limits)


def _without(info: DeviceInfo, reason: str) -> DeviceInfo:
    return replace(info, missing=((COOPERATIVE, reason),))


def tried(kinds: Sequence[Matrices], run: Multiply) -> dict[str, int | str]:
    """For each kind, by its key, the form in which it gives the right numbers, or what is wrong with it. Raises OutOfMemory
    and DeviceLost, which say nothing of the matrices."""
    return {kind.key: _form(kind, run) for kind in kinds}


def _form(kind: Matrices, run: Multiply) -> int | str:
    n, numbers = kind.size, np.random.default_rng(0)
    left, right = (numbers.integers(-8, 9, (n, n)).astype(np.float32) for _ in range(2))
    expected = 2 * left @ right
    for stores, loads in product((False, True), repeat=2):
        form = replace(kind, loads_turned=loads, stores_turned=stores)
        try:
            got = run(trial_shader(form), np.concatenate([left.T.ravel(), right.ravel()]))[: n * n].reshape(n, n)
        except (OutOfMemory, DeviceLost):
            raise
        except KernelForgeError as error:
            return f"does not run: {error}"
        if np.array_equal(got, expected):
            return form.form
    return f"wrong numbers, by up to {np.abs(got - expected).max():g} of {np.abs(expected).max():g}"


def trial_shader(kind: Matrices) -> str:
    """Twice the product of two matrices in `x`, the left one by columns, the right one by rows, as the GEMM kernel computes
    its own: through workgroup memory, in rounds of as many subgroups as there are."""
    n = kind.size
    text = f"""{SUBGROUP_IDS}
@group(0) @binding(0) var<storage, read_write> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;
var<workgroup> left: array<{kind.scalar}, {n * n}>;
var<workgroup> right: array<{kind.scalar}, {n * n}>;
var<workgroup> sums: array<f32, {n * n}>;
var<workgroup> subgroups: u32;
@compute @workgroup_size({THREADS})
fn main(ids: Ids) {{
  for (var i = ids.thread; i < {n * n}u; i += {THREADS}u) {{
    left[i] = {kind.scalar}(x[i]);
    right[i] = {kind.scalar}(x[i + {n * n}u]);
  }}
  if (ids.thread == 0u) {{ subgroups = ids.subgroups; }}
  let together = workgroupUniformLoad(&subgroups);
  for (var round = 0u; round < 1u; round += together) {{
    let part = min(round + ids.subgroup, 0u);
    var c = {kind.type("C")}();
    for (var i = 0u; i < 2u; i++) {{
      let a = {kind.load("A", "left[part]", n, by_rows=False)};
      let b = {kind.load("B", "right[part]", n, by_rows=True)};
      c = coopMultiplyAdd(a, b, c);
    }}
    {kind.store("c", "sums[part]", n)}
    workgroupBarrier();
  }}
  for (var i = ids.thread; i < {n * n}u; i += {THREADS}u) {{ y[i] = sums[i]; }}
}}
"""
    return "\n".join([*extensions(text), text])


def multiply(gpu: Gpu, code: str, x: Array) -> Array:
    """See `Multiply`. Raises DeviceError."""
    from kernelforge_metal.recorder import Command

    with gpu.lock:
        buffers = [gpu.allocate(x.nbytes) for _ in range(2)]
        regions = [Region(buffer, 0, x.nbytes) for buffer in buffers]
        gpu.queue.upload(buffers[0], 0, x)
        pipeline = gpu.pipeline(code, (False, False), 0, checked=False, what="a product of cooperative matrices")
        group = gpu.bind_group(pipeline.layout, regions)
        encoder = gpu.queue.encoder()
        keep = (pipeline, group)
        gpu.encode(encoder, [Command(pipeline.pipeline._internal, group._internal, (1, 1, 1), None, 0, 0, keep)])
        gpu.queue.submit(gpu.finish(encoder))
        found = gpu.queue.download(regions[1]).view(np.float32).copy()
        for buffer in buffers:
            buffer.destroy()
    return found


def _kept(key: str, kinds: Sequence[Matrices]) -> dict[str, int | str] | None:
    """What was found of these before; None when nothing was, or the file is damaged."""
    try:
        forms = json.loads(_file(key).read_text(encoding="utf-8"))["forms"]
        found = {kind.key: forms[kind.key] for kind in kinds}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if all(isinstance(form, str) or form in range(4) for form in found.values()) else None


def _keep(key: str, found: dict[str, int | str]) -> None:
    """A folder that cannot be written costs trying again, nothing else."""
    try:
        home.write_atomic(_file(key), json.dumps({"device": key.partition("\0")[0], "forms": found}, indent=1) + "\n")
    except OSError:
        return


def _file(key: str) -> Path:
    return home.cache_dir() / "cooperative" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
