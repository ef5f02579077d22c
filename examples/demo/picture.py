"""A timeline of several runs as an SVG file, drawn without a library.

All strips share one time axis. A strip has a lane for each kind of work, and below them dots on a log scale: how late
something was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Bar", "Strip", "draw"]

WIDTH, LEFT, RIGHT = 960, 92, 16
LANE, DOTS, HEAD, GAP = 16, 78, 22, 16
LEAST, MOST = 1e-4, 10.0
"""Seconds at the lower and the upper end of the scale of the dots."""


@dataclass(frozen=True)
class Bar:
    """Work in one lane, in seconds on the common axis."""

    lane: str
    begin: float
    end: float


@dataclass(frozen=True)
class Strip:
    """One run.

    Attributes:
        title: What is written above it.
        bars: Its work, in any order.
        dots: Moments, and how late something was at each, in seconds.
    """

    title: str
    bars: Sequence[Bar]
    dots: Sequence[tuple[float, float]]


def draw(strips: Sequence[Strip], lanes: Mapping[str, str], *, begin: float, end: float, title: str) -> str:
    """Return the picture.

    Args:
        strips: From top to bottom. What lies outside of the axis is not drawn.
        lanes: The colour of each lane, from top to bottom.
        begin: Of the time axis, in seconds.
        end: Of the time axis, in seconds.
        title: What is written above all strips.
    """
    height = 34 + len(strips) * (HEAD + LANE * len(lanes) + DOTS + GAP) + 22
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">',
            "<style>text{font-family:system-ui,sans-serif;font-size:11px;fill:#333}.h{font-size:13px;font-weight:600}.e{text-anchor:end}"
            ".m{text-anchor:middle}line{stroke:#ddd}</style>",
            f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
            f'<text class="h" x="{LEFT}" y="20">{escape(title)}</text>',
            *_axis(begin, end, height),
            *(line for number, strip in enumerate(strips) for line in _strip(strip, number, lanes, begin, end)),
            "</svg>\n",
        ]
    )


def _x(moment: float, begin: float, end: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (moment - begin) / (end - begin)


def _axis(begin: float, end: float, height: int) -> Iterator[str]:
    """Draw vertical lines at round times."""
    step = next(step for step in _round_steps() if (end - begin) / step <= 12)
    for number in range(math.ceil(begin / step), math.floor(end / step) + 1):
        x = _x(number * step, begin, end)
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="34" y2="{height - 22}"/>'
        yield f'<text class="m" x="{x:.1f}" y="{height - 8}">{number * step:g} s</text>'


def _round_steps() -> Iterator[float]:
    power = -3
    while True:
        for digit in (1, 2, 5):
            yield digit * 10.0**power
        power += 1


def _strip(strip: Strip, number: int, lanes: Mapping[str, str], begin: float, end: float) -> Iterator[str]:
    top = 34 + number * (HEAD + LANE * len(lanes) + DOTS + GAP)
    yield f'<text class="h" x="{LEFT}" y="{top + 14}">{escape(strip.title)}</text>'
    top += HEAD
    for lane, colour in lanes.items():
        yield f'<text class="e" x="{LEFT - 8}" y="{top + 11}">{escape(lane)}</text>'
        for bar in strip.bars:
            if bar.lane == lane and bar.end > begin and bar.begin < end:
                first, last = _x(max(bar.begin, begin), begin, end), _x(min(bar.end, end), begin, end)
                # A gap between bars that follow each other, and no bar that cannot be seen.
                width = max(0.8, last - first - 0.4)
                yield f'<rect x="{first:.1f}" y="{top + 2}" width="{width:.1f}" height="{LANE - 4}" fill="{colour}"/>'
        top += LANE
    bottom = top + DOTS
    for level, name in ((1e-3, "1 ms"), (1e-2, "10 ms"), (1e-1, "100 ms"), (1.0, "1 s")):
        y = _y(level, top, bottom)
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="e" x="{LEFT - 8}" y="{y + 4:.1f}">{name}</text>'
    for moment, late in strip.dots:
        if begin <= moment <= end:
            colour = "#2a9d5c" if late < 0.01 else "#d98a1f" if late < 0.1 else "#d0453e"
            x, y = _x(moment, begin, end), _y(late, top, bottom)
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.7" fill="{colour}"/>'


def _y(late: float, top: float, bottom: float) -> float:
    part = math.log(min(MOST, max(LEAST, late)) / LEAST) / math.log(MOST / LEAST)
    return bottom - (bottom - top) * part
