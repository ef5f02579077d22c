"""How soon a coroutine runs after an event is done, and what waiting for it costs, by every way of waiting.

The events are simulated: they are done at a known time, and asking is a comparison. Their durations vary by a share
that is given, as those of real copies do. Every round takes the ways in a new random order; the first one is left out.

    python benchmarks/events.py --rounds 15 --loop uvloop
    python benchmarks/events.py --waiters 300 --seconds 1
    python benchmarks/events.py --cuda

With ``--waiters`` so many coroutines wait at once, for events that are spread over the time. With ``--cuda`` the events
are those of copies of a GiB and less into pinned memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import trio
import uvloop
from anyio import create_task_group, sleep, to_thread
from anyio.lowlevel import checkpoint

from aiostage import wait_event

BYTES_PER_SECOND = 25e9


class SimulatedEvent:
    """Done at a known time."""

    def __init__(self, seconds: float, jitter: float, rng: random.Random) -> None:
        self.queries = 0
        self.nbytes = int(seconds * BYTES_PER_SECOND)
        self.began = time.monotonic()
        self.done_at = self.began + seconds * (1 + rng.gauss(0, jitter))

    def query(self) -> bool:
        self.queries += 1
        return time.monotonic() >= self.done_at

    def synchronize(self) -> None:
        """Block as the driver does when it is told not to spin."""
        time.sleep(max(self.done_at - time.monotonic(), 0))

    def completed_at(self) -> float:
        return self.done_at


class CudaEvent:
    """Behind a copy into pinned memory. When it was done is known from the device's own clock."""

    device: Any = None
    host: Any = None

    def __init__(self, seconds: float, jitter: float, rng: random.Random) -> None:
        import torch

        nbytes = max(int(min(seconds * BYTES_PER_SECOND, 1 << 30)), 1 << 20)
        if CudaEvent.device is None:
            CudaEvent.device = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
            CudaEvent.host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
        self.queries, self.nbytes = 0, nbytes
        start, self._event = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        self.began = time.monotonic()
        CudaEvent.host[:nbytes].copy_(CudaEvent.device[:nbytes], non_blocking=True)
        self._event.record()
        self._start = start

    def query(self) -> bool:
        self.queries += 1
        return bool(self._event.query())

    def synchronize(self) -> None:
        self._event.synchronize()

    def completed_at(self) -> float:
        return self.began + self._start.elapsed_time(self._event) / 1e3


Way = Callable[[Any], Awaitable[None]]


async def fixed_interval(event: Any) -> None:
    while not event.query():
        await sleep(0.001)


async def half_a_millisecond(event: Any) -> None:
    while not event.query():
        await sleep(0.0005)


async def blocking_thread(event: Any) -> None:
    await to_thread.run_sync(event.synchronize)


async def busy(event: Any) -> None:
    while not event.query():
        await checkpoint()


WAYS: dict[str, Way] = {
    "wait_event": wait_event,
    "sleep(0.001) in a loop": fixed_interval,
    "sleep(0.0005) in a loop": half_a_millisecond,
    "to_thread(event.synchronize)": blocking_thread,
    "sleep(0) in a loop": busy,
}


@dataclass
class Figures:
    """What was measured of one way and one duration."""

    latencies: list[float] = field(default_factory=list)
    cores: list[float] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)

    def row(self) -> dict[str, float]:
        return {
            "median_us": statistics.median(self.latencies) * 1e6,
            "worst_us": max(self.latencies) * 1e6,
            "core_percent": statistics.median(self.cores) * 100,
            "most_queries": max(self.queries),
        }


async def measure(
    kind: type[Any], seconds: float, rounds: int, jitter: float, seed: int, waiters: int = 1
) -> dict[str, Figures]:
    rng = random.Random(seed)
    figures = {name: Figures() for name in WAYS}
    for number in range(rounds + 1):
        for name in rng.sample(list(WAYS), len(WAYS)):
            latencies: list[float] = []
            queries: list[int] = []
            before, began = time.process_time(), time.monotonic()

            async def wait(share: float, name: str = name, here: Any = (latencies, queries)) -> None:
                event = kind(seconds * share, jitter, rng)
                await WAYS[name](event)
                here[0].append(time.monotonic() - event.completed_at())
                here[1].append(event.queries)

            async with create_task_group() as group:
                for waiter in range(waiters):
                    group.start_soon(wait, (waiter + 1) / waiters)
            spent = time.process_time() - before
            if number == 0:
                # The first of all imports and compiles things.
                continue
            figures[name].latencies += latencies
            figures[name].cores.append(spent / (time.monotonic() - began))
            figures[name].queries.append(max(queries))
    return figures


def run_on(loop: str, main: Callable[..., Any], *arguments: Any) -> Any:
    if loop == "trio":
        return trio.run(main, *arguments)
    return (uvloop.run if loop == "uvloop" else asyncio.run)(main(*arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, nargs="+", default=[0.01, 0.1, 1.0])
    parser.add_argument("--loop", nargs="+", default=["asyncio", "uvloop", "trio"])
    parser.add_argument("--jitter", type=float, default=0.0003, help="standard deviation, as a share of the duration")
    parser.add_argument("--waiters", type=int, default=1, help="as many at once, spread over the time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    kind = CudaEvent if options.cuda else SimulatedEvent
    rows = []
    for loop in options.loop:
        for seconds in options.seconds:
            measured = run_on(
                loop, measure, kind, seconds, options.rounds, options.jitter, options.seed, options.waiters
            )
            rows += [{"loop": loop, "seconds": seconds, "way": way, **it.row()} for way, it in measured.items()]
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(table(rows, options.seconds))


def table(rows: list[dict[str, Any]], durations: list[float]) -> str:
    """Return a row for each loop and way: how late at each duration, and what waiting for the longest costs."""
    longest = max(durations)
    late = " | ".join(f"{seconds:g} s: late by (worst)" for seconds in durations)
    lines = [f"| loop | way | {late} | core, {longest:g} s | `query()`, {longest:g} s |"]
    lines.append("| --- | --- |" + " ---: |" * (len(durations) + 2))
    found = {(row["loop"], row["way"], row["seconds"]): row for row in rows}
    for loop, way in dict.fromkeys((row["loop"], row["way"]) for row in rows):
        each = [found[loop, way, seconds] for seconds in durations]
        delays = " | ".join(f"{row['median_us']:.0f} us ({row['worst_us']:.0f})" for row in each)
        last = found[loop, way, longest]
        lines.append(f"| {loop} | `{way}` | {delays} | {last['core_percent']:.1f} % | {last['most_queries']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
