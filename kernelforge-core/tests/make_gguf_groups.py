"""Makes `data/gguf_groups.npz`: numbers, and what the quantisers of the `gguf` package make of them.

python make_gguf_groups.py   # needs gguf (0.19.0 made what is here) and numpy, in an environment of their own
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, quants


def main() -> None:
    rng = np.random.default_rng(20)
    normal = rng.standard_normal((6, 8, 32)) * np.array([1.0, 0.02, 1e-3, 1e4, 3e-6, 2e-8])[:, None, None]
    heavy = rng.standard_t(2, (16, 32)) * 0.05
    ties = rng.integers(-127, 128, (8, 32)) / 2.0
    ties[:, 0] = 127.0  # the scale of Q8_0 is 1: halves stay halves
    mirrored = np.sign(rng.standard_normal((8, 32))) * np.abs(
        rng.integers(1, 9, (8, 32))
    )  # the largest with both signs
    special = [
        np.zeros(32),
        np.ones(32),
        -np.ones(32),
        np.tile([8.0, -8.0], 16),
        np.where(np.arange(32) == 31, 5.0, 0.0),
    ]
    x = np.concatenate([normal.reshape(-1, 32), heavy, ties, mirrored, np.array(special)]).astype(np.float32)
    made: dict[str, Any] = {"x": x}
    for name in ("Q4_0", "Q8_0"):
        made[name] = quants.quantize(x, GGMLQuantizationType[name])
        made[f"{name}_numbers"] = quants.dequantize(made[name], GGMLQuantizationType[name])
    np.savez_compressed(Path(__file__).parent / "data" / "gguf_groups.npz", **made)


if __name__ == "__main__":
    main()
