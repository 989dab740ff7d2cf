"""rms_norm, add_rms_norm, layer_norm and softmax: one workgroup a row, summed up across its threads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelforge_metal import wgsl
from kernelforge_metal.kernel import Dispatch, GpuKernel
from kernelforge_metal.kernels.rows import Rows

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo


def build_rms_norm(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    rows = Rows(problem, device, ("x", "weight", "out"))
    x, weight, out = rows.tensors
    if rows.kept:
        loads = (
            f"v_k = {x.load(rows.place(x))}; w_k = {weight.load(rows.place(weight))}; squares = fma(v_k, v_k, squares);"
        )
        return _kept(rows, problem, loads, out.store(rows.place(out), "v_k * scale * w_k"))
    body = f"""
  var squares = 0.0;
  {rows.loop(f"let v = {x.load(rows.place(x))}; squares = fma(v, v, squares);")}
  let scale = 1.0 / sqrt(add_up(squares, ids) / f32({rows.length}) + {_number(problem.attr("eps"))});
  {rows.loop(out.store(rows.place(out), f"{x.load(rows.place(x))} * scale * {weight.load(rows.place(weight))}"))}"""
    return _kernel(rows, body, ("add",))


def build_add_rms_norm(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    rows = Rows(problem, device, ("x", "residual", "weight", "total", "norm"))
    x, residual, weight, total, norm = rows.tensors
    value = f"{x.load(rows.place(x))} + {residual.load(rows.place(residual))}"
    if rows.kept:
        loads = f"v_k = {value}; w_k = {weight.load(rows.place(weight))}; squares = fma(v_k, v_k, squares);"
        stores = f"{total.store(rows.place(total), 'v_k')} {norm.store(rows.place(norm), 'v_k * scale * w_k')}"
        return _kept(rows, problem, loads, stores)
    body = f"""
  var squares = 0.0;
  {rows.loop(f"let v = {value}; squares = fma(v, v, squares); {total.store(rows.place(total), 'v')}")}
  let scale = 1.0 / sqrt(add_up(squares, ids) / f32({rows.length}) + {_number(problem.attr("eps"))});
  {rows.loop(norm.store(rows.place(norm), f"({value}) * scale * {weight.load(rows.place(weight))}"))}"""
    return _kernel(rows, body, ("add",))


def _kept(rows: Rows, problem: Problem, loads: str, stores: str) -> GpuKernel:
    """RMS normalisation of short rows: every element is loaded once, before anything waits for the sum."""
    body = f"""
  var squares = 0.0;
  {rows.declare("v", "w")}
  {rows.each(loads)}
  let scale = 1.0 / sqrt(add_up(squares, ids) / f32({rows.length}) + {_number(problem.attr("eps"))});
  {rows.each(stores)}"""
    return _kernel(rows, body, ("add",))


def build_layer_norm(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    biased = problem.operands[2] is not None
    rows = Rows(problem, device, ("x", "weight", "bias", "out"))
    x, weight, *bias, out = rows.tensors
    shift = f" + {bias[0].load(rows.place(bias[0]))}" if biased else ""
    scaled = f"({x.load(rows.place(x))} - mean) * scale * {weight.load(rows.place(weight))}{shift}"
    body = f"""
  var sum = 0.0;
  {rows.loop(f"sum += {x.load(rows.place(x))};")}
  let mean = add_up(sum, ids) / f32({rows.length});
  var squares = 0.0;
  {rows.loop(f"let v = {x.load(rows.place(x))} - mean; squares = fma(v, v, squares);")}
  let scale = 1.0 / sqrt(add_up(squares, ids) / f32({rows.length}) + {_number(problem.attr("eps"))});
  {rows.loop(out.store(rows.place(out), scaled))}"""
    return _kernel(rows, body, ("add",))


def build_softmax(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    axis = problem.attr("axis")
    assert isinstance(axis, int)
    rows = Rows(problem, device, ("x", "out"), axis=axis % problem.operand(0).rank)
    x, out = rows.tensors
    value = f"exp({x.load(rows.place(x))} - top)"
    body = f"""
  var highest = {LOWEST};
  var missing = false;
  {rows.loop(f"let v = {x.load(rows.place(x))}; highest = max(highest, v); missing = missing || is_nan(v);")}
  let most = largest(highest, ids);
  missing = missing || bitcast<u32>(most) == 0x7f800000u;
  let top = select(most, {NAN}, add_up(select(0.0, 1.0, missing), ids) > 0.0);
  var sum = 0.0;
  {rows.loop(f"sum += {value};")}
  let total = add_up(sum, ids);
  {rows.loop(out.store(rows.place(out), f"{value} / total"))}"""
    return _kernel(rows, body, ("add", "max"))


LOWEST = "bitcast<f32>(runtime(0xff800000u))"
NAN = "bitcast<f32>(runtime(0x7fc00000u))"
"""-inf and NaN. Constant expressions may not have such values: these are computed when the kernel runs."""

FUNCTIONS = """
var<private> nothing: u32;
fn runtime(bits: u32) -> u32 { return bits | nothing; }
fn is_nan(x: f32) -> bool { return (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u; }
"""


def _number(value: object) -> str:
    return f"{float(value)!r}" if isinstance(value, int | float) else ""


def _kernel(rows: Rows, body: str, reductions: tuple[str, ...]) -> GpuKernel:
    subgroups = wgsl.SUBGROUP in rows.device.features
    names = {"add": "add_up", "max": "largest"}
    functions = "".join(wgsl.reduction(names[r], r, rows.threads, subgroups=subgroups) for r in reductions)
    code = f"""{wgsl.SUBGROUP_IDS if subgroups else wgsl.IDS}{wgsl.HALVES}{FUNCTIONS}{functions}
@compute @workgroup_size({rows.threads})
fn main(ids: Ids) {{
  let row = {wgsl.FLAT};
  if (row >= {rows.count_text}) {{ return; }}
  {rows.setup}
{body}
}}
"""
    return GpuKernel((Dispatch(code, tuple(t.binding for t in rows.tensors), wgsl.grid(rows.count)),))
