"""The picture that the demonstration draws."""

from __future__ import annotations

import runpy
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

PICTURE = runpy.run_path(str(Path(__file__).parent.parent.parent / "examples" / "demo" / "picture.py"))
Bar, Strip, draw = PICTURE["Bar"], PICTURE["Strip"], PICTURE["draw"]
SVG = "{http://www.w3.org/2000/svg}"
LANES = {"train": "#111111", "write": "#222222"}


def parts(*strips: Any, begin: float = 0.0, end: float = 10.0) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Return the bars and the dots of a picture, by colour of lane and in order."""
    root = ElementTree.fromstring(draw(strips, LANES, begin=begin, end=end, title="all"))
    bars = [found.attrib for found in root.iter(f"{SVG}rect") if found.get("fill") in LANES.values()]
    dots = [found.attrib for found in root.iter(f"{SVG}circle")]
    numbers = [
        [{k: float(v) for k, v in found.items() if k not in ("fill", "r")} for found in kind] for kind in (bars, dots)
    ]
    return numbers[0], numbers[1]


def test_strips_share_a_time_axis() -> None:
    one = Strip("one", [Bar("train", 2.0, 4.0), Bar("write", 5.0, 10.0)], [(2.0, 0.01)])
    other = Strip("other", [Bar("write", 2.0, 4.0)], [(2.0, 0.01)])
    bars, dots = parts(one, other)
    assert bars[0]["x"] == bars[2]["x"] == dots[0]["cx"] == dots[1]["cx"]
    assert bars[0]["width"] == bars[2]["width"]
    assert (bars[1]["x"] - bars[0]["x"]) / 3 == pytest.approx((bars[0]["width"] + 0.4) / 2, abs=0.1)
    assert bars[0]["y"] < bars[1]["y"] < dots[0]["cy"] < bars[2]["y"], "from top to bottom"


def test_what_lies_outside_of_the_axis_is_cut() -> None:
    strip = Strip(
        "", [Bar("train", -5.0, 5.0), Bar("train", 20.0, 30.0), Bar("write", 9.0, 99.0)], [(-1.0, 1.0), (11.0, 1.0)]
    )
    bars, dots = parts(strip)
    assert not dots
    assert len(bars) == 2
    whole = Strip("", [Bar("train", 0.0, 10.0)], [])
    (full,), _ = parts(whole)
    assert bars[0]["x"] == full["x"]
    assert bars[1]["x"] + bars[1]["width"] == pytest.approx(full["x"] + full["width"], abs=0.2)


def test_dots_are_on_a_log_scale_that_has_an_end() -> None:
    delays = [0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 1000.0]
    _, dots = parts(Strip("", [], [(1.0, delay) for delay in delays]))
    heights = [dot["cy"] for dot in dots]
    assert heights[0] == heights[1]
    assert heights[-1] == heights[-2]
    steps = [above - below for above, below in pairwise(heights[1:-1])]
    assert steps == pytest.approx([steps[0]] * len(steps), abs=0.2)
    assert steps[0] > 5


def test_titles_are_text_and_short_work_is_seen() -> None:
    text = draw([Strip("a < b & c", [Bar("train", 1.0, 1.0)], [])], LANES, begin=-1e-4, end=1e-3, title="<script>")
    root = ElementTree.fromstring(text)
    assert {"a < b & c", "<script>"} <= {found.text for found in root.iter(f"{SVG}text")}
    bars, _ = parts(Strip("", [Bar("train", 1.0, 1.0)], []))
    assert bars[0]["width"] > 0


def test_the_committed_picture_is_small() -> None:
    path = Path(__file__).parent.parent.parent / "docs" / "pictures" / "demo.svg"
    assert path.stat().st_size < 100_000
    assert ElementTree.parse(path).getroot().tag == f"{SVG}svg"
