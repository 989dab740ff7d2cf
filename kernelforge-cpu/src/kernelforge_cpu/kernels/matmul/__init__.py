"""Variants of `transformer.matmul` and `transformer.glu_matmul`. Cheap to import: builders are named, not loaded."""

from __future__ import annotations

from kernelforge.variant import KernelVariant

HERE = "kernelforge_cpu.kernels.matmul"

VARIANTS = (
    *(
        KernelVariant(
            name="vectorized",
            op=f"transformer.{op}",
            target="cpu",
            build=f"{HERE}.vectorized:build_matmul",
            summary=summary,
            supports=f"{HERE}.vectorized:takes_matmul",
            space=f"{HERE}.config:matmul_space",
            default=f"{HERE}.config:matmul_default",
            layouts=f"{HERE}.layouts:panels",
            priority=10,
        )
        for op, summary in (
            ("matmul", "packed rhs, register tiles, fused epilogue; any number of rows"),
            ("glu_matmul", "as for matmul, both products in one pass over x"),
        )
    ),
    *(
        KernelVariant(
            name="quantised",
            op=f"transformer.{op}",
            target="cpu",
            build=f"{HERE}.quantised:build_quantised",
            summary=f"{summary}; weights of 8 or 4 bits, widened to f32 in registers",
            supports=f"{HERE}.quantised:takes_quantised",
            space=f"{HERE}.quantised:quantised_space",
            default=f"{HERE}.quantised:quantised_default",
            layouts=f"{HERE}.layouts:groups",
            priority=10,
        )
        for op, summary in (
            ("matmul", "packed rhs, fused epilogue"),
            ("glu_matmul", "both products in one pass over x"),
        )
    ),
    *(
        KernelVariant(
            name=name,
            op=f"transformer.{op}",
            target="cpu",
            build=f"{HERE}.integer:build_{kind}",
            summary=f"activations of 8 bits times weights of 8 or 4, {instructions}",
            supports=f"{HERE}.integer:takes_{kind}",
            space=f"{HERE}.integer:{choice}_space",
            default=f"{HERE}.integer:{choice}_default",
            layouts=f"{HERE}.layouts:words",
            priority=priority,
            arithmetic="int8",
        )
        for op in ("matmul", "glu_matmul")
        for name, kind, choice, instructions, priority in (
            ("integer", "pairs", "pairs", "by pmaddubsw of SSSE3, AVX2 or AVX-512", 10),
            ("integer-vnni", "vnni", "integer", "by vpdpbusd of AVX-512 VNNI or AVX-VNNI", 11),
            ("integer-dotprod", "dotprod", "integer", "by sdot of Armv8.2", 11),
        )
    ),
    *(
        KernelVariant(
            name=name,
            op="transformer.matmul",
            target="cpu",
            build=f"{HERE}.numba_variants:build_{name}",
            summary=summary,
            supports=f"{HERE}.numba_variants:takes_f32",
            space=f"{HERE}.numba_variants:block_space",
            priority=priority,
        )
        for name, summary, priority in (
            ("parallel", "numba, blocks of the result shared by all threads", 1),
            ("blocked", "numba, cache blocks, one thread", 0),
        )
    ),
)
