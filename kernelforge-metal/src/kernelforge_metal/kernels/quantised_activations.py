"""Activations in q8a: quantize and rms_norm_quantize, which write groups of 32 elements as `kernelforge.quant` lays them out.

A group is ten words: the scale d as an f32, the two sums of `zeros` in halves of a word, and eight words of four int8. Eight
threads write it, four elements each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelforge.dtype import ACTIVATION_FORMAT, GROUP
from kernelforge.problem import TensorType
from kernelforge.variant import Reject
from kernelforge_metal import wgsl
from kernelforge_metal.kernel import Binding, Dispatch, GpuKernel
from kernelforge_metal.kernels.quantiser import SCALE
from kernelforge_metal.kernels.rows import threads_for
from kernelforge_metal.kernels.tensors import Tensor, count, offsets, product_text, takes, tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict

GROUP_WORDS = 10
READ = ("f32", "f16", "bf16")
"""Dtypes of what is quantised."""
THREADS = 64
MAX_KEPT = 4
"""Quads of a row that a thread keeps in registers at most."""


def takes_floats(problem: Problem, device: DeviceInfo) -> Verdict:
    """Of kernels that quantise activations."""
    if problem.results[0].dtype != ACTIVATION_FORMAT:
        return Reject(f"makes {ACTIVATION_FORMAT}; {problem.results[0].dtype} is computed when a module is compiled")
    for t in problem.operands:
        if t is not None and t.dtype not in READ:
            return Reject(f"takes {', '.join(READ)}, not {t.dtype}")
    return takes(problem, device, (*READ, ACTIVATION_FORMAT))


def _store(threads: int) -> str:
    """`store(x, n, inside, thread)`, called by all threads of the workgroup, of which eight neighbours each have a group: writes
    quad `n` of the result, if it is inside."""
    return f"""{SCALE}
var<workgroup> largest_of: array<u32, {threads}>;
var<workgroup> words: array<u32, {threads}>;
fn values(x: vec4<f32>, inverse: u32) -> u32 {{
  if (inverse == 0u) {{ return 0u; }}
  return pack4xI8(vec4<i32>(round(x * bitcast<f32>(inverse))));
}}
fn store(x: vec4<f32>, n: u32, inside: bool, thread: u32) {{
  let first = thread & ~7u;
  largest_of[thread] = largest_bits(x);
  workgroupBarrier();
  var largest = 0u;
  for (var i = 0u; i < 8u; i++) {{ largest = max(largest, largest_of[first + i]); }}
  var d = vec2<u32>(0x7fc00000u, 0u);
  if (largest < 0x7f800000u) {{ d = group_scale(largest); }}
  let word = values(x, d.y);
  words[thread] = word;
  workgroupBarrier();
  if (!inside) {{ return; }}
  let at = (n >> 3u) * {GROUP_WORDS}u;
  out[at + 2u + (n & 7u)] = word;
  if ((n & 7u) == 0u) {{
    var zeros = vec2<i32>();
    for (var i = 0u; i < 8u; i++) {{
      zeros += vec2<i32>(dot4I8Packed(words[first + i], 0x00000808u), dot4I8Packed(words[first + i], 0x08080000u));
    }}
    out[at] = d.x;
    out[at + 1u] = (u32(zeros.x) & 0xffffu) | (u32(zeros.y) << 16u);
  }}
}}
"""


@dataclass(frozen=True)
class Fours:
    """A tensor whose rows are read four elements at a time."""

    tensor: Tensor

    @property
    def together(self) -> bool:
        """Whether four are one load."""
        *outer, last = self.tensor.type.element_strides()
        return last == 1 and all(step % 4 == 0 for step in outer)

    @property
    def binding(self) -> Binding:
        t = self.tensor
        return Binding(t.name, t.index, wgsl.quad_element(t.type.dtype)) if self.together else t.binding

    def load(self, row: str, k: str) -> str:
        """Elements `k` to `k` + 3 as a vec4<f32>; `row` is where their row starts, from the tensor's start."""
        t, step = self.tensor, self.tensor.type.element_strides()[-1]
        if self.together:
            return wgsl.load_quad(t.name, t.type.dtype, f"(({t.at} + {row} + {k}) >> 2u)")
        return f"vec4<f32>({', '.join(t.load(f'{row} + ({k} + {i}u) * {step}u') for i in range(4))})"


def _row(problem: Problem, row: str) -> tuple[str, str]:
    """Statements that take the number of a row of the first operand apart, and where that row starts."""
    x = problem.operand(0)
    setup, (start,) = offsets(problem, x.shape[:-1], [TensorType(x.shape[:-1], x.dtype, x.element_strides()[:-1])], row)
    return setup, start


def build_quantize(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    x, out = Fours(tensor(problem, 0, "x", device)), tensor(problem, 1, "out", device)
    quads = (*out.type.shape[:-1], _length(problem) // 4)
    setup, start = _row(problem, "row")
    code = f"""{wgsl.IDS}{wgsl.HALVES}{_store(THREADS)}
@compute @workgroup_size({THREADS})
fn main(ids: Ids) {{
  let n = {wgsl.FLAT} * {THREADS}u + ids.thread;
  let inside = n < {product_text(problem, quads)};
  var v = vec4<f32>();
  if (inside) {{
  let row = n / {max(1, quads[-1])}u;
  let k = n % {max(1, quads[-1])}u * 4u;
  {setup}
  v = {x.load(start, "k")};
  }}
  store(v, n, inside, ids.thread);
}}
"""
    return GpuKernel(
        (Dispatch(code, (x.binding, out.binding), wgsl.grid(wgsl.blocks(count(problem, quads), THREADS))),)
    )


def build_rms_norm_quantize(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    """A workgroup a row; where it is short, every element is loaded once, before anything waits for the sum."""
    x, weight = Fours(tensor(problem, 0, "x", device)), Fours(tensor(problem, 1, "weight", device))
    out = tensor(problem, 2, "out", device)
    outer = problem.operand(0).shape[:-1]
    quads = _length(problem) // 4
    threads = threads_for(quads)
    rounds = -(-quads // threads)
    kept = rounds <= MAX_KEPT
    setup, start = _row(problem, "row")
    load, gain = x.load("start", "q * 4u"), weight.load("0u", "q * 4u")

    def lines() -> Iterator[str]:
        if not kept:
            yield f"for (var q = ids.thread; q < {quads}u; q += {threads}u) {{ let v = {load}; squares += dot(v, v); }}"
        for r in range(rounds if kept else 0):
            yield f"var v{r} = vec4<f32>(); var w{r} = vec4<f32>();"
            yield f"{{ let q = ids.thread + {r * threads}u; if (q < {quads}u) {{ v{r} = {load}; w{r} = {gain}; }} }}"
            yield f"squares += dot(v{r}, v{r});"
        yield f"let scale = 1.0 / sqrt(add_up(squares, ids) / {4 * quads}.0 + {float(str(problem.attr('eps')))!r});"
        for r in range(rounds if kept else 0):
            q = f"(ids.thread + {r * threads}u)"
            yield f"store(v{r} * scale * w{r}, row * {quads}u + {q}, {q} < {quads}u, ids.thread);"
        if not kept:
            yield f"for (var first = 0u; first < {quads}u; first += {threads}u) {{"
            yield f"let q = first + ids.thread; var y = vec4<f32>(); if (q < {quads}u) {{ y = {load} * scale * {gain}; }}"
            yield f"store(y, row * {quads}u + q, q < {quads}u, ids.thread);"
            yield "}"

    subgroups = wgsl.SUBGROUP in device.features
    body = "\n  ".join(lines())
    code = f"""{wgsl.SUBGROUP_IDS if subgroups else wgsl.IDS}{wgsl.HALVES}{_store(threads)}
{wgsl.reduction("add_up", "add", threads, subgroups=subgroups)}
@compute @workgroup_size({threads})
fn main(ids: Ids) {{
  let row = {wgsl.FLAT};
  if (row >= {product_text(problem, outer)}) {{ return; }}
  {setup}
  let start = {start};
  var squares = 0.0;
  {body}
}}
"""
    return GpuKernel((Dispatch(code, (x.binding, weight.binding, out.binding), wgsl.grid(count(problem, outer))),))


def _length(problem: Problem) -> int:
    """Of a row: whole groups, maybe none."""
    length = problem.operand(0).shape[-1]
    assert isinstance(length, int)
    assert length % GROUP == 0
    return length
