"""Statistics of repeated timings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Latency:
    """Seconds of one run: order statistics, which a slow moment of the machine does not move."""

    median: float
    minimum: float
    maximum: float
    p5: float
    p95: float
    mad: float
    """Median absolute deviation from the median; times 1.4826 it estimates the standard deviation of normal noise."""
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Latency:
        """Raises ValueError when there are no samples."""
        if not samples:
            raise ValueError("no samples")
        middle = median(samples)
        ordered = sorted(samples)
        return cls(
            median=middle,
            minimum=ordered[0],
            maximum=ordered[-1],
            p5=_quantile(ordered, 0.05),
            p95=_quantile(ordered, 0.95),
            mad=median(abs(s - middle) for s in samples),
            count=len(ordered),
        )

    def milliseconds(self) -> dict[str, float]:
        """The times in milliseconds, by name, and the count."""
        times = {
            "median": self.median,
            "min": self.minimum,
            "max": self.maximum,
            "p5": self.p5,
            "p95": self.p95,
            "mad": self.mad,
        }
        return {name: float(f"{value * 1e3:.5g}") for name, value in times.items()} | {"count": self.count}


def _quantile(ordered: Sequence[float], q: float) -> float:
    """Linear interpolation between the order statistics (numpy's default)."""
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])
