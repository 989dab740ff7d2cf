"""Variants of `transformer.matmul` and its kin. Cheap to import: builders are named, not loaded."""

from __future__ import annotations

from kernelforge.variant import KernelVariant

HERE = "kernelforge_metal.kernels.matmul"

_KINDS = (
    ("gemv-quantising", "gemv:build_quantising", "gemv:takes_quantising", "gemv_configs:quantising", 45),
    ("gemv-bytes", "gemv:build_bytes_subgroups", "gemv:takes_bytes_subgroups", "gemv_configs:bytes", 45),
    ("gemv-bytes-shared", "gemv:build_bytes", "gemv:takes_bytes", "gemv_configs:bytes_shared", 42),
    (
        "gemv-integer",
        "gemv:build_integers_subgroups",
        "gemv:takes_integers_subgroups",
        "gemv_configs:integers",
        40,
    ),
    (
        "gemv-integer-shared",
        "gemv:build_integers",
        "gemv:takes_integers",
        "gemv_configs:integers_shared",
        35,
    ),
    ("gemv", "gemv:build_gemv_subgroups", "gemv:takes_gemv_subgroups", "gemv_configs:gemv", 30),
    ("gemv-shared", "gemv:build_gemv", "gemv:takes_gemv", "gemv_configs:gemv_shared", 25),
    (
        "gemm-cooperative",
        "gemm_cooperative:build_cooperative",
        "gemm_cooperative:takes_cooperative",
        "gemm_cooperative:cooperative",
        22,
    ),
    (
        "gemm-integer",
        "gemm_integer:build_integers",
        "gemm_integer:takes_integers",
        "gemm_integer:integers",
        21,
    ),
    ("gemm", "gemm:build_gemm", "gemm:takes_gemm", "gemm:gemm", 20),
)
"""Name, build, supports, family of configs, priority."""

_NORMALISING = ("gemv-integer", "gemv-integer-shared", "gemv", "gemv-shared")
"""With more rows than these take, norm and product are run one after the other: `OpDef.parts`."""

_QUANTISING = ("gemv-quantising",)
"""Else what these multiply is quantised by an op of its own, and then multiplied."""

_SINGLE = ("gemm-cooperative",)
"""With one right-hand side only."""

_SUMMARIES = {
    "gemv-bytes": "a few rows of 8-bit activations (q8a) times quantised weights, sums across subgroups",
    "gemv-bytes-shared": "the same, sums in workgroup memory",
    "gemv-quantising": "a few rows, which are quantised to 8 bits, times quantised weights, sums across subgroups",
    "gemv-integer": "a few rows times quantised weights in integers, sums across subgroups",
    "gemv-integer-shared": "the same, sums in workgroup memory",
    "gemv": "a few rows; each weight is read once, sums across subgroups",
    "gemv-shared": "the same, sums in workgroup memory",
    "gemm-cooperative": "tiles of the result, multiplied by cooperative matrices (tensor cores, simdgroup_matrix)",
    "gemm-integer": "tiles of the result, from activations and weights of bytes, multiplied in integers",
    "gemm": "tiles of the result, their operands in workgroup memory",
}


def _ops(kind: str) -> tuple[str, ...]:
    if kind in _QUANTISING:
        products = ("matmul", "glu_matmul")
        return tuple(f"{first}quantize_{product}" for first in ("", "rms_norm_") for product in products)
    if kind in _SINGLE:
        return ("matmul",)
    return ("matmul", "glu_matmul", *(("rms_norm_matmul", "rms_norm_glu_matmul") if kind in _NORMALISING else ()))


VARIANTS = (
    *(
        KernelVariant(
            name=name,
            op=f"transformer.{op}",
            target="gpu",
            build=f"{HERE}.{build}",
            summary=_SUMMARIES[name],
            supports=f"{HERE}.{supports}",
            space=f"{HERE}.{family}_space",
            default=f"{HERE}.{family}_default",
            priority=priority,
        )
        for name, build, supports, family, priority in _KINDS
        for op in _ops(name)
    ),
    *(
        KernelVariant(
            name="direct",
            op=f"transformer.{op}",
            target="gpu",
            build=f"{HERE}.direct:build_direct",
            summary="a thread for each element of the result, any layout",
            supports=f"{HERE}.common:takes_any_product",
            priority=10,
        )
        for op in ("matmul", "glu_matmul")
    ),
)
