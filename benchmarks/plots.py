"""Plots as SVG text: lines and points on linear or logarithmic axes, and bars in groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 30, 44
BAR, GAP = 16, 14


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    title: str = ""
    """Shown when the pointer rests on it."""


@dataclass(frozen=True)
class Series:
    name: str
    color: str
    points: tuple[Point, ...]
    line: bool = True
    """Joined by a line."""
    marks: bool = True
    """A dot at each point."""
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    label: str
    low: float
    high: float
    base: int = 0
    """Of the logarithm; 0: linear."""

    @classmethod
    def around(cls, label: str, values: Sequence[float], base: int = 0) -> Axis:
        """One that holds all values: from 0 when linear, else from a power of the base to another."""
        top = max(values, default=1.0)
        if not base:
            return cls(label, 0.0, top * 1.05 or 1.0)
        floor, ceiling = (math.log(v, base) for v in (min(values, default=1.0), top))
        low, high = math.floor(floor + 1e-9), math.ceil(ceiling - 1e-9)
        return cls(label, float(base**low), float(base ** max(high, low + 1)), base)

    def share(self, value: float) -> float:
        """Where `value` is between the ends, 0 to 1 inside."""
        if self.base:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round numbers, about five."""
        if self.base:
            first, last = round(math.log(self.low, self.base)), round(math.log(self.high, self.base))
            step = max(1, (last - first) // 6)
            return [float(self.base**i) for i in range(first, last + 1, step)]
        rough = (self.high - self.low) / 5
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * f for f in (1, 2, 5, 10) if power * f >= rough)
        return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def xy_plot(title: str, x: Axis, y: Axis, series: Sequence[Series], *, width: int = WIDTH, height: int = HEIGHT) -> str:
    """Lines and points with a legend below."""
    right, bottom = width - RIGHT, height - BOTTOM

    def place(point: Point) -> tuple[float, float]:
        return LEFT + x.share(point.x) * (right - LEFT), bottom - y.share(point.y) * (bottom - TOP)

    parts = [_text(LEFT, 16, title, weight="600")]
    for tick in x.ticks():
        at = LEFT + x.share(tick) * (right - LEFT)
        parts += [_line(at, TOP, at, bottom, "grid"), _text(at, bottom + 15, _number(tick), anchor="middle")]
    for tick in y.ticks():
        at = bottom - y.share(tick) * (bottom - TOP)
        parts += [_line(LEFT, at, right, at, "grid"), _text(LEFT - 6, at + 4, _number(tick), anchor="end")]
    parts.append(_text((LEFT + right) / 2, height - 10, x.label, anchor="middle"))
    parts.append(_text(14, (TOP + bottom) / 2, y.label, anchor="middle", turned=True))
    for one in series:
        placed = [place(p) for p in one.points]
        if one.line and len(placed) > 1:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in placed)
            dash = ' stroke-dasharray="5 4"' if one.dashed else ""
            parts.append(f'<polyline points="{path}" fill="none" stroke="{one.color}" stroke-width="1.8"{dash}/>')
        if one.marks:
            parts += [
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.6" fill="{one.color}" fill-opacity="0.85">'
                f"<title>{escape(p.title)}</title></circle>"
                for (a, b), p in zip(placed, one.points, strict=True)
            ]
    return _figure(parts, series, width, height)


def bar_plot(title: str, unit: str, groups: Sequence[tuple[str, Sequence[tuple[str, str, float]]]]) -> str:
    """Horizontal bars: groups of (name, colour, value), each bar with its number."""
    label, width = 190, 2 * WIDTH
    top = max((value for _, bars in groups for _, _, value in bars), default=1.0) or 1.0
    parts, at = [_text(4, 16, f"{title}, {unit}", weight="600")], float(TOP)
    for name, bars in groups:
        parts.append(_text(label - 8, at + BAR * len(bars) / 2 + 4, name, anchor="end"))
        for who, color, value in bars:
            length = max(1.0, value / top * (width - label - 150))
            parts.append(
                f'<rect x="{label}" y="{at:.0f}" width="{length:.1f}" height="{BAR - 2}" fill="{color}">'
                f"<title>{escape(f'{name}, {who}: {value:.4g} {unit}')}</title></rect>"
            )
            parts.append(_text(label + length + 6, at + BAR - 5, f"{value:.4g}  {who}"))
            at += BAR
        at += GAP
    return _figure(parts, (), width, int(at))


def _figure(parts: Sequence[str], series: Sequence[Series], width: int, height: int) -> str:
    keys = "".join(f'<span><i style="background:{s.color}"></i>{escape(s.name)}</span>' for s in series if s.name)
    legend = f'<figcaption class="legend">{keys}</figcaption>' if keys else ""
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
        f"{''.join(parts)}</svg>{legend}</figure>"
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "400", turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}"{turn}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _number(value: float) -> str:
    return f"{value:g}"
