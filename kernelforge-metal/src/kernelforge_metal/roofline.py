"""The GPU's limits: a shader that only reads memory, and one that only multiplies and adds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kernelforge.roofline import Peaks, Roofline
from kernelforge_metal import wgsl
from kernelforge_metal.device import GpuDevice
from kernelforge_metal.encoder import Region
from kernelforge_metal.recorder import Command
from kernelforge_metal.timing import measure as timed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kernelforge.backend import Device
    from kernelforge_metal.native import Gpu

BYTES = 1 << 28
"""Of the memory that is read: more than any GPU caches."""
LARGE = 1 << 30
"""The same on a card of its own, which reads less in so short a time that starting and ending show."""
ROUNDS = 9
"""The best of so many counts."""
ENOUGH_S = 2e-3
"""Seconds of arithmetic from which starting it does not show."""
THREADS, READERS, MOST = 256, 2048, 1 << 15
"""Of a workgroup; workgroups that read; and most of those that compute."""
SUMS, PASSES = 8, 1024
"""Vectors of four that a thread adds to in turn, and how often."""

_BINDINGS = """
@group(0) @binding(0) var<storage, read_write> source: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> sums: array<vec4<f32>>;
"""


def measure(device: Device) -> Roofline:
    """The limits of an open GPU: about a second. Raises DeviceError when it has no memory for that, or no clock."""
    assert isinstance(device, GpuDevice)
    gpu = device.gpu
    limits = [gpu.limit(name) for name in ("max-storage-buffer-binding-size", "max-buffer-size")]
    nbytes = min(LARGE if gpu.discrete else BYTES, *limits) // 256 * 256
    with gpu.lock:
        source = gpu.allocate(nbytes, "memory to read")
        sums = gpu.allocate(16 * THREADS, "sums")
        regions = (Region(source, 0, nbytes), Region(sums, 0, 16 * THREADS))
        reading, source_s = _best(gpu, reading_shader(nbytes // 16), regions, READERS)
        groups = 8
        shader = multiplying_shader()
        computing, clock = _best(gpu, shader, regions, groups)
        while computing < ENOUGH_S and groups < MOST:
            groups *= 4
            computing, clock = _best(gpu, shader, regions, groups)
        for buffer in (source, sums):
            buffer.destroy()
    flops = 2 * 4 * SUMS * PASSES * THREADS * groups / computing
    return Roofline(
        Peaks(nbytes / reading, flops), timing_source=clock if clock == source_s else f"{source_s}, {clock}"
    )


def _best(gpu: Gpu, code: str, regions: Sequence[Region], groups: int) -> tuple[float, str]:
    """Seconds of the fastest of some runs, and how they were taken."""
    pipeline = gpu.pipeline(code, (False, False), 0, checked=False, what="a measurement of the device's limits")
    group = gpu.bind_group(pipeline.layout, regions)
    keep = (pipeline, group, np.zeros(0))
    command = Command(pipeline.pipeline._internal, group._internal, (groups, 1, 1), None, 0, 0, keep)
    found = timed(gpu, [command], None, ROUNDS)
    return min(found.samples), found.source


def reading_shader(vectors: int) -> str:
    """Adds up all vectors; neighbours read neighbouring ones."""
    return f"""{wgsl.IDS}{_BINDINGS}
@compute @workgroup_size({THREADS})
fn main(ids: Ids) {{
  var sum = vec4<f32>();
  let step = {READERS * THREADS}u;
  var i = ids.group.x * {THREADS}u + ids.thread;
  for (; i + 3u * step < {vectors}u; i += 4u * step) {{
    sum += (source[i] + source[i + step]) + (source[i + 2u * step] + source[i + 3u * step]);
  }}
  for (; i < {vectors}u; i += step) {{ sum += source[i]; }}
  sums[ids.thread] = sum;
}}
"""


def multiplying_shader() -> str:
    """PASSES multiply-adds of each of SUMS vectors, by a number from memory so that nothing is known before; the same for all
    lanes, since an instruction with three registers of its own waits for them on some GPUs."""
    names = [f"s{i}" for i in range(SUMS)]
    return f"""{wgsl.IDS}{_BINDINGS}
@compute @workgroup_size({THREADS})
fn main(ids: Ids) {{
  let factor = vec4<f32>(source[0].x);
  let addend = vec4<f32>(source[0].y);
  {" ".join(f"var {name} = vec4<f32>(f32(ids.thread + {i}u));" for i, name in enumerate(names))}
  for (var i = 0u; i < {PASSES // 4}u; i++) {{
    {" ".join(f"{name} = fma({name}, factor, addend);" for _ in range(4) for name in names)}
  }}
  sums[ids.thread] = {" + ".join(names)};
}}
"""
