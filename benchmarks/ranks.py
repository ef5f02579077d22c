"""The tables of docs/scaling.md, from the longer ones of docs/measurements.md.

python benchmarks/ranks.py        # prints what publish.py puts into docs/scaling.md
"""

from __future__ import annotations

import re
from pathlib import Path

from aims import SIZES, Row, Tables

__all__ = ["tables"]

OURS, PYTORCH, PLAIN, FLOOR = "aiostage.dcp.save", "dcp.async_save", "dcp.save", "PyTorch's dcp.save in a thread"

WAITS, TOTAL, CPU = "training waits, s", "total, s", "CPU of all ranks, s"

SECONDS = {
    f"`{OURS}`: training waits, s": f"{OURS}: {WAITS}",
    f"`{OURS}`: until committed, s": f"{OURS}: {TOTAL}",
    f"`{OURS}`: CPU of all ranks, s": f"{OURS}: {CPU}",
    f"`{PYTORCH}`: training waits, s": f"{PYTORCH}: {WAITS}",
    f"`{PYTORCH}`: until committed, s": f"{PYTORCH}: {TOTAL}",
    f"`{PYTORCH}`: CPU of all ranks, s": f"{PYTORCH}: {CPU}",
    f"`{PLAIN}`: training waits, until committed, s": f"{PLAIN}: {TOTAL}",
    "`aiostage.dcp.load`, s": f"aiostage.dcp.load: {TOTAL}",
    "`dcp.load`, s": f"dcp.load: {TOTAL}",
}
"""What the short tables say, by what the long one says."""

COMMITTED, LOADED = f"until committed / `{PYTORCH}`", "load / `dcp.load`"

RATIOS = {
    COMMITTED: f"{COMMITTED}, at most 1",
    "interval of that": f"{COMMITTED}: interval of 95 %",
    f"CPU / `{PYTORCH}`": f"CPU / `{PYTORCH}`",
    f"CPU, saves in a row / `{PYTORCH}`": f"CPU, saves in a row / `{PYTORCH}`",
    f"training waits / `{PYTORCH}`": f"training waits / `{PYTORCH}`",
    LOADED: f"{LOADED}, at most 1",
    "interval of the loads": f"{LOADED}: interval of 95 %",
}

HELD = {
    f"`{OURS}`": f"{OURS}: loop held, ms",
    "of it the longest step on the loop, CPU": f"{OURS}: longest step, ms of CPU",
    "the longest run of the collector, CPU": f"{OURS}: longest run of the collector, ms of CPU",
    f"the floor: `{PLAIN}` in a thread beside a loop that only ticks": f"{FLOOR}: loop held, ms",
    f"`{PYTORCH}`": f"{PYTORCH}: loop held, ms",
    f"`{PLAIN}`": f"{PLAIN}: loop held, ms",
    f"`{OURS}`, after `gc.freeze()`": f"{OURS}: loop held after gc.freeze(), ms",
    "the floor, after `gc.freeze()`": f"{FLOOR}: loop held after gc.freeze(), ms",
}


def tables(measurements: str) -> dict[str, str]:
    """Return the tables by the names of their marks in docs/scaling.md.

    Args:
        measurements: The text of docs/measurements.md.

    Raises:
        ValueError: If it has no such figure.
    """
    when, rounds = (
        re.search(rf"<!-- distributed -->.*?({said})", measurements, re.DOTALL)
        for said in (r"On [0-9-]+, at commit \w+\.", r"medians of [0-9, ]+ rounds")
    )
    if when is None or rounds is None:
        raise ValueError("docs/measurements.md does not say of many ranks when, or how often, they were measured")
    rows = Tables(measurements).rows("distributed")
    return {
        "ranks": f"{when[1]} M{rounds[1][1:]}.\n\n{_table('processes', SECONDS, rows)}",
        "ranks-ratios": _table("processes", RATIOS, rows),
        "ranks-loop": _table("how long the event loop was held, worst, ms", HELD, rows),
    }


def _table(head: str, wanted: dict[str, str], rows: list[Row]) -> str:
    lines = [f"| {head} | {' | '.join(SIZES)} |", "| --- |" + " ---: |" * len(SIZES)]
    for label, name in wanted.items():
        found = [row for row in rows if name in (row.get("targets"), row.get("processes"))]
        if len(found) != 1:
            raise ValueError(f"{len(found)} rows of many ranks in docs/measurements.md are called {name!r}")
        lines.append(f"| {label} | {' | '.join(_shown(name, found[0][size]) for size in SIZES)} |")
    return "\n".join(lines)


def _shown(name: str, cell: str) -> str:
    """Return a figure with as many digits as say something: of seconds three, of ratios two, of milliseconds two."""
    if "interval" in name:
        return cell
    if name.endswith(", s"):
        return f"{float(cell):.3f}"
    if ", ms" in name:
        return f"{float(cell):.1f}" if float(cell) < 10 else f"{float(cell):.0f}"
    return f"{float(cell):.2f}"


if __name__ == "__main__":
    for each in tables((Path(__file__).parent.parent / "docs" / "measurements.md").read_text()).values():
        print(f"{each}\n")
