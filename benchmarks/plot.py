"""Draws jobs per second over the length of a job, as an SVG.

    python benchmarks/run.py --scenario job-length --json > lengths.json
    python benchmarks/plot.py lengths.json lengths.svg

Both axes are logarithmic. The legend has the contenders in the order of their rates for
the shortest jobs.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 860, 520
LEFT, TOP, RIGHT, BOTTOM = 84, 52, 640, 456  # of the axes
OURS = "dbpool_executor"

# Okabe and Ito's, which are told apart by everyone, in the order of the contenders.
COLOURS = ["#d55e00", "#0072b2", "#009e73", "#cc79a7", "#b8860b"]
COLOURS += ["#56b4e9", "#7a4fb5", "#8c564b", "#555555", "#111111"]
DASHES = ["", "7 3", "2 3", "9 3 2 3"]

Points = list[tuple[float, float]]


def curves(run: dict[str, Any]) -> dict[str, Points]:
    """Give jobs per second by milliseconds, for each contender."""
    found: dict[str, Points] = {}
    for figure, by_name in run["samples"]["job-length"].items():
        match = re.fullmatch(r"us a job of (\S+) ms", figure)
        assert match, figure
        for name, microseconds in by_name.items():
            rate = 1e6 / statistics.median(microseconds)
            found.setdefault(name, []).append((float(match[1]), rate))
    return found


class Axis:
    """A logarithmic axis.

    Args:
        least: The least value that must be on it.
        most: The greatest.
        start: Where it begins on the paper.
        stop: Where it ends.
    """

    def __init__(self, least: float, most: float, start: float, stop: float) -> None:
        self._low, self._high = math.log10(least), math.log10(most)
        self._start, self._stop = start, stop

    def __call__(self, value: float) -> float:
        """Give the place of a value on the paper."""
        part = (math.log10(value) - self._low) / (self._high - self._low)
        return self._start + part * (self._stop - self._start)

    def ticks(self) -> Iterator[tuple[float, str]]:
        """Give 1, 2 and 5 of each decade, and what is written there."""
        for decade in range(math.floor(self._low), math.ceil(self._high) + 1):
            for digit in (1, 2, 5):
                value = digit * 10.0**decade
                if self._low - 1e-9 <= math.log10(value) <= self._high + 1e-9:
                    yield value, f"{value:,g}" if value < 1 else f"{value:,.0f}"


def draw(run: dict[str, Any]) -> Iterator[str]:
    """Give the lines of the SVG."""
    found = curves(run)
    lengths = [length for points in found.values() for length, _ in points]
    rates = [rate for points in found.values() for _, rate in points]
    x = Axis(min(lengths), max(lengths), LEFT, RIGHT)
    y = Axis(min(rates) / 1.2, max(rates) * 1.2, BOTTOM, TOP)
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="13">'
    )
    yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    title = f"Jobs per second over the length of a job, {run['workers']} workers"
    yield _text(LEFT, 28, title, size=16)
    for value, label in x.ticks():
        yield _line(x(value), TOP, x(value), BOTTOM)
        yield _text(x(value), BOTTOM + 20, label, anchor="middle")
    for value, label in y.ticks():
        yield _line(LEFT, y(value), RIGHT, y(value))
        yield _text(LEFT - 8, y(value) + 4, label, anchor="end")
    yield _text((LEFT + RIGHT) / 2, BOTTOM + 44, "ms that a job computes", "middle")
    middle = (TOP + BOTTOM) / 2
    turned = f'transform="rotate(-90 20 {middle})"'
    yield _text(20, middle, "jobs per second", "middle", more=turned)
    names = sorted(found, key=lambda name: -found[name][0][1])
    # Ours is drawn last, over the others.
    for name in sorted(found, key=lambda name: name == OURS):
        style = _style(name, list(found))
        points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in found[name])
        yield f'<polyline fill="none" {style} points="{points}"/>'
    for row, name in enumerate(names):
        height = TOP + 12 + 24 * row
        style = _style(name, list(found))
        yield (
            f'<line x1="{RIGHT + 18}" y1="{height}" x2="{RIGHT + 54}" y2="{height}" '
            f"{style}/>"
        )
        yield _text(RIGHT + 62, height + 4, name)
    yield "</svg>"


def _style(name: str, names: list[str]) -> str:
    number = names.index(name)
    dash = "" if name == OURS else DASHES[number % len(DASHES)]
    return (
        f'stroke="{COLOURS[number % len(COLOURS)]}" stroke-dasharray="{dash or "none"}" '
        f'stroke-width="{3.5 if name == OURS else 1.8}"'
    )


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
        'stroke="#dddddd"/>'
    )


def _text(
    x: float, y: float, text: str, anchor: str = "start", size: int = 13, more: str = ""
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="#222222" text-anchor="{anchor}" '
        f'font-size="{size}" {more}>{escape(text)}</text>'
    )


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text("\n".join(draw(json.loads(source.read_text()))) + "\n")
