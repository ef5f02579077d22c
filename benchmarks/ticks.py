"""How late an event loop serves its ticks beside staging, and beside no more than the work that any staging is made of.

    python benchmarks/ticks.py --rounds 5

What stands beside aiostage is the least code that does a part of it, with nothing of aiostage in it. "Tensors": 50,000
tensors made over one buffer, in slices of 0.4 ms between which the loop has two turns. "Tensors and copies": beside
that two threads copy 2 MiB a call without the GIL and offer their cores after each. "Copies": the threads alone, for as
long. "Copies to new memory": they write to memory of which the kernel has the pages ready, in a fresh mapping. All on
asyncio and on uvloop. What is late there is late because of CPython's collector, its GIL, the kernel or the hypervisor.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any

import numpy as np
import torch
import uvloop
from delays import LoopDelay, percentile
from measuring import WARM_UPS
from report import machine
from workloads import few_large, have_ready, many_small

import aiostage

COUNT, MOVE_BYTES, COPIED_BYTES = 50_000, 2 << 20, 1 << 30
SLICE_SECONDS, PAUSE_SECONDS = 0.0004, 0.05

Work = Callable[[], Awaitable[object]]


async def tensors() -> list[torch.Tensor]:
    """Make tensors over one buffer, in slices."""
    rows = np.zeros((COUNT, 256), dtype=np.float32)
    made: list[torch.Tensor] = []
    while len(made) < COUNT:
        end = perf_counter() + SLICE_SECONDS
        while len(made) < COUNT and perf_counter() < end:
            made += map(torch.from_numpy, rows[len(made) : len(made) + 32])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    return made


class Copies:
    """Two threads that copy. The calls release the GIL.

    Args:
        memory: What they write to, again and again where it ends.
    """

    def __init__(self, memory: np.ndarray[Any, Any], nbytes: int | None = None) -> None:
        self.source = np.ones(MOVE_BYTES, dtype=np.uint8)
        self.memory = memory
        self.pieces = iter(range((nbytes or memory.nbytes) // MOVE_BYTES))
        self.stopped = False

    def run(self) -> None:
        """Copy what is left."""
        parts = self.memory.nbytes // MOVE_BYTES
        for piece in self.pieces:
            if self.stopped:
                return
            os.sched_yield()
            ctypes.memmove(self.memory.ctypes.data + piece % parts * MOVE_BYTES, self.source.ctypes.data, MOVE_BYTES)

    async def done(self) -> None:
        """Wait for both threads."""
        await asyncio.gather(asyncio.to_thread(self.run), asyncio.to_thread(self.run))

    @asynccontextmanager
    async def beside(self) -> AsyncIterator[None]:
        """Copy while the block runs."""
        threads = [threading.Thread(target=self.run) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.stopped = True
            for thread in threads:
                await asyncio.to_thread(thread.join)


async def ticks(prepare: Callable[[], Work], rounds: int, *, collects: bool = True) -> list[float]:
    """Return the delay of each tick beside some work, in seconds. One more round before is not measured."""
    delays: list[float] = []
    await prepare()()
    for _ in range(rounds):
        work = prepare()
        gc.collect()
        await asyncio.sleep(PAUSE_SECONDS)
        if not collects:
            gc.disable()
        try:
            async with LoopDelay() as delay:
                kept = await work()
        finally:
            gc.enable()
        del kept, work
        delays += delay.delays
    return delays


async def measure(rounds: int) -> dict[str, tuple[str, list[float]]]:
    """Return the delays of all ways, each with the way that is its floor."""
    warm = np.ones(256 << 20, dtype=np.uint8)
    found: dict[str, tuple[str, list[float]]] = {}

    def copies() -> Work:
        return Copies(warm, 2 * COPIED_BYTES).done

    def both() -> Work:
        async def work() -> object:
            async with Copies(warm, 1 << 40).beside():
                return await tensors()

        return work

    def cold() -> Work:
        have_ready(COPIED_BYTES)
        memory = mmap.mmap(-1, COPIED_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        return Copies(np.frombuffer(memory, np.uint8)).done

    found["tensors"] = "", await ticks(lambda: tensors, rounds)
    found["tensors and copies"] = "", await ticks(both, rounds)
    found["copies"] = "", await ticks(copies, rounds)
    found["copies to new memory"] = "", await ticks(cold, rounds)
    small, large = many_small(COUNT), few_large(COPIED_BYTES)
    for name, tree, floor, options in (
        ("aiostage, 50,000 tensors of 1 KiB", small, "tensors and copies", {}),
        ("aiostage, the same in shared memory", small, "tensors and copies", {"use_shared_memory": True}),
        ("aiostage, 1 GiB in 64 tensors", large, "copies", {}),
    ):
        async with aiostage.AsyncStager(aiostage.StagingOptions(**options)) as stager:
            for _ in range(WARM_UPS):
                await stager.stage(tree)
            found[name] = floor, await ticks(lambda: lambda: stager.stage(tree), rounds)  # noqa: B023 - called here
            if tree is small and not options:
                found[f"{name}, no collector"] = (
                    floor,
                    await ticks(lambda: lambda: stager.stage(tree), rounds, collects=False),  # noqa: B023 - called here
                )
    small.clear()

    def first() -> Work:
        have_ready(COPIED_BYTES)
        return lambda: aiostage.AsyncStager().stage(large)

    found["aiostage, 1 GiB in 64 tensors, to new memory"] = "copies to new memory", await ticks(first, rounds)
    return found


LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


def measure_on(loop: str, rounds: int) -> None:
    """Print the rows of one event loop."""
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        found = runner.run(measure(rounds))
    for name, (floor, delays) in found.items():
        late, worst = 1e3 * percentile(delays, 0.99), 1e3 * max(delays)
        by = " | "
        if floor:
            least = found[floor][1]
            by = f"{late / 1e3 / percentile(least, 0.99):.2f} | {worst / 1e3 / max(least):.2f}"
        print(f"| {loop} | {name} | {len(delays)} | {late:.2f} | {worst:.2f} | {by} |", flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loop", choices=LOOPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        measure_on(options.loop, options.rounds)
        return
    print(f"{machine()}; delays of ticks of 1 ms, in ms; the target is 1 for 99 % of them and 5 for all\n")
    print("| loop | beside | ticks | 99 % | worst | 99 %, by its floor | worst, by its floor |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for loop in LOOPS:
        # Each in a process of its own: what one leaves in the heap is the next one's.
        subprocess.run([sys.executable, __file__, "--loop", loop, "--rounds", str(options.rounds)], check=True)


if __name__ == "__main__":
    main()
