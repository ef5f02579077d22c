"""Whether staging and writing overlap: a save beside staging alone and writing alone, against a throttled storage.

Where both take as long as each other a save should take little more than the one, and never their sum. The storage
takes bytes at a fixed rate and needs no processor for it, as a network does. The source is memory of the host, whose
copy keeps all cores of a small machine busy, or a simulated device, whose copy engine moves 2 GB/s by itself.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import AsyncIterable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from plain_threads import PlainCopies
from report import Check
from workloads import few_large

import aiostage
from aiostage.abc import Buffer, PendingCheckpoint, Reader, Storage
from aiostage.testing import SimulatedAccelerator

__all__ = ["HEAD", "Overlap", "overlaps"]

BALANCES = {"1:1": 1.0, "1:3": 3.0, "3:1": 1 / 3}
"""Of staging to writing, and what writing takes by what staging takes."""

_DEVICE_BANDWIDTH = 2e9
_LEAST_SLEEP = 0.002
"""Shorter sleeps would be longer than asked for."""

_OVERSLEPT = 0.005

HEAD = (
    "| source | staging : writing | staging alone, s | writing alone, s | save, s | by the slower | by their sum |"
    "\n| --- | --- | ---: | ---: | ---: | ---: | ---: |"
)


class Throttled(Storage):
    """Takes bytes at a rate, and keeps none."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    async def open(self, name: str, *, overwrite: bool = False) -> PendingCheckpoint:
        return _ThrottledCheckpoint(self.rate)

    async def read(self, name: str) -> Reader:
        raise NotImplementedError

    async def list(self) -> Sequence[str]:
        return ()

    async def pending(self) -> Sequence[str]:
        return ()

    async def delete(self, name: str) -> None:
        pass

    async def clean_up(self) -> None:
        pass


class _ThrottledCheckpoint(PendingCheckpoint):
    location = "throttled"

    def __init__(self, rate: float) -> None:
        self._rate = rate

    async def write(self, name: str, nbytes: int, parts: AsyncIterable[Buffer]) -> None:
        due = perf_counter()
        async for part in parts:
            # A line that had nothing to do does not catch up; one whose sleeps were too long does.
            due = max(due, perf_counter() - _OVERSLEPT) + len(part) / self._rate
            del part
            if due - perf_counter() > _LEAST_SLEEP:
                await asyncio.sleep(due - perf_counter())
        await asyncio.sleep(max(0, due - perf_counter()))

    async def commit(self, manifest: Buffer) -> None:
        pass

    async def abort(self) -> None:
        pass


@dataclass
class Overlap:
    """One source and one balance, measured in paired rounds."""

    source: str
    balance: str
    rounds: list[tuple[float, float, float]]
    plain: list[float] = field(default_factory=list)
    """Seconds of plain threads beside each round: two copy, one digests, and the same storage takes the parts."""

    @property
    def ratio(self) -> float:
        """Of a save to the slower of staging and writing."""
        return statistics.median(both / max(stage, write) for stage, write, both in self.rounds)

    @property
    def of_sum(self) -> float:
        """Of a save to both, one after the other."""
        return statistics.median(both / (stage + write) for stage, write, both in self.rounds)

    def as_row(self) -> str:
        """Return a row of a Markdown table."""
        stage, write, both = (statistics.median(times) for times in zip(*self.rounds, strict=True))
        return (
            f"| {self.source} | {self.balance} | {stage:.2f} | {write:.2f} | {both:.2f} | {self.ratio:.2f} | "
            f"{self.of_sum:.2f} |"
        )

    @property
    def floor(self) -> float:
        """Of plain threads to the slower of staging and writing."""
        pairs = zip(self.plain, self.rounds, strict=True)
        return statistics.median(plain / max(stage, write) for plain, (stage, write, _) in pairs)

    def checks(self) -> list[Check]:
        """Return whether it is as it should be."""
        name = f"save from {self.source}, {self.balance}"
        found = [Check(f"{name} / the slower of staging and writing", self.ratio, 1.15)]
        if self.plain:
            pairs = zip(self.plain, self.rounds, strict=True)
            ours = statistics.median(both / plain for plain, (_, _, both) in pairs)
            found.append(Check(f"{name} / plain threads, which take {self.floor:.2f} of the slower", ours, 1.15))
        return found


async def overlaps(nbytes: int, rounds: int) -> list[Overlap]:
    """Measure every source and balance."""
    found = await _with_stager("host memory", aiostage.AsyncStager(), few_large(nbytes), rounds, PlainCopies(nbytes))
    nbytes //= 4
    with SimulatedAccelerator(bandwidth=_DEVICE_BANDWIDTH, memory_bytes=2 * nbytes) as device:
        tree = {path: device.to_device(tensor) for path, tensor in few_large(nbytes).items()}
        found += await _with_stager("a device", aiostage.AsyncStager(backend=device), tree, rounds)
        del tree
    return found


async def _with_stager(
    source: str,
    stager: aiostage.AsyncStager,
    tree: dict[str, Any],
    rounds: int,
    copies: PlainCopies | None = None,
) -> list[Overlap]:
    nbytes = sum(tensor.nbytes for tensor in tree.values())
    async with stager:
        seconds = statistics.median([await _stage(stager, tree) for _ in range(4)][1:])
        found = []
        for balance, share in BALANCES.items():
            measured = Overlap(source, balance, [])
            for _ in range(rounds):
                rate = nbytes / seconds / share
                measured.rounds.append(await _round(stager, tree, rate))
                if copies is not None:
                    begin = perf_counter()
                    await _ThrottledCheckpoint(rate).write("", nbytes, copies.parts(tree, []))
                    measured.plain.append(perf_counter() - begin)
            found.append(measured)
        return found


async def _stage(stager: aiostage.AsyncStager, tree: dict[str, Any]) -> float:
    begin = perf_counter()
    async with stager.snapshot(tree) as snapshot:
        await snapshot.captured()
        return perf_counter() - begin


async def _round(stager: aiostage.AsyncStager, tree: dict[str, Any], rate: float) -> tuple[float, float, float]:
    storage = Throttled(rate)
    stage = await _stage(stager, tree)
    async with stager.snapshot(tree) as snapshot:
        await snapshot.captured()
        begin = perf_counter()
        await aiostage.save(snapshot, (storage, "alone"))
        write = perf_counter() - begin
    begin = perf_counter()
    await aiostage.save(tree, (storage, "both"), stager=stager)
    return stage, write, perf_counter() - begin
