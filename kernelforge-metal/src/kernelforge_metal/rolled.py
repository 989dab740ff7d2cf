"""Shaders as drivers that compile for a processor should get them: with loops that stay loops.

Mesa writes out a loop whose length it knows. What it hands to LLVM then has every load many times, each a loop over the lanes,
and every barrier, at which a coroutine stops: seconds for a kernel that takes a millisecond. So a loop's length is told when
the shader runs.
"""

from __future__ import annotations

import re

_LOOP = re.compile(r"\bfor \(var (\w+) = (\d+)u;")
_MAIN = re.compile(r"\bfn main\(ids: Ids\) \{")


def rolled(code: str) -> str:
    """The same shader; its loops that begin at a literal begin there plus a zero that the compiler does not know. Shaders whose
    `main` has other parameters than `ids: Ids` are returned as they are."""
    if not (_LOOP.search(code) and _MAIN.search(code)):
        return code
    begun = _LOOP.sub(r"for (var \1 = \2u + rolled_zero;", code)
    # No grid has more than 65535 workgroups along an axis.
    return _MAIN.sub(r"\g<0> rolled_zero = ids.groups.x >> 16u;", begun) + "\nvar<private> rolled_zero: u32;\n"
