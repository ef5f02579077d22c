"""Draw what benchmarks have written, as the pictures of docs/performance.md.

    python benchmarks/staging.py --json staging.json && python benchmarks/plot.py staging.json staging.svg
    python benchmarks/pipeline.py --json saves.json && python benchmarks/plot.py saves.json saves.svg
    python benchmarks/plot.py docs/measurements.md docs/pictures

It needs matplotlib, which the extra `bench` installs. The pictures of stagings and saves are drawn from what is kept in
benchmarks/figures, the others from the tables of docs/measurements.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
# Text stays text: smaller, and it can be searched. The same input gives the same file.
mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "aiostage", "font.sans-serif": ["DejaVu Sans"], "font.size": 9}

from aims import SIZES, STATES, Tables, number  # noqa: E402
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


def _groups(groups: dict[str, dict[str, float]], floors: Sequence[str], unit: str) -> Any:
    """Draw a group of bars for each title, and striped what is in ``floors``."""
    heights = [len(group) for group in groups.values()]
    figure, axes = plt.subplots(
        len(groups),
        1,
        figsize=(9, 0.45 * len(groups) + 0.24 * sum(heights)),
        height_ratios=heights,
        layout="constrained",
    )
    for axis, (title, group) in zip(axes.flat, groups.items(), strict=True):
        colors = [OURS if "aiostage" in name else OTHERS for name in group]
        bars = axis.barh(list(group), list(group.values()), color=colors)
        for bar, name in zip(bars, group, strict=True):
            if name in floors:
                bar.set(facecolor="white", edgecolor=DARK, hatch="///", lw=0.8)
        axis.bar_label(bars, fmt="%.4g", padding=3)
        axis.set_title(title, loc="left", fontsize=9, fontweight="bold")
        _plain(axis)
    axes.flat[-1].set_xlabel(f"{unit}; striped: plain code that does only that part")
    return figure


def cold(tables: Tables) -> Any:
    """Draw how long a first staging of 2 GiB took in both states of the memory."""
    groups = {}
    for where, state in STATES.items():
        work = f"2 GiB in 64 tensors, cold, {where}"
        rows = [each for each in tables.rows("staging") if each.get("work") == work]
        groups[f"Memory {state}"] = {each["peer"]: number(each["time (least-most)"]) for each in rows}
    return _groups(
        groups, ["two threads", "populate + copy", "populate + copy, 4 KiB pages"], "ms for a first staging of 2 GiB"
    )


def loads(tables: Tables) -> Any:
    """Draw how long loads into tensors that are there took."""
    groups, floors = {}, []
    for name, title in (("in-place", "From the page cache"), ("in-place-cold", "From the disk")):
        rows = [each for each in tables.rows(name) if "way" in each]
        groups[title] = {each["way"].replace("`", ""): number(each["returned"]) for each in rows}
        floors += [way for way in groups[title] if way.endswith("alone") or "digest" in way]
    return _groups(groups, floors, "seconds until a load in place of 2 GiB returns")


def ranks(tables: Tables) -> Any:
    """Draw how long saves of many processes took, and how long they held the loop."""
    names = {"aiostage.dcp.save": OURS, "dcp.async_save": OTHERS, "PyTorch's dcp.save in a thread": "white"}
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), layout="constrained")
    for axis, what, title in (
        (axes[0], "total, s", "seconds until committed"),
        (axes[1], "loop held, ms", "ms: loop held (log)"),
    ):
        for index, (name, color) in enumerate(names.items()):
            values = [tables.number("distributed", size, processes=f"{name}: {what}") for size in SIZES]
            places = [place + 0.27 * (index - 1) for place in range(len(SIZES))]
            floor = {"edgecolor": DARK, "hatch": "///", "lw": 0.8} if color == "white" else {}
            bars = axis.bar(places, values, width=0.25, color=color, label=name, **floor)
            axis.bar_label(bars, fmt="%.2g" if what.endswith(" s") else "%.0f", fontsize=7)
        axis.set_xticks(range(len(SIZES)), [f"{size} process{'es' if size != '1' else ''}" for size in SIZES])
        axis.set_title(title, loc="left", fontsize=9, fontweight="bold")
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[1].set_yscale("log")
    axes[1].set_ylim(1)
    axes[1].axhline(WORST_MS, color=DARK, lw=0.8, ls=":")
    axes[0].legend(frameon=False)
    return figure


def delays(tables: Tables) -> Any:
    """Draw how late the loop was beside stagings, and beside plain work of the same kind."""
    rows = tables.rows("ticks")
    loops = list(dict.fromkeys(each["loop"] for each in rows))
    height = 0.24 * len(rows) / len(loops)
    figure, axes = plt.subplots(1, len(loops), figsize=(9, 0.8 + height), sharey=True, layout="constrained")
    for axis, loop in zip(axes, loops, strict=True):
        mine = [each for each in rows if each["loop"] == loop]
        names = [each["beside"] for each in mine]
        colors = [OURS if name.startswith("aiostage") else "white" for name in names]
        bars = axis.barh(names, [number(each["worst"]) for each in mine], color=colors, edgecolor=DARK, lw=0.5)
        for bar, color in zip(bars, colors, strict=True):
            if color == "white":
                bar.set_hatch("///")
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.plot([number(each["99 %"]) for each in mine], names, "|", color="black", ms=9, mew=2)
        axis.axvline(WORST_MS, color=DARK, lw=0.8, ls=":")
        axis.set_xlim(0, 20)
        axis.set_title(loop, loc="left", fontsize=9, fontweight="bold")
        _plain(axis)
        axis.invert_yaxis()
    axes[0].invert_yaxis()
    figure.supxlabel(
        f"ms: worst delay of the loop (bar), 99 % of ticks (mark); dotted: {WORST_MS}; striped: plain work", fontsize=9
    )
    return figure


TABLES = {"cold": cold, "loads-in-place": loads, "ranks": ranks, "delays": delays}
"""Pictures of tables."""


def _plain(axis: Any) -> None:
    axis.invert_yaxis()
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, help="what a benchmark has written with --json, or docs/measurements.md")
    parser.add_argument("picture", type=Path, help="the SVG to write; of measurements.md, the folder of pictures")
    options = parser.parse_args()
    if options.figures.suffix == ".md":
        tables = Tables(options.figures.read_text())
        pictures = {options.picture / f"{name}.svg": draw(tables) for name, draw in TABLES.items()}
    else:
        figures = json.loads(options.figures.read_text())
        pictures = {options.picture: (staging if "rows" in figures else saves)(figures)}
    for path, picture in pictures.items():
        picture.savefig(path, metadata={"Date": None}, bbox_inches="tight", pad_inches=0.1)


if __name__ == "__main__":
    main()
