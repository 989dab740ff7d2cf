"""Attention of any layout and head size: a workgroup for each query and head, an online softmax over blocks of keys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from kernelforge.variant import Accept, Reject
from kernelforge_metal import wgsl
from kernelforge_metal.dtypes import CACHE_DTYPES
from kernelforge_metal.kernel import Dispatch, GpuKernel, Size
from kernelforge_metal.kernels.norms import FUNCTIONS
from kernelforge_metal.kernels.quantised_cache import NUMBERS, reader
from kernelforge_metal.kernels.tensors import Tensor, count, dim_text, product_text, takes, tensor

if TYPE_CHECKING:
    from kernelforge.problem import Dim, Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict

THREADS = 64
MAX_HEAD_SIZE = 1024

SOFTCAP = """fn softcap(x: f32) -> f32 {
  return select({cap} - 2.0 * {cap} / (exp(x * {factor}) + 1.0), x, is_nan(x));
}
"""
"""cap tanh(x / cap), by an exponential that may overflow, and that some drivers have a number for where it is NaN."""


@dataclass(frozen=True)
class Attention:
    """What all kernels of attention know of a problem: sizes, and which keys a query sees."""

    problem: Problem
    device: DeviceInfo

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The operands that are there and the result, by name."""
        names = ("q", "k", "v", "positions", "slots", "lengths")
        found = {n: tensor(self.problem, i, n, self.device) for i, n in enumerate(names) if self._has(i)}
        return {**found, "out": tensor(self.problem, len(self.problem.operands), "out", self.device)}

    def _has(self, index: int) -> bool:
        return index < len(self.problem.operands) and self.problem.operands[index] is not None

    @property
    def cached(self) -> bool:
        return self._has(3)

    @property
    def heads(self) -> int:
        return _static(self.problem.operand(0).shape[-2])

    @property
    def groups(self) -> int:
        return _static(self.problem.operand(1).shape[-2])

    @property
    def size(self) -> int:
        return _static(self.problem.operand(0).shape[-1])

    @property
    def tokens(self) -> tuple[Dim, ...]:
        """Batch, if there is one, and tokens: the queries of a head."""
        return self.problem.operand(0).shape[:-2]

    @property
    def capacity(self) -> Dim:
        """Keys of a sequence, or of a slot of the cache."""
        return self.problem.operand(1).shape[-3]

    @property
    def scale(self) -> float:
        return float(self.number("scale")) or 1.0 / math.sqrt(self.size)

    def number(self, name: str) -> float:
        value = self.problem.attr(name)
        assert isinstance(value, int | float)
        return value

    def query_place(self, name: str, token: str, head: str) -> str:
        """The offset of a query's, or its result's, first element; `token` counts through all batches."""
        strides = self.tensors[name].type.element_strides()
        at = f"{head} * {strides[-2]}u"
        if len(strides) == 3:
            return f"{token} * {strides[0]}u + {at}"
        size = dim_text(self.problem, self.tokens[1])
        return f"({token} / {size}) * {strides[0]}u + ({token} % {size}) * {strides[1]}u + {at}"

    def key_place(self, name: str, group: str) -> str:
        """The offset of key (or value) 0 of a group of heads, in the sequence that `see` found."""
        strides = self.tensors[name].type.element_strides()
        first = f"seen.sequence * {strides[0]}u + " if len(strides) == 4 else ""
        return f"{first}{group} * {strides[-2]}u"

    def key_stride(self, name: str) -> int:
        return self.tensors[name].type.element_strides()[-3]

    @property
    def functions(self) -> str:
        """`see(token)`: the sequence (or slot) of a token's keys, and from which to before which it sees."""
        p = self.problem
        keys = dim_text(p, self.capacity)
        window = int(self.number("window"))
        lines = []
        if self.cached:
            positions, slots = self.tensors["positions"], self.tensors["slots"]
            step, slot_step = (t.type.element_strides()[0] for t in (positions, slots))
            lines += [
                f"let place = {positions.load(f'token * {step}u')};",
                f"let sequence = u32({slots.load(f'token * {slot_step}u')});",
                f"if (place < 0 || sequence >= {dim_text(p, p.operand(1).shape[0])}) {{ return Seen(0u, 0u, 0u); }}",
                f"var end = {keys};",
            ]
        else:
            tokens = dim_text(p, self.tokens[-1])
            lines += [
                f"let sequence = {f'token / {tokens}' if len(self.tokens) == 2 else '0u'};",
                f"let place = i32({keys}) + i32({f'token % {tokens}' if len(self.tokens) == 2 else 'token'}) - i32({tokens});",
                f"var end = {keys};",
            ]
        if self._has(5):
            lengths = self.tensors["lengths"]
            step = lengths.type.element_strides()[0]
            lines.append(f"end = min(end, u32(max({lengths.load(f'sequence * {step}u')}, 0)));")
        if p.attr("causal"):
            lines.append("end = min(end, u32(max(place + 1, 0)));")
        lines.append(f"let start = {f'u32(max(place + 1 - {window}, 0))' if window else '0u'};")
        lines.append("return Seen(sequence, min(start, end), end);")
        cap = float(self.number("softcap"))
        text = "struct Seen { sequence: u32, start: u32, end: u32 }\nfn see(token: u32) -> Seen {\n  "
        text += "\n  ".join(lines) + "\n}\n"
        if cap:
            text += SOFTCAP.replace("{cap}", repr(cap)).replace("{factor}", repr(2.0 / cap))
        return text

    @property
    def readers(self) -> str:
        """The functions that loads of keys and values call."""
        return NUMBERS + reader("k") + reader("v") if self.problem.operand(1).quantised else ""

    def score(self, dot: str) -> str:
        """The score of a query's product with a key."""
        scaled = f"({dot}) * {self.scale!r}"
        return f"softcap({scaled})" if self.number("softcap") else scaled


def _static(dim: Dim) -> int:
    assert isinstance(dim, int)
    return dim


def takes_attention(problem: Problem, device: DeviceInfo) -> Verdict:
    q, k = problem.operand(0), problem.operand(1)
    sizes = (*q.shape[-2:], k.shape[-2])
    if any(isinstance(d, str) for d in sizes):
        return Reject("takes heads and a head size that are known when it is built")
    if isinstance(q.shape[-1], int) and q.shape[-1] > MAX_HEAD_SIZE:
        return Reject(f"takes heads of up to {MAX_HEAD_SIZE} elements, not {q.shape[-1]}")
    verdict = takes(problem, device, CACHE_DTYPES)
    return verdict if isinstance(verdict, Reject) else Accept()


def build_attention(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    a = Attention(problem, device)
    q, k, v, out = (a.tensors[name] for name in ("q", "k", "v", "out"))
    size, per_thread = a.size, -(-a.size // THREADS)
    subgroups = wgsl.SUBGROUP in device.features
    d_q, d_k, d_v, d_o = (t.type.element_strides()[-1] for t in (q, k, v, out))
    reductions = wgsl.reduction("largest", "max", THREADS, subgroups=subgroups)
    reductions += wgsl.reduction("add_up", "add", THREADS, subgroups=subgroups)
    each = f"for (var n = 0u; n < {per_thread}u; n++) {{ let d = n * {THREADS}u + ids.thread; if (d < {size}u) {{ {{}} }} }}"
    k_step, v_step = a.key_stride("k"), a.key_stride("v")
    weighted = f"acc[n] += weights[j] * {v.load(f'from_v + (block + j) * {v_step}u + d * {d_v}u')};"
    stored = out.store(f"to + d * {d_o}u", "select(0.0, acc[n] / total, total > 0.0 || is_nan(total))")
    dot = f"dot = fma(query[d], {k.load(f'from_k + key * {k_step}u + d * {d_k}u')}, dot);"
    code = f"""{wgsl.SUBGROUP_IDS if subgroups else wgsl.IDS}{wgsl.HALVES}{FUNCTIONS}{reductions}{a.functions}{a.readers}
var<workgroup> query: array<f32, {max(1, size)}>;
var<workgroup> weights: array<f32, {THREADS}>;
@compute @workgroup_size({THREADS})
fn main(ids: Ids) {{
  let row = {wgsl.FLAT};
  if (row >= {product_text(problem, (*a.tokens, a.heads))}) {{ return; }}
  let head = row % {a.heads}u;
  let token = row / {a.heads}u;
  let seen = see(token);
  let from_q = {a.query_place("q", "token", "head")};
  let to = {a.query_place("out", "token", "head")};
  let group = head / {a.heads // max(1, a.groups)}u;
  let from_k = {a.key_place("k", "group")};
  let from_v = {a.key_place("v", "group")};
  for (var d = ids.thread; d < {size}u; d += {THREADS}u) {{ query[d] = {q.load(f"from_q + d * {d_q}u")}; }}
  workgroupBarrier();
  var acc: array<f32, {max(1, per_thread)}>;
  var top = -3.0e38;
  var total = 0.0;
  for (var block = seen.start; block < seen.end; block += {THREADS}u) {{
    let key = block + ids.thread;
    var score = -3.0e38;
    if (key < seen.end) {{
      var dot = 0.0;
      for (var d = 0u; d < {size}u; d++) {{ {dot} }}
      score = {a.score("dot")};
    }}
    let higher = max(top, largest(score, ids));
    let weight = select(0.0, exp(score - higher), key < seen.end);
    weights[ids.thread] = weight;
    let shrink = exp(top - higher);
    total = total * shrink + add_up(weight, ids);
    top = higher;
    workgroupBarrier();
    {each.replace("{}", "acc[n] *= shrink;")}
    let many = min({THREADS}u, seen.end - block);
    for (var j = 0u; j < many; j++) {{
      {each.replace("{}", weighted)}
    }}
    workgroupBarrier();
  }}
  {each.replace("{}", stored)}
}}
"""
    rows: Size = count(problem, (*a.tokens, a.heads))
    return GpuKernel((Dispatch(code, tuple(t.binding for t in a.tensors.values()), wgsl.grid(rows)),))
