"""Draw what benchmarks have written, as the pictures of docs/performance.md.

    python benchmarks/staging.py --json staging.json && python benchmarks/plot.py staging.json staging.svg
    python benchmarks/pipeline.py --json saves.json && python benchmarks/plot.py saves.json saves.svg

It needs matplotlib, which the extra `bench` installs. benchmarks/figures has what the pictures there are drawn from.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
# Text stays text: smaller, and it can be searched. The same input gives the same file.
mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "aiostage", "font.sans-serif": ["DejaVu Sans"], "font.size": 9}

from matplotlib import pyplot as plt  # noqa: E402 - how it draws is said before
from matplotlib.ticker import NullLocator  # noqa: E402

OURS, OTHERS, DARK = "#4db6ac", "#b9c2cc", "#5b6773"
WORST_MS = 5
"""The delay of the event loop that a staging should not exceed."""


def staging(figures: dict[str, Any]) -> Any:
    """Draw how long stagings took, and how late they made the event loop, a line of bars for each row."""
    # The row of the HTTP service has no times of stagings.
    rows = [row for row in figures["rows"] if any(each["seconds"] for each in row["samples"].values())]
    heights = [sum(bool(each["seconds"]) for each in row["samples"].values()) for row in rows]
    figure, axes = plt.subplots(
        len(rows), 2, figsize=(9, 0.55 * len(rows) + 0.24 * sum(heights)), height_ratios=heights, layout="constrained"
    )
    for (time, delay), row in zip(axes.reshape(-1, 2), rows, strict=True):
        names = [name for name, each in row["samples"].items() if each["seconds"]]
        samples = [row["samples"][name] for name in names]
        colors = [OURS if name.startswith("aiostage") else OTHERS for name in names]
        medians = [1e3 * statistics.median(each["seconds"]) for each in samples]
        least = [median - 1e3 * min(each["seconds"]) for median, each in zip(medians, samples, strict=True)]
        most = [1e3 * max(each["seconds"]) - median for median, each in zip(medians, samples, strict=True)]
        bars = time.barh(names, medians, xerr=(least, most), color=colors, error_kw={"ecolor": DARK, "lw": 0.8})
        time.bar_label(bars, fmt="%.0f", padding=3, label_type="center", color="black")
        time.set_title(row["work"], loc="left", fontsize=9, fontweight="bold")
        # A bare copy holds the thread that it runs in; it has no event loop to delay.
        worst = [1e3 * each["delay_worst"] for each in samples]
        bars = delay.barh(names, [max(each - 1, 0) for each in worst], left=1, color=colors)
        delay.bar_label(bars, labels=[f"{each:.0f}" if each else "" for each in worst], padding=3)
        delay.set_xscale("log")
        delay.set_xlim(1, 10_000)
        delay.xaxis.set_major_formatter("{x:,.0f}")
        delay.xaxis.set_minor_locator(NullLocator())
        delay.axvline(WORST_MS, color=DARK, lw=0.8, ls=":")
        delay.tick_params(labelleft=False)
        for axis in (time, delay):
            _plain(axis)
    axes.reshape(-1, 2)[-1][0].set_xlabel("ms for a staging: median, least to most")
    axes.reshape(-1, 2)[-1][1].set_xlabel(f"ms: worst delay of the event loop meanwhile (log); dotted: {WORST_MS}")
    return figure


def saves(figures: dict[str, Any]) -> Any:
    """Draw how long the trainer waited for saves, and how long they took, a bar for each way."""
    found = [each for each in figures["disk"] if not each["failure"]]

    def median(saves: dict[str, Any], key: str) -> float:
        return statistics.median(entry[key] for entry in saves["found"][1:] or saves["found"])

    figure, axis = plt.subplots(figsize=(9, 0.5 + 0.35 * len(found)), layout="constrained")
    names = [each["way"] for each in found]
    colors = [OURS if name.startswith("aiostage") else DARK for name in names]
    captured, committed = ([median(each, key) for each in found] for key in ("captured", "committed"))
    bars = axis.barh(names, committed, color=OTHERS, label="until it is committed")
    axis.bar_label(bars, fmt="%.2f", padding=3)
    axis.barh(names, captured, color=colors, height=0.45, label="until the trainer may go on")
    raw = statistics.median(median(each, "raw") for each in found)
    axis.axvline(raw, color="black", lw=0.8, ls=":", label="a raw write of as many bytes")
    axis.set_xlabel("seconds for a save to the disk")
    axis.legend(frameon=False, loc="upper right")
    _plain(axis)
    return figure


def _plain(axis: Any) -> None:
    axis.invert_yaxis()
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, help="what a benchmark has written with --json")
    parser.add_argument("picture", type=Path, help="the SVG to write")
    options = parser.parse_args()
    figures = json.loads(options.figures.read_text())
    draw = staging if "rows" in figures else saves
    draw(figures).savefig(options.picture, metadata={"Date": None}, bbox_inches="tight", pad_inches=0.1)


if __name__ == "__main__":
    main()
