"""Everything that can be awaited is cancelled, once and again, at any of its awaits; nothing stays behind."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import os
import sys
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import torch

import aiostage
from aiostage import AsyncStager, StagingOptions
from aiostage.dcp import save as dcp_save
from aiostage.testing import LeakProbe
from tests.fuzz.choices import Choices
from tests.fuzz.classes import OwnCopy

__all__ = ["Leaked", "check_cancelled", "main"]

COPY_BYTES = 1 << 20


class Leaked(AssertionError):
    """Something that a cancelled operation has left behind."""


def source() -> dict[str, Any]:
    return {
        "step": 3,
        "model": {f"p{n}": torch.full((5,), float(n)) for n in range(60)},
        "pair": (torch.ones(2), [torch.zeros(3)]),
        "big": torch.ones(COPY_BYTES // 4),
    }


class Operations:
    """What may be cancelled, over one stager whose budget is one copy."""

    def __init__(self, stager: AsyncStager, folder: Path) -> None:
        self.stager = stager
        self.folder = folder
        self.plain = source()
        self.tree = {**self.plain, "own": OwnCopy([torch.ones(2)]), "sparse": torch.eye(3).to_sparse()}
        self.live = source()
        self.written = 0

    def all(self) -> dict[str, Callable[[], Awaitable[object]]]:
        return {
            "stage": lambda: self.stager.stage(self.tree),
            "snapshot": self.snapshot,
            "results": self.results,
            "save": self.save,
            "load": lambda: aiostage.load(self.folder / "whole"),
            "load into": lambda: aiostage.load(self.folder / "whole", into=self.live),
            "restore": self.restore,
            "dcp": self.dcp,
        }

    async def snapshot(self) -> None:
        async with self.stager.snapshot(self.tree) as snapshot:
            async for leaf in snapshot:
                del leaf
            await snapshot.captured()
            await snapshot.result()

    async def results(self) -> None:
        async with self.stager.snapshot(self.tree) as snapshot:
            await asyncio.gather(snapshot.result(), snapshot.captured(), snapshot.result())

    async def save(self) -> None:
        self.written += 1
        await aiostage.save(self.plain, self.folder / f"saved{self.written}", stager=self.stager)

    async def restore(self) -> None:
        await self.stager.restore(self.saved, into=self.live)

    async def dcp(self) -> None:
        self.written += 1
        to = self.folder / f"dcp{self.written}"
        await dcp_save({"model": self.tree["model"]}, checkpoint_id=to, stager=self.stager, no_dist=True)

    async def prepare(self) -> None:
        await aiostage.save(self.plain, self.folder / "whole")
        async with AsyncStager() as other:
            self.saved = await other.stage(self.plain)


def stale_files(folder: Path) -> list[str]:
    """Return what lies there beside checkpoints that are whole."""
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if ".tmp" in path.name or "pending" in path.name
    )


async def ends(task: asyncio.Task[Any]) -> bool:
    """Return whether a task ends within half a minute; show where everything stands if it does not."""
    # In short waits: of one long wait nothing is left once the process was stopped or frozen meanwhile, for the clock
    # goes on then.
    for _ in range(30):
        if (await asyncio.wait([task], timeout=1))[0]:
            return True
    for each in asyncio.all_tasks():
        each.print_stack(file=sys.stderr)
    faulthandler.dump_traceback(all_threads=True)
    return False


async def cancel(make: Callable[[], Awaitable[object]], choices: Choices) -> str:
    """Run something in a task, and cancel that some times at random moments; return how it ended."""
    task = asyncio.ensure_future(make())
    turns = choices.pick([1, 4, 20, 100, 400, 400])
    for _ in range(choices.pick([1, 2, 2, 5])):
        for _ in range(choices.below(turns)):
            if not task.done():
                await asyncio.sleep(0)
        task.cancel()
        turns = choices.pick([1, 2, 5])
    if not await ends(task):
        raise Leaked("it never ends")
    if task.cancelled():
        return "cancelled"
    if task.exception() is not None:
        raise Leaked(f"{type(task.exception()).__name__}: {task.exception()}")
    return "done"


async def check_cancelled(operations: Operations, name: str, choices: Choices) -> str:
    """Cancel an operation, and look for what it has left behind.

    Raises:
        Leaked: If there is anything.
    """
    stager = operations.stager
    # No collector helps: memory that waits for it is memory that the next staging waits for.
    gc.disable()
    try:
        ended = await cancel(operations.all()[name], choices)
        for _ in range(3):
            # A task and its waiters are released in the next turn of the loop.
            await asyncio.sleep(0)
        statistics = stager.statistics()
        if statistics.leases or statistics.waiting:
            raise Leaked(f"{ended}, with {statistics.leases} leases and {statistics.waiting} waiting")
        next_staging = asyncio.ensure_future(stager.stage(operations.tree))
        if not await ends(next_staging):
            raise Leaked(f"{ended}, and the next staging never ends: {stager.statistics()}")
        staged = next_staging.result()
        if float(staged["model"]["p7"][0]) != 7:
            raise Leaked("the next staging has wrong values")
    finally:
        gc.enable()
    return ended


async def check_seeds(n: int, seed: int, results: Counter[str]) -> list[str]:
    """Cancel ``n`` operations, up to 50 with one stager; return what was wrong."""
    failures: list[str] = []
    numbers = list(range(seed, seed + n))
    while numbers:
        failures += await check_some(numbers, results)
    return failures


async def check_some(numbers: list[int], results: Counter[str]) -> list[str]:
    """Take seeds off a list and check them, up to 50 or the first that fails; return what was wrong."""
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncStager(StagingOptions(max_loop_hold=1e-9, max_host_bytes=2 * COPY_BYTES)) as stager:
            operations = Operations(stager, Path(folder))
            await operations.prepare()
            for make in operations.all().values():
                await make()
            names = list(operations.all())
            probe = LeakProbe(stager, ignore_threads=("asyncio_", "AnyIO worker", "aiostage-"))
            for _ in range(min(50, len(numbers))):
                number = numbers.pop(0)
                name = names[number % len(names)]
                try:
                    results[f"{name}: {await check_cancelled(operations, name, Choices(number))}"] += 1
                except Leaked as error:
                    failures.append(f"seed {number}: {name}: {error}")
                    return failures
            failures += await look(probe, number, Path(folder))
    return failures


async def look(probe: LeakProbe, number: int, folder: Path) -> list[str]:
    """Return what is left of all cancellations so far."""
    try:
        await probe.settled()
    except AssertionError as error:
        return [f"up to seed {number}: {error}"]
    return [f"up to seed {number}: {name}" for name in stale_files(folder)]


def main(n: int, seed: int) -> int:
    """Cancel ``n`` operations; print how they ended. Return how many have left something behind."""
    warnings.simplefilter("ignore")
    results: Counter[str] = Counter()
    failures = asyncio.run(check_seeds(n, seed, results))
    for failure in failures:
        print(failure, file=sys.stderr)
    for what, count in sorted(results.items()):
        print(f"{count:6} cancellations of {what}")
    print(
        f"{len(failures):6} cancellations failed; {threading.active_count()} threads and "
        f"{len(os.listdir('/proc/self/fd'))} descriptors are left"
    )
    return len(failures)
