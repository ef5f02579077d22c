"""Saves and loads of many small tensors, beside the save and load of safetensors.

    python benchmarks/many.py [--count 50000] [--rounds 7]

All take turns in one process, warm: each has saved and loaded before. `save_file` leaves the file to the page cache. A
checkpoint is on the disk when it is committed; so *and fsync* stands beside it, the same with that and nothing else.
Ratios are medians over the rounds. Delays are those of turns of their own: a clock that ticks every millisecond takes
time of a loop that runs, and none of one that is held. *Objects alone* is the floor of the delays: Python in a thread
beside a loop.
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
from time import perf_counter, process_time, sleep
from typing import Any, NamedTuple

import torch
from delays import LoopDelay, percentile
from report import Check, machine
from safetensors.torch import load_file, save_file
from workloads import many_small

import aiostage

SAVE, SAVE_FILE, SYNCED = "aiostage.save", "save_file", "save_file and fsync"
LOAD, LOAD_FILE, LOAD_BESIDE = "aiostage.load", "load_file", "load_file in a thread"
PLAIN = "objects alone, in a thread"

TURN = 0.0003
"""Seconds after which the thread of :func:`make_objects` gives the GIL away."""


class Found(NamedTuple):
    """One save or load."""

    seconds: float
    cpu: float
    delays: list[float]


REPEATS = 3
"""So that it takes about as long as a load."""


def make_objects(count: int, kept: list[object]) -> None:
    """Make what a load of so many tensors cannot do without: memory, tensors over it, and a container for each.

    It gives the GIL away like a considerate thread, and has the collector run over young objects as often as aiostage
    does, and never over the whole heap, which takes 140 ms and more.
    """
    usual = gc.get_threshold()
    gc.set_threshold(8000, usual[1], 1000)
    for _ in range(REPEATS):
        given = perf_counter()
        for number in range(count):
            memory = torch.empty(1024, dtype=torch.uint8)
            tensor = torch.empty(0).set_(memory.untyped_storage(), 0, (256,), (1,))
            kept.append({"name": f"tensor.{number}", "memory": memory, "tensor": tensor})
            if perf_counter() - given > TURN:
                sleep(1e-6)
                given = perf_counter()
    gc.set_threshold(*usual)


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

    async def make() -> object:
        # Not as the result of the thread, which its executor would keep for a while.
        kept: list[object] = []
        await asyncio.to_thread(make_objects, len(tree), kept)
        return kept

    async def read_beside() -> object:
        kept: list[object] = []
        await asyncio.to_thread(lambda: kept.append(load_file(file)))
        return kept

    return {
        SAVE: save,
        SAVE_FILE: write,
        SYNCED: write_synced,
        LOAD: load,
        LOAD_FILE: read,
        LOAD_BESIDE: read_beside,
        PLAIN: make,
    }


async def once(way: Callable[[], Awaitable[object]]) -> Found:
    """Measure one turn. What the turn before has left to write or to collect is not part of it."""
    settle()
    begin, computed = perf_counter(), process_time()
    kept = await way()
    seconds, cpu = perf_counter() - begin, process_time() - computed
    # 50,000 tensors take a while to drop.
    del kept
    settle()
    async with LoopDelay() as delay:
        kept = await way()
    del kept
    return Found(seconds, cpu, delay.delays)


def settle() -> None:
    """Write and collect what the turn before has left."""
    gc.collect()
    os.sync()


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
        Check(f"{LOAD} / {LOAD_BESIDE}", ratio(found, LOAD, LOAD_BESIDE, "seconds"), 1.5),
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
