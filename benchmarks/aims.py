"""What was aimed at and what is reached, read from the tables of docs/measurements.md.

    python benchmarks/aims.py        # prints the table that publish.py puts into docs/performance.md

A figure is found by the name of its table and of its row. A benchmark that names a row otherwise has to name it
otherwise here, too: what is not found is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

__all__ = ["SIZES", "STATES", "Aim", "Figure", "Span", "Tables", "aims", "number", "table"]

NEAR = 1.1
"""Up to how many times its floor a figure is at it. Two runs of one thing differ by as much on a shared machine."""

Row = dict[str, str]


class Tables:
    """The tables of a document between the marks of their names.

    Args:
        text: The document.
    """

    def __init__(self, text: str) -> None:
        self._text = text

    def rows(self, name: str) -> list[Row]:
        """Return the rows of all tables of a name, each by the heads of its columns.

        Raises:
            ValueError: If there are none.
        """
        found = re.search(rf"<!-- {re.escape(name)} -->(.*?)<!-- end of {re.escape(name)} -->", self._text, re.DOTALL)
        lines = found[1].splitlines() if found else []
        rows: list[Row] = []
        heads: list[str] | None = None
        for line in lines:
            cells = [cell.strip() for cell in line.strip().strip("|").split(" |")] if line.startswith("|") else None
            if cells is None:
                heads = None
            elif heads is None:
                # Some columns have no head: by their numbers.
                heads = [head or str(place) for place, head in enumerate(cells)]
            elif not set(line) <= set("|-: "):
                row = dict(zip(heads, cells, strict=False))
                if rows and "work" in row and not row["work"]:
                    # A further peer of the row above.
                    row |= {head: rows[-1][head] for head in ("row", "work")}
                rows.append(row)
        if not rows:
            raise ValueError(f"docs/measurements.md has no table between <!-- {name} --> and its end")
        return rows

    def cell(self, name: str, column: str, **row: str) -> str:
        """Return what a table says in one place.

        Args:
            name: Of the table.
            column: The head of the column.
            row: Heads and what stands below them in the row; of the heads, spaces are ``_``.

        Raises:
            ValueError: If there is no such place, or more than one.
        """
        wanted = {head.replace("_", " "): value for head, value in row.items()}
        found = [each for each in self.rows(name) if column in each and wanted.items() <= each.items()]
        if len(found) != 1:
            raise ValueError(
                f"{len(found)} rows of {name} in docs/measurements.md have {wanted} and a column {column!r}, and "
                "benchmarks/aims.py reads one: if the benchmark names it otherwise now, change it there, too"
            )
        return found[0][column]

    def number(self, name: str, column: str, **row: str) -> float:
        """Return the first number in one place.

        Raises:
            ValueError: If there is no such place, or no number in it.
        """
        return number(self.cell(name, column, **row))

    def target(self, name: str, target: str, floor: float | None = None, label: str = "", **row: str) -> Figure:
        """Return a figure of a table of targets, with the floor beside it if that table has one.

        Raises:
            ValueError: If it is not there.
        """
        value = self.number(name, "figure", target=target, **row)
        limit = self.cell(name, "limit", target=target, **row)
        if floor is None and any(column.startswith("floor") for each in self.rows(name) for column in each):
            [column] = {column for each in self.rows(name) for column in each if column.startswith("floor")}
            floor = self.number(name, column, target=target, **row)
        least = limit.startswith("at least")
        return Figure(label or target, value, float(limit.split()[-1]), floor, at_least=least)


def number(cell: str) -> float:
    """Return the number that a cell begins with.

    Raises:
        ValueError: If there is none.
    """
    found = re.match(r"-?\d+(\.\d+)?(e[+-]?\d+)?", cell)
    if found is None:
        raise ValueError(f"{cell!r} in docs/measurements.md does not begin with a number")
    return float(found[0])


@dataclass(frozen=True)
class Figure:
    """What was reached, the most that was aimed at, and the least that could be."""

    label: str
    value: float
    limit: float
    floor: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether what was aimed at is reached."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def at_floor(self) -> bool:
        """Whether it is about the least that could be."""
        return self.floor is not None and not self.at_least and self.value <= NEAR * self.floor

    @property
    def bound(self) -> str:
        """What was aimed at."""
        return f"{'at least' if self.at_least else 'at most'} {self.limit:.3g}"

    @property
    def figures(self) -> Sequence[Figure]:
        """This one, as a :class:`Span` has several."""
        return (self,)


@dataclass(frozen=True)
class Span:
    """Figures of one kind, such as the delays of several rows.

    Attributes:
        label: What they have in common.
        figures: Their labels tell them apart.
    """

    label: str
    figures: Sequence[Figure]


def _span(values: Sequence[float]) -> str:
    """Return the least and the most of some values, or the one that they all are; nothing if there is none."""
    return " to ".join(dict.fromkeys(f"{each:.3g}" for each in (min(values), max(values)))) if values else ""


def _verdict(figures: Sequence[Figure]) -> str:
    """Return whether what was aimed at is reached."""
    missed = [each for each in figures if not each.met]
    if not missed:
        return "met"
    if all(each.at_floor for each in missed):
        return "at its floor"
    near = sum(each.at_floor for each in missed)
    besides = f", {near} at the floor" if near else ""
    which = "" if len(figures) == 1 else f": {len(missed) - near} of {len(figures)}"
    return f"not met{which}{besides}"


def _row(part: Figure | Span) -> str:
    """Return the row of one figure, or of several of one kind."""
    missed = [each for each in part.figures if not each.met]
    reached = _span([each.value for each in part.figures])
    where = f" (missed: {', '.join(each.label for each in missed)})" if missed and isinstance(part, Span) else ""
    floor = _span([each.floor for each in missed if each.floor is not None])
    bold = "**" if missed else ""
    verdict, bound = _verdict(part.figures), part.figures[0].bound
    return f"| {part.label} | {bold}{reached}{bold}{where} | {bound} | {floor} | {verdict} |"


@dataclass(frozen=True)
class Aim:
    """Something that was aimed at.

    Attributes:
        what: In a word or two.
        section: Of the measurements.
        parts: What they say of it.
        floor: The experiment that does that part alone.
        note: What stands in place of figures.
        verdict: What stands in place of that of the figures.
    """

    what: str
    section: str
    parts: Sequence[Figure | Span] = ()
    floor: str = ""
    note: str = ""
    verdict: str = ""

    def judged(self) -> str:
        """Return whether it is reached."""
        return self.verdict or _verdict([figure for part in self.parts for figure in part.figures])

    def __str__(self) -> str:
        """Return the rows of the table."""
        link = re.sub(r"[^a-z0-9 -]", "", self.section.lower()).replace(" ", "-")
        head = f"| **[{self.what}](measurements.md#{link})** | {self.note} | | {self.floor} | {self.judged()} |"
        return "\n".join([head, *map(_row, self.parts)])


WORST, P99 = "worst, ms", "99th percentile of the loop's delay, ms"
WORST_MS, P99_MS = 5, 1
SIZES = ("1", "2", "4", "8")
STATES = {"memory that the machine has ready": "ready", "memory as the hypervisor has it": "given back"}
"""Of cold memory."""


def cold_memory(tables: Tables) -> Aim:
    """New memory, in both states of it."""
    figures = []
    for where, state in STATES.items():
        row = f"2: {where}"
        for rival in ("DefaultStager", "torch_checkpointing"):
            # Where it was given back, two threads that do nothing else do not know of it, and are no floor.
            floor = None
            if state == "ready":
                floor = tables.number("staging", "figure", row=row, target=f"two threads / {rival}")
            figures.append(tables.target("staging", f"aiostage / {rival}", floor, f"{state}, by {rival}", row=row))
        better = "aiostage / populate + copy, by the better pages"
        figures.append(tables.target("staging", better, label=f"{state}, by the better way", row=row))
        work = f"2 GiB in 64 tensors, cold, {where}"
        floor = tables.number("staging", WORST, work=work, peer="two threads")
        figures.append(tables.target("staging", f"aiostage, {WORST}", floor, f"{state}, worst delay, ms", row=row))
    return Aim("Cold memory", "Staging", figures, "two threads that only write to new memory and copy")


def delays(tables: Tables) -> Aim:
    """How late the loop is beside stagings: of each row its worst, and in a process that has staged before."""
    parts: list[Figure | Span] = []
    targets = [each for each in tables.rows("staging") if "target" in each]
    for ending, limit, label in ((P99, P99_MS, "99 %, ms"), (WORST, WORST_MS, WORST)):
        rows = [each for each in targets if each["row"][:1] in set("123456") and each["target"].endswith(f", {ending}")]
        figures = []
        for each in rows:
            row, _, state = each["row"].partition(": ")
            shared = "shared" if each["target"].startswith("aiostage, shared") else ""
            which = " ".join(filter(None, (row, STATES.get(state, state), shared)))
            value = float(each["figure"])
            by_floor = _by_floor(targets, each["row"], each["target"].removesuffix(f", {ending}"), ending)
            figures.append(Figure(which, value, limit, value / by_floor if by_floor else None))
        parts.append(Span(label, figures))
    for loop in ("asyncio", "uvloop"):
        ours = [each for each in tables.rows("ticks") if each["loop"] == loop and each["beside"].startswith("aiostage")]
        for column, limit in (("99 %", P99_MS), ("worst", WORST_MS)):
            figures = []
            for each in ours:
                by_floor = each.get(f"{column}, by its floor")
                floor = float(each[column]) / float(by_floor) if by_floor else None
                which = each["beside"].removeprefix("aiostage, ")
                figures.append(Figure(which, float(each[column]), limit, floor))
            parts.append(Span(f"many stagings of a process, {loop}, {column}, ms", figures))
    return Aim("Delays of the loop, rows 1 to 6", "Ticks and their floor", parts, "plain work of the same kind")


def _by_floor(targets: list[Row], row: str, peer: str, ending: str) -> float | None:
    """Return a delay by that of the floor in the same row; None if it has none."""
    short = ending.partition(" of ")[0].partition(", ms")[0]
    names = re.compile(rf"{re.escape(peer)} / .*, {short}")
    ratios = [float(each["figure"]) for each in targets if each["row"] == row and names.fullmatch(each["target"])]
    return ratios[0] if ratios else None


def many_tensors(tables: Tables) -> Aim:
    """Saves and loads of 50,000 tensors."""
    floor = partial(tables.number, "many", way="`objects alone, in a thread`")
    figures = []
    for each in tables.rows("many"):
        if "target" in each:
            target = each["target"]
            column = (
                "worst" if target.endswith("worst, ms") else "loop delay: 99 %" if target.endswith(", ms") else None
            )
            label = target.replace("aiostage.", "").replace("99th percentile of the loop's delay", "99 %")
            figures.append(tables.target("many", target, floor(column) if column else None, label))
    objects = "as many objects made in a thread"
    return Aim("Saves and loads of 50,000 tensors", "Saves and loads of many tensors", figures, objects)


def in_place(tables: Tables) -> Aim:
    """Loads into tensors that are there."""
    ours = "`aiostage.load(in_place=True)`"
    figures = [
        tables.target("in-place", f"{ours} / `preadv` alone", label="cached, by `preadv`"),
        tables.target("in-place", f"{ours}, worst loop delay, ms", label="cached, worst delay, ms"),
        tables.target("in-place-cold", f"{ours} / direct reads alone", label="from the disk, by direct reads"),
        tables.target("in-place-cold", f"{ours}, worst loop delay, ms", label="from the disk, worst delay, ms"),
    ]
    return Aim("Loads in place", "Loads in place, from the page cache", figures, "the same reads and digests alone")


def object_stores(tables: Tables) -> Aim:
    """Saves to and loads from a server that is never the bottleneck."""
    figures = []
    for signed in ("signed", "unsigned"):
        to = f"S3 sink, {signed}"
        floor = tables.number("pipeline", "by the raw write", to=to, way="plain threads")
        figures.append(tables.target("pipeline", f"{to}: aiostage / the raw put", floor, f"save, {signed}, by a put"))
    load = "16 requests at once / obstore's ranged gets alone"
    figures.append(tables.target("loading-remote", load, label="load, by ranged gets"))
    return Aim("Object stores", "What limits saves", figures, "plain threads, or gets, that copy and digest the bytes")


def many_ranks(tables: Tables) -> Aim:
    """Saves and loads of many processes."""
    parts = []
    for row, label in (
        ("until committed / `dcp.async_save`, at most 1", "committed, by `dcp.async_save`"),
        ("load / `dcp.load`, at most 1", "load, by `dcp.load`"),
    ):
        figures = [Figure(size, tables.number("distributed", size, targets=row), 1) for size in SIZES]
        parts.append(Span(f"{label}, 1 to 8 processes", figures))
    # With the collector as Python runs it, a full run of it comes in some turns of either; after gc.freeze() in none.
    for after in ("", " after gc.freeze()"):
        held = []
        for size in SIZES:
            value, floor = (
                tables.number("distributed", size, targets=f"loop held, ms{after}{what}")
                for what in (", at most 5", ": the floor")
            )
            held.append(Figure(size, value, WORST_MS, floor))
        parts.append(Span(f"loop held{after}, ms", held))
    steps = [
        Figure(size, tables.number("distributed", size, targets="longest step on the loop, ms of CPU"), WORST_MS)
        for size in SIZES
    ]
    parts.append(Span("of it the longest step on the loop, ms of CPU", steps))
    return Aim("Many ranks", "Many ranks", parts, "PyTorch's `dcp.save` in a thread")


def growth(tables: Tables) -> Aim:
    """A million tensors, and 8 GiB."""
    processor = "processor time a tensor, of 1,000,000, us"
    by_floor = tables.number("growth", "figure", target="processor time a tensor / that of the calls alone")
    floor = tables.number("growth", "figure", target=processor) / by_floor
    figures = [
        tables.target("growth", "cost a byte, of 8192 MiB by 1024 MiB", label="8 GiB by 1 GiB, a byte"),
        tables.target("growth", "cost a tensor, of 1,000,000 by 10,000", label="1,000,000 by 10,000, a tensor"),
        tables.target("growth", processor, floor, label="CPU a tensor, us"),
    ]
    return Aim("Growth", "Growth", figures, "the calls in C that nothing can replace")


def busy_machine(tables: Tables) -> Aim:
    """Beside a training that takes all cores, and beside a service."""
    plain = ("no staging", "two threads that offer their cores")
    worst = max(number(each["worst"]) for each in tables.rows("busy") if each.get("peer") in plain)
    figures = [
        tables.target("busy", "steps beside aiostage / without a staging", label="training step"),
        tables.target("busy", "worst delay of the loop beside aiostage, ms", worst, "worst delay, ms"),
    ]
    requests = "requests beside aiostage / beside _foreach_copy_ in a thread"
    for each in tables.rows("staging"):
        if each.get("target") == requests:
            label = "requests" if not figures[2:] else "requests beside a training"
            figures.append(tables.target("staging", requests, label=f"{label}, by a bare copy", row=each["row"]))
    return Aim(
        "A busy machine",
        "Beside a training on all cores",
        figures,
        "the training without a staging, or beside a bare copy",
    )


def aims(text: str) -> list[Aim]:
    """Return what was aimed at, with what docs/measurements.md says of it.

    Raises:
        ValueError: If something is not there.
    """
    tables = Tables(text)
    makers = (cold_memory, delays, many_tensors, in_place, object_stores, many_ranks, growth, busy_machine)
    shown = (
        "`make bench-all` writes these pages, `make bench-compare` compares two commits; tests count calls and copies"
    )
    return [
        *(make(tables) for make in makers),
        Aim("Figures to look at", "Measurements", note=shown),
        Aim("GPU", "Measurements", note="`benchmarks/gpu.py` is ready; no GPU was to be had", verdict="not measured"),
    ]


def table(found: Iterable[Aim]) -> str:
    """Return the table."""
    head = ["| | reached | aimed at | floor of what is missed | |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([*head, *map(str, found)])


if __name__ == "__main__":
    print(table(aims((Path(__file__).parent.parent / "docs" / "measurements.md").read_text())))
