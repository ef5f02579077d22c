"""What staging costs, beside its rivals and beside the copy that it cannot do without.

    python benchmarks/staging.py                    # everything, about ten minutes and 16 GiB
    python benchmarks/staging.py --rows 1,3 --json figures.json --uvloop

Peers take turns in a random order. Ratios are the medians of the ratios of paired rounds. A clock ticks beside every
staging, and how late the event loop is to serve it is row 7.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from delays import percentile
from measuring import Samples, cold
from report import machine
from rows import ROWS, Row, leave_rivals_out


@dataclass
class Report:
    """Collects rows, prints them as they come, and knows what was met."""

    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Take a row and print it."""
        self.rows.append(row)
        print(f"\n## {row.number}. {row.work}\n")
        if row.samples:
            print("| peer | median (least-most) | loop delay, 99th percentile | worst |\n| --- | ---: | ---: | ---: |")
        for name, samples in row.samples.items():
            print(f"| {name} | {samples.text()} | {_delay(samples)} |")
        for line in row.notes:
            print(f"\n{line}")
        for name, samples in row.samples.items():
            if samples.timings:
                print(f"\nLast round of {name}, in ms: {_profile(samples.timings)}.")
        print("\n| target | figure | limit | |\n| --- | ---: | ---: | --- |")
        for check in row.checks:
            print(check.as_row())
        sys.stdout.flush()

    def as_json(self) -> dict[str, Any]:
        """Return everything for a file."""
        return {"machine": machine(), "rows": [row.as_json() for row in self.rows]}


def _delay(samples: Samples) -> str:
    if not samples.delays:
        return "- | -"
    return f"{1e3 * percentile(samples.delays, 0.99):.2f} ms | {1e3 * max(samples.delays):.2f} ms"


def _profile(timings: dict[str, float]) -> str:
    return ", ".join(
        f"{name} {1e3 * value:.1f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in timings.items()
        if isinstance(value, (float, int))
    )


async def run(numbers: list[int], rounds: int) -> Report:
    """Measure rows."""
    report = Report()
    begin = perf_counter()
    for number in numbers:
        async for row in ROWS[number](rounds):
            report.add(row)
    checks = [check for row in report.rows for check in row.checks]
    missed = [f"{row.number}: {check.what}" for row in report.rows for check in row.checks if not check.met]
    print(f"\n{len(checks) - len(missed)} of {len(checks)} targets met in {perf_counter() - begin:.0f} s.")
    for line in missed:
        print(f"Not met: {line}")
    return report


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="which rows of the table")
    parser.add_argument("--rounds", type=int, default=7, help="how often each peer is measured")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--uvloop", action="store_true", help="run on uvloop instead of asyncio's own loop")
    parser.add_argument("--alone", action="store_true", help="without rivals: aiostage and its floors only")
    parser.add_argument("--cold", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        leave_rivals_out()
    factory = None
    if arguments.uvloop:
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        if arguments.cold:
            name, work, *options = arguments.cold
            runner.run(cold(name, work, options))
            return
        print(f"{machine()}, {'uvloop' if arguments.uvloop else 'asyncio'}")
        report = runner.run(run([int(number) for number in arguments.rows.split(",")], arguments.rounds))
    if arguments.json:
        arguments.json.write_text(json.dumps(report.as_json(), indent=1))


if __name__ == "__main__":
    main()
