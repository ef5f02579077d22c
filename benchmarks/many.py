"""Saves and loads of many small tensors, beside the save and load of safetensors.

    python benchmarks/many.py [--count 50000] [--rounds 7]

All take turns in one process, warm: each has saved and loaded before. `save_file` leaves the file to the page cache. A
checkpoint is on the disk when it is committed; so *and fsync* stands beside it, the same with that and nothing else.
Ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import random
import statistics
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, NamedTuple

from delays import LoopDelay, percentile
from report import Check, machine
from safetensors.torch import load_file, save_file
from workloads import many_small

import aiostage

SAVE, SAVE_FILE, SYNCED = "aiostage.save", "save_file", "save_file and fsync"
LOAD, LOAD_FILE = "aiostage.load", "load_file"


class Found(NamedTuple):
    """One save or load."""

    seconds: float
    cpu: float
    delays: list[float]


def ways(tree: Any, directory: Path, stager: aiostage.AsyncStager) -> dict[str, Callable[[], Awaitable[object]]]:
    """Return what takes turns."""
    checkpoint, file = directory / "checkpoint", directory / "file.safetensors"

    async def save() -> None:
        await aiostage.save(tree, checkpoint, stager=stager, overwrite=True)

    async def load() -> object:
        return await aiostage.load(checkpoint)

    async def write() -> None:
        save_file(tree, file)

    async def write_synced() -> None:
        save_file(tree, file)
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    async def read() -> object:
        return load_file(file)

    return {SAVE: save, SAVE_FILE: write, SYNCED: write_synced, LOAD: load, LOAD_FILE: read}


async def once(way: Callable[[], Awaitable[object]]) -> Found:
    """Measure one turn. What the turn before has left to write or to collect is not part of it."""
    gc.collect()
    os.sync()
    async with LoopDelay() as delay:
        begin, computed = perf_counter(), process_time()
        kept = await way()
        found = Found(perf_counter() - begin, process_time() - computed, delay.delays)
    # 50,000 tensors take a while to drop.
    del kept
    return found


async def measure(count: int, rounds: int, directory: Path) -> dict[str, list[Found]]:
    """Let all take turns."""
    tree = many_small(count)
    async with aiostage.AsyncStager() as stager:
        each = ways(tree, directory, stager)
        found: dict[str, list[Found]] = {name: [] for name in each}
        for way in each.values():
            for _ in range(2):
                await way()
        for _ in range(rounds):
            for name in random.sample(list(each), len(each)):
                found[name].append(await once(each[name]))
    return found


def ratio(found: dict[str, list[Found]], first: str, second: str, key: str) -> float:
    """Return the median over the rounds of one way's figure by another's."""
    pairs = zip(found[first], found[second], strict=True)
    return statistics.median(getattr(mine, key) / getattr(theirs, key) for mine, theirs in pairs)


def report(found: dict[str, list[Found]]) -> str:
    """Return the tables."""
    lines = ["| way | time (least-most) | CPU | loop delay: 99 % | worst |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, turns in found.items():
        seconds = [1e3 * turn.seconds for turn in turns]
        delays = [delay for turn in turns for delay in turn.delays]
        lines.append(
            f"| `{name}` | {statistics.median(seconds):.0f} ms ({min(seconds):.0f}-{max(seconds):.0f}) "
            f"| {1e3 * statistics.median(turn.cpu for turn in turns):.0f} ms "
            f"| {1e3 * percentile(delays, 0.99):.1f} ms | {1e3 * max(delays, default=0):.1f} ms |"
        )
    checks = [
        Check(f"{SAVE} / {SAVE_FILE}", ratio(found, SAVE, SAVE_FILE, "seconds"), 2),
        Check(f"{SAVE} / {SYNCED}", ratio(found, SAVE, SYNCED, "seconds"), 2),
        Check(f"{SAVE} / {SAVE_FILE}, CPU", ratio(found, SAVE, SAVE_FILE, "cpu"), 2),
        Check(f"{LOAD} / {LOAD_FILE}", ratio(found, LOAD, LOAD_FILE, "seconds"), 1.5),
        Check(f"{LOAD} / {LOAD_FILE}, CPU", ratio(found, LOAD, LOAD_FILE, "cpu"), 1.5),
    ]
    for name in (SAVE, LOAD):
        delays = [delay for turn in found[name] for delay in turn.delays]
        checks.append(Check(f"{name}, 99th percentile of the loop's delay, ms", 1e3 * percentile(delays, 0.99), 1))
        checks.append(Check(f"{name}, worst, ms", 1e3 * max(delays), 5))
    lines += ["", "| target | figure | limit | |", "| --- | ---: | ---: | --- |", *(each.as_row() for each in checks)]
    return "\n".join(lines)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50_000, help="tensors of 1 KiB")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    # Beside the working tree, not in memory: /tmp may be a tmpfs.
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as directory:
        found = asyncio.run(measure(options.count, options.rounds, Path(directory)))
    print(f"{machine()}; {options.count:,} tensors of 1 KiB, {options.rounds} rounds\n")
    print(report(found))


if __name__ == "__main__":
    main()
