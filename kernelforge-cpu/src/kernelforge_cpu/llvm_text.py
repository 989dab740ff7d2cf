"""LLVM IR text of the MLIR bindings, respelled for llvmlite, whose LLVM is older.

Since LLVM 23 floating-point constants are printed as the shortest decimal that reads back in their type (`float
1.1`), as `f0x3F8CCCCD`, or as `+inf`, `-qnan`, `+nan(0x1)`; earlier parsers want the exact bits (`float
0x3FF19999A0000000`, `half 0xH3C00`). Both read the bits.
"""

from __future__ import annotations

import re
import struct

TOKEN = re.compile(
    r"(?<![\w.%@$\"-])(?:(?P<type>half|bfloat|float|double)\b"
    r"|f0x(?P<hex>[0-9A-Fa-f]+)"
    r"|(?P<sign>[-+])(?P<special>inf|qnan|s?nan\(0x(?P<payload>[0-9a-fA-F]+)\))"
    r"|(?P<decimal>[-+]?\d+\.\d*(?:[eE][-+]?\d+)?))(?![\w.])"
)
CONSTANT_LINE = re.compile(r"^.*(?:\df0x|\bf0x[0-9A-F]|\d\.\d|[-+](?:inf|qnan|s?nan\()).*$", re.MULTILINE)
MANTISSA = {"half": 10, "bfloat": 7, "float": 23, "double": 52}
BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64}


def respell(ir_text: str) -> str:
    """Every floating-point constant as its bits, in the spelling that all LLVM versions read."""
    return CONSTANT_LINE.sub(lambda found: _line(found[0]), ir_text)


def _line(line: str) -> str:
    t = ""  # a constant's type is the last one named before it

    def replace(found: re.Match[str]) -> str:
        nonlocal t
        if found["type"]:
            t = found["type"]
            return found[0]
        return spelled(constant_bits(found, t), t) if t else found[0]

    return TOKEN.sub(replace, line)


def constant_bits(found: re.Match[str], t: str) -> int:
    """The constant's bits in its own format."""
    if found["hex"]:
        return int(found["hex"], 16)
    if found["decimal"]:
        return rounded(float(found["decimal"]), t)
    mantissa, width = MANTISSA[t], BITS[t]
    exponent = ((1 << (width - 1 - mantissa)) - 1) << mantissa
    quiet = 1 << (mantissa - 1)
    kind = found["special"]
    payload = (
        0
        if kind == "inf"
        else quiet
        if kind == "qnan"
        else int(found["payload"], 16) | (0 if kind[0] == "s" else quiet)
    )
    return (found["sign"] == "-") << (width - 1) | exponent | payload


def rounded(value: float, t: str) -> int:
    """The bits of the nearest value of the type."""
    if t == "bfloat":
        bits = int.from_bytes(struct.pack("<f", value), "little")
        return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    code = {"half": "<e", "float": "<f", "double": "<d"}[t]
    return int.from_bytes(struct.pack(code, value), "little")


def spelled(bits: int, t: str) -> str:
    """half and bfloat have letters of their own; float is written as the double of the same value."""
    if t in ("half", "bfloat"):
        return f"0x{'H' if t == 'half' else 'R'}{bits:04X}"
    if t == "float":
        exponent, mantissa = bits >> 23 & 0xFF, bits & 0x7FFFFF
        if exponent == 0xFF:  # by hand: a conversion would quieten a NaN
            bits = bits >> 31 << 63 | 0x7FF << 52 | mantissa << 29
        else:
            value: float = struct.unpack("<f", bits.to_bytes(4, "little"))[0]
            bits = int.from_bytes(struct.pack("<d", value), "little")
    return f"0x{bits:016X}"
