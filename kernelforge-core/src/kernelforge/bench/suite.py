"""The suite: problems of real decoders, each verified and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kernelforge.bench.harness import prepare
from kernelforge.errors import UsageError, WrongResultError
from kernelforge.problem import Attr, Problem, TensorType
from kernelforge.tune.measure import measure_in_turn

if TYPE_CHECKING:
    from kernelforge.op import OpDef
    from kernelforge.session import Session

SCHEMA = 1
"""Version of the report's fields."""

_TURN_S = 0.05


def _f32(*shape: int) -> TensorType:
    return TensorType(shape, "f32")


def _i32(*shape: int) -> TensorType:
    return TensorType(shape, "i32")


def _weight(*shape: int, dtype: str = "f32") -> TensorType:
    return TensorType(shape, dtype, constant=True)


@dataclass(frozen=True)
class Case:
    """A named problem."""

    name: str
    op: str
    operands: tuple[TensorType | None, ...]
    attrs: Mapping[str, Attr] = field(default_factory=dict)

    def problem(self, ops: Mapping[str, OpDef]) -> Problem:
        return ops[f"transformer.{self.op}"].problem(self.operands, self.attrs)


def _gemm(name: str, m: int, n: int, k: int, dtype: str = "f32") -> Case:
    """f32[m,k] @ dtype[k,n]."""
    return Case(name, "matmul", (_f32(m, k), _weight(k, n, dtype=dtype)))


def _linear(name: str, tokens: int, n: int, k: int, dtype: str = "f32") -> Case:
    """A linear layer as checkpoints store it: weights [n,k]."""
    return Case(name, "matmul", (_f32(tokens, k), _weight(n, k, dtype=dtype)), {"transpose_rhs": True})


def _cached(name: str, tokens: int, slots: int, capacity: int, heads: int, groups: int, size: int) -> Case:
    cache = _f32(slots, capacity, groups, size)
    return Case(name, "attention", (_f32(tokens, heads, size), cache, cache, _i32(tokens), _i32(tokens)))


CASES = (
    _gemm("decoder_mha_qkv", 64, 64, 128),
    _gemm("decoder_mlp_up_proj", 128, 192, 192),
    _gemm("decoder_mlp_down_proj", 128, 128, 256),
    _gemm("gemm_square_512", 512, 512, 512),
    _linear("prefill_qkv_135m", 256, 960, 576),
    _linear("prefill_mlp_up_135m", 256, 1536, 576),
    _linear("prefill_mlp_down_135m", 256, 576, 1536),
    _linear("prefill_mlp_up_135m_bf16", 256, 1536, 576, "bf16"),
    _linear("batch_mlp_up_135m", 8, 1536, 576),
    _linear("decode_qkv_135m", 1, 960, 576),
    _linear("decode_mlp_up_135m", 1, 1536, 576),
    _linear("decode_mlp_down_135m", 1, 576, 1536),
    _linear("decode_mlp_up_1b", 1, 8192, 2048),
    _linear("decode_mlp_up_1b_bf16", 1, 8192, 2048, "bf16"),
    Case("prefill_glu_135m", "glu_matmul", (_f32(64, 576), _weight(576, 1536), _weight(576, 1536))),
    Case("decode_glu_135m", "glu_matmul", (_f32(1, 576), _weight(576, 1536), _weight(576, 1536))),
    Case("prefill_attention", "attention", (_f32(256, 9, 64), _f32(256, 3, 64), _f32(256, 3, 64))),
    _cached("cached_prefill_attention", 128, 1, 512, 9, 3, 64),
    _cached("decode_attention", 1, 1, 1024, 9, 3, 64),
    _cached("batch_decode_attention", 8, 8, 512, 9, 3, 64),
    Case("softmax", "softmax", (_f32(64, 4096),)),
    Case("prefill_rms_norm", "rms_norm", (_f32(256, 576), _weight(576))),
    Case("decode_rms_norm", "rms_norm", (_f32(1, 2048), _weight(2048))),
    Case("add_rms_norm", "add_rms_norm", (_f32(64, 576), _f32(64, 576), _weight(576))),
    Case("layer_norm", "layer_norm", (_f32(256, 768), _weight(768), _weight(768))),
    Case("rope", "rope", (_f32(256, 9, 64), _i32(256)), {"max_position": 2048}),
    Case("kv_cache_update", "kv_cache_update", (_f32(4, 512, 3, 64), _f32(64, 3, 64), _i32(64), _i32(64))),
    Case("silu", "silu", (_f32(256, 1536),)),
    Case("embedding", "embedding", (_weight(49152, 576, dtype="bf16"), _i32(64)), {"dtype": "f32"}),
    Case("argmax", "argmax", (_f32(1, 49152),)),
    Case("sample", "sample", (_f32(1, 49152), _f32(1), _i32(1), *[_f32(1)] * 3)),
)


def chosen_cases(substring: str = "") -> list[Case]:
    """The cases whose name contains `substring`. Raises UsageError when there is none."""
    found = [case for case in CASES if substring in case.name]
    if not found:
        raise UsageError(f"no case is named '{substring}'", hint=f"the cases: {', '.join(c.name for c in CASES)}")
    return found


def run_case(session: Session, case: Case, *, repeat: int = 5) -> dict[str, Any]:
    """Verify and time one case: the report of `Prepared` with `name` and `status`.

    A failure is a report, too: status "wrong-result", "unsupported" (no kernel takes it) or "error", and `message`.
    """
    problem = case.problem(session.registry.ops)
    try:
        prepared = prepare(session, problem)
        measure_in_turn([prepared.subject], seconds=_TURN_S * repeat, rounds=repeat)
    except WrongResultError as failure:
        return {"name": case.name, "status": "wrong-result", "problem": str(problem), "message": str(failure)}
    except UsageError as failure:
        message = f"{failure} ({failure.hint})" if failure.hint else str(failure)
        return {"name": case.name, "status": "unsupported", "problem": str(problem), "message": message}
    except Exception as failure:  # whatever a kernel's builder or a compiler raises: the other cases still count
        message = f"{type(failure).__name__}: {failure}"
        return {"name": case.name, "status": "error", "problem": str(problem), "message": message}
    return {"name": case.name, "status": "ok"} | prepared.report()


def run_suite(
    session: Session,
    cases: Sequence[Case],
    environment: Mapping[str, Any],
    *,
    repeat: int = 5,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Measure the device's limits, then run all cases: schema, target, device, roofline, environment, unix_time, and
    `cases` in order."""
    info = session.device.info
    roofline = session.roofline(again=True)
    reports = []
    for case in cases:
        reports.append(run_case(session, case, repeat=repeat))
        progress(case.name)
    return {
        "schema": SCHEMA,
        "target": info.target,
        "device": {"name": info.name, "fingerprint": info.fingerprint, "threads": info.threads},
        "roofline": None if roofline is None else roofline.as_data(),
        "environment": dict(environment),
        "unix_time": round(time.time(), 3),
        "cases": reports,
    }
