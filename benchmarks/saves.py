"""Saves in one way to one place, each beside a raw write of as many bytes, in a process that does nothing else."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from delays import LoopDelay, percentile
from peers import LimitInThread
from places import PLACES
from savers import SAVERS

__all__ = ["Saves", "in_own_process", "measure"]

GIB = 2**30
TENSORS = 64

_LIMIT_SECONDS = 240


@dataclass
class Saves:
    """What became of some saves.

    Attributes:
        place: Where to.
        way: How.
        found: For each save the seconds of the raw write, of a copy of the tensors into warm memory, until the source
            was free, and until it was complete; the growth of memory at its peak, in bytes; seconds of processor time
            of the save and of the raw write;
            and the loop's delays, in seconds, at the 99th percentile and at worst.
        failure: Why there are none.
    """

    place: str
    way: str
    found: list[dict[str, float]] = field(default_factory=list)
    failure: str = ""

    @property
    def later(self) -> list[dict[str, float]]:
        """All but the first, which pays for cold memory and new connections."""
        return self.found[1:] or self.found

    def median(self, key: str) -> float:
        """Return the median of the later saves."""
        return statistics.median(entry[key] for entry in self.later)

    def worst(self, key: str) -> float:
        """Return the most of the later saves."""
        return max(entry[key] for entry in self.later)

    @property
    def ratios(self) -> list[float]:
        """Seconds of each later save by those of the raw write beside it."""
        return [entry["committed"] / entry["raw"] for entry in self.later]

    @property
    def ratio(self) -> float:
        """Their median."""
        return statistics.median(self.ratios)

    def as_row(self) -> str:
        """Return a row of a Markdown table."""
        if self.failure:
            return f"| {self.place} | {self.way} | does not run here: {self.failure} | | | | | | | | | |"
        return (
            f"| {self.place} | {self.way} | {self.median('captured'):.2f} | {self.median('committed'):.2f} | "
            f"{self.median('raw'):.2f} | {self.ratio:.2f} ({min(self.ratios):.2f}-{max(self.ratios):.2f}) | "
            f"{max(entry['peak'] for entry in self.found) / GIB:.2f} | "
            f"{1e3 * self.median('delay'):.1f} | {1e3 * self.worst('worst'):.1f} | {self.found[0]['captured']:.2f} | "
            f"{self.median('processor'):.2f} | {self.median('raw_processor'):.2f} |"
        )


HEAD = (
    "| to | way | captured, s | committed, s | raw write, s | by the raw write | memory, GiB | loop's delay, 99 %, ms "
    "| worst, ms | first captured, s | CPU, s | raw write's CPU, s |\n| --- | --- |" + " ---: |" * 10
)


async def measure(way: str, place_name: str, nbytes: int, saves: int, directory: str) -> list[dict[str, float]]:
    """Save a few times in this process."""
    tree = {f"layer{n}": torch.rand(nbytes // TENSORS // 4) for n in range(TENSORS)}
    place = PLACES[place_name][0](directory, nbytes)
    copying = LimitInThread()
    await copying.stage(tree)
    found = []
    before = resident("VmRSS")
    async with SAVERS[way](place, nbytes) as save:
        for number in range(saves):
            # Whatever drifts is for the one as often as for the other.
            limit = await place.timed_raw() if number % 2 == 0 else {}
            begin = perf_counter()
            await copying.stage(tree)
            copied = perf_counter() - begin
            name = f"step-{number:08}"
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")
            used = resource.getrusage(resource.RUSAGE_SELF)
            begin = perf_counter()
            async with LoopDelay() as loop:
                captured = await save(tree, name)
                committed = perf_counter() - begin
            after = resource.getrusage(resource.RUSAGE_SELF)
            peak = resident("VmHWM") - before
            await place.remove(name)
            found.append(
                {
                    **(limit or await place.timed_raw()),
                    "copy": copied,
                    "captured": captured,
                    "committed": committed,
                    "peak": peak,
                    "processor": after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime,
                    "delay": percentile(loop.delays, 0.99),
                    "worst": max(loop.delays),
                }
            )
    return found


def in_own_process(
    way: str, place: str, nbytes: int, saves: int, *, directory: str, environment: dict[str, str]
) -> Saves:
    """Save a few times in a new process. An error there is the result."""
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        try:
            outcome = subprocess.run(
                [sys.executable, __file__, way, place, str(nbytes), str(saves), scratch],
                capture_output=True,
                text=True,
                timeout=_LIMIT_SECONDS,
                check=False,
                env=os.environ | environment,
            )
        except subprocess.TimeoutExpired:
            return Saves(place, way, failure=f"not done after {_LIMIT_SECONDS} s")
    if outcome.returncode == 0:
        return Saves(place, way, json.loads(outcome.stdout.strip().splitlines()[-1]))
    lines = outcome.stderr.strip().splitlines() or [f"exit status {outcome.returncode}"]
    # What follows the error itself are complaints of what was left behind.
    reason = next((line for line in reversed(lines) if line.partition(":")[0].endswith("Error")), lines[-1])
    return Saves(place, way, failure=reason[:120])


def resident(field: str) -> int:
    """Return a figure of the kernel's about this process, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def main() -> None:
    """Save as the command line says, and print the figures."""
    way, place, nbytes, saves, directory = sys.argv[1:]
    found: Any = asyncio.run(measure(way, place, int(nbytes), int(saves), directory))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
