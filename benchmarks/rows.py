"""The rows of the table: what is measured, and what it should come to."""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from busy import Training
from delays import LoopDelay, percentile
from echo import Echo
from floor import Floor, timed
from measuring import WARM_UPS, Samples, cold_turns, fails, turns
from peers import PEERS, Peer
from report import Check
from workloads import Adam350M, few_large, leaves_of, many_small

__all__ = ["ROWS", "Row", "leave_rivals_out"]

GIB, MIB = 2**30, 2**20
_COPIES = 8
"""Made back to back, by each peer in each round."""

RIVALS = ["DefaultStager", "torch_checkpointing"]
WARM = ["aiostage", *RIVALS, "copy.deepcopy"]

THREADS, SLICES = "two threads that offer their cores", "plain slices"
"""The floors of the loop's delay: of few large tensors and of many small ones."""


@dataclass
class Row:
    """One row, measured."""

    number: int
    work: str
    samples: dict[str, Samples] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def at_most(self, limit: float, *others: str, of: str = "aiostage") -> None:
        """Add a check of a peer's time by others'."""
        for other in others:
            if not self.samples[other].failure:
                figure = self.samples[of].ratio(self.samples[other])
                self.checks.append(Check(f"{of} / {other}", figure, limit))

    def punctual(self, floor: str = "") -> None:
        """Add the checks of the event loop's delay.

        Args:
            floor: The peer whose delays aiostage's are divided by: the least code that does such a part of it.
        """
        for name, samples in self.samples.items():
            if not name.startswith("aiostage"):
                continue
            self.checks += [
                Check(f"row 7: {name}, 99th percentile of the loop's delay, ms", _p99(samples), 1),
                Check(f"row 7: {name}, worst, ms", 1e3 * max(samples.delays), 5),
            ]
            if floor:
                least = self.samples[floor]
                # The floor may be over sooner, and 1 % of its ticks be fewer: as many late ticks are compared.
                share = 1 - len(samples.delays) / len(least.delays) / 100
                as_many = 1e3 * percentile(least.delays, max(0.0, share))
                self.checks += [
                    Check(f"row 7: {name} / {floor}, 99th percentile", _p99(samples) / as_many, 1.1),
                    Check(f"row 7: {name} / {floor}, worst", max(samples.delays) / max(least.delays), 1.1),
                ]

    def as_json(self) -> dict[str, Any]:
        """Return everything for a file."""
        samples = {name: each.as_json() for name, each in self.samples.items()}
        checks = [check.as_json() for check in self.checks]
        return {"row": self.number, "work": self.work, "samples": samples, "checks": checks, "notes": self.notes}


def leave_rivals_out() -> None:
    """Let the rows measure aiostage and its floors only."""
    RIVALS.clear()
    WARM[:] = ["aiostage"]


def _p99(samples: Samples) -> float:
    return 1e3 * percentile(samples.delays, 0.99)


def _peers(names: list[str]) -> dict[str, Peer]:
    return {name: PEERS[name]() for name in names}


async def large_warm(rounds: int) -> AsyncIterator[Row]:
    """Measure 2 GiB in 64 tensors, warm."""
    tree = few_large()
    row = Row(1, "2 GiB in 64 tensors, warm")
    names = ["aiostage", *RIVALS, "_foreach_copy_", "two threads, warm", THREADS]
    row.samples = await turns(_peers(names), lambda: tree, rounds)
    # By itself: the kernel is busy for a while with the memory that it gives back each time.
    if RIVALS:
        row.samples |= await turns(_peers(["copy.deepcopy"]), lambda: tree, rounds, warm_ups=1)
    row.at_most(1.10, "_foreach_copy_")
    # The floor: the same copies and nothing else, beside the same event loop.
    row.at_most(1.10, "two threads, warm")
    row.at_most(1.10, "_foreach_copy_", of="two threads, warm")
    row.at_most(1.0, *RIVALS[1:])
    row.punctual(THREADS)
    yield row


async def large_cold(rounds: int) -> AsyncIterator[Row]:
    """Measure 2 GiB in 64 tensors, first staging."""
    names = [*WARM, "populate + copy", "populate + copy, 4 KiB pages", "two threads"]
    for state, where in (
        ("ready", "memory that the machine has ready"),
        ("given-back", "memory as the hypervisor has it"),
    ):
        row = Row(2, f"2 GiB in 64 tensors, cold, {where}")
        row.samples = await cold_turns(names, "large", rounds, state)
        row.notes.append(_of_state(row.samples))
        # The rivals fault in as the kernel does it. Where that is slow, staging may not be slower for its own way.
        row.at_most(0.4 if state == "ready" else 1.1, *RIVALS)
        populated = [each for name, each in row.samples.items() if name.startswith("populate") and not each.failure]
        if populated:
            figure = row.samples["aiostage"].ratio(min(populated, key=attrgetter("median")))
            row.checks.append(Check("aiostage / populate + copy, by the better pages", figure, 1.1))
        # The floor of what the targets by the rivals ask for: nothing but the copies.
        row.at_most(1.1, "two threads")
        if state == "ready":
            row.at_most(0.4, *RIVALS, of="two threads")
        row.punctual()
        yield row


def _of_state(samples: dict[str, Samples]) -> str:
    """Say how often memory was not in the state that a row is about."""
    count = sum(len(each.seconds) for each in samples.values())
    again = ", ".join(f"{name} {each.repeated}" for name, each in samples.items() if each.repeated)
    never = ", ".join(f"{name} {each.strayed}" for name, each in samples.items() if each.strayed)
    return (
        f"{count} stagings, each measured again, three times at most, where memory was in another state. "
        f"Measured again: {again or 'none'}. In another state to the last: {never or 'none'}."
    )


async def small_warm(rounds: int) -> AsyncIterator[Row]:
    """Measure 50,000 tensors of 1 KiB, warm."""
    tree = many_small()
    row = Row(3, "50,000 tensors of 1 KiB, warm")
    row.samples = await turns(_peers([*WARM, "_foreach_copy_", SLICES]), lambda: tree, rounds)
    row.at_most(1 / 12, *RIVALS)
    row.punctual(SLICES)
    yield row


async def small_cold(rounds: int) -> AsyncIterator[Row]:
    """Measure 50,000 tensors of 1 KiB, first staging."""
    row = Row(4, "50,000 tensors of 1 KiB, cold")
    row.samples = await cold_turns([*WARM, SLICES], "small", rounds)
    row.at_most(1 / 5, *RIVALS)
    row.punctual(SLICES)
    yield row


async def small_shared(rounds: int) -> AsyncIterator[Row]:
    """Measure 50,000 tensors of 1 KiB in memory that another process can open."""
    tree = many_small()
    row = Row(5, "50,000 tensors of 1 KiB, shared memory, warm")
    peers = {"aiostage, shared": PEERS["aiostage"](use_shared_memory=True), **_peers(["aiostage", SLICES])}
    row.samples = await turns(peers, lambda: tree, rounds)
    row.at_most(1.3, "aiostage", of="aiostage, shared")
    row.punctual(SLICES)
    for name in RIVALS:
        row.samples[f"{name}, shared"] = await fails(name, "small", "shared")
    yield row
    row = Row(5, "50,000 tensors of 1 KiB, shared memory, cold")
    shared = await cold_turns(["aiostage"], "small", rounds, "shared")
    row.samples = {"aiostage, shared": shared["aiostage"], **await cold_turns(["aiostage", SLICES], "small", rounds)}
    row.at_most(1.3, "aiostage", of="aiostage, shared")
    row.punctual(SLICES)
    yield row


async def adam(rounds: int) -> AsyncIterator[Row]:
    """Measure the state of a model and its optimizer."""
    trained = Adam350M()
    gc.collect()
    leaves = leaves_of(trained.state_dict())
    nbytes = sum(leaf.nbytes for leaf in leaves)
    row = Row(6, f"model and Adam of 350 M parameters, {len(leaves)} tensors, {nbytes / GIB:.2f} GiB, warm")
    names = ["aiostage", "_foreach_copy_", "two threads, warm", THREADS]
    if _available() > 5.2 * nbytes:
        names += RIVALS
    else:
        row.notes.append("Too little memory for the rivals.")
    row.samples = await turns(_peers(names), trained.state_dict, rounds)
    row.at_most(1.15, "_foreach_copy_")
    row.at_most(1.15, "two threads, warm")
    row.at_most(1.15, "_foreach_copy_", of="two threads, warm")
    row.punctual(THREADS)
    yield row


async def casting(rounds: int) -> AsyncIterator[Row]:
    """Measure staging float32 as bfloat16."""
    tree = few_large()
    row = Row(8, "2 GiB of float32 staged as bfloat16")
    peak = await _peak_growth(PEERS["aiostage"](dtype=torch.bfloat16), tree)
    row.checks.append(Check("growth of peak memory, MiB", peak / MIB, GIB / MIB + 64))
    peers = {"aiostage, cast": PEERS["aiostage"](dtype=torch.bfloat16), **_peers(["aiostage", THREADS])}
    row.samples = await turns(peers, lambda: tree, rounds)
    row.at_most(1.0, "aiostage", of="aiostage, cast")
    row.punctual(THREADS)
    yield row


async def _peak_growth(peer: Peer, tree: Any) -> float:
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    await peer.stage(tree)
    growth = _status("VmHWM") - before
    await peer.close()
    return growth


def _status(name: str) -> int:
    """Return a figure of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _available() -> int:
    """Return how much memory can be had, in bytes; the kernel's caches give way."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024


async def serving(rounds: int) -> AsyncIterator[Row]:
    """Measure an HTTP service while 2 GiB is copied again and again, by each peer equally often."""
    tree = few_large()
    work = "requests a second of an HTTP service while 2 GiB is staged back to back"
    yield await _served(Row(9, f"{work}, alone"), tree, rounds)
    with Training():
        yield await _served(Row(9, f"{work}, beside a training on all cores"), tree, rounds)


async def _served(row: Row, tree: Any, rounds: int) -> Row:
    peers = _peers(["aiostage", "DefaultStager", "_foreach_copy_ in a thread"])
    rates: dict[str, list[float]] = {name: [] for name in ["no copies", *peers]}
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    delays: dict[str, list[float]] = {name: [] for name in rates}
    for peer in peers.values():
        for _ in range(WARM_UPS):
            await peer.stage(tree)
    async with Echo() as echo:
        for _ in range(rounds):
            for name in random.sample(list(rates), len(rates)):
                await asyncio.sleep(0.2)
                begin, already = perf_counter(), echo.served
                async with LoopDelay() as delay:
                    if name in peers:
                        for _ in range(_COPIES):
                            await peers[name].stage(tree)
                        seconds[name].append((perf_counter() - begin) / _COPIES)
                    else:
                        await asyncio.sleep(1)
                delays[name] += delay.delays
                rates[name].append((echo.served - already) / (perf_counter() - begin))
    for peer in peers.values():
        await peer.close()
    for name, each in rates.items():
        copies = f", {1e3 * statistics.median(seconds[name]):.0f} ms a copy" if name in seconds else ""
        late = f"{1e3 * percentile(delays[name], 0.99):.1f} ms (99 %) and {1e3 * max(delays[name]):.1f} (worst)"
        row.notes.append(f"{name}: {statistics.median(each):.0f} requests a second{copies}, delays of {late}")
    for other, limit in (("_foreach_copy_ in a thread", 0.9), ("DefaultStager", 2.0)):
        pairs = zip(rates["aiostage"], rates[other], strict=True)
        figure = statistics.median(mine / theirs for mine, theirs in pairs)
        row.checks.append(Check(f"requests beside aiostage / beside {other}", figure, limit, at_least=True))
    worst = {name: 1e3 * max(each) for name, each in delays.items()}
    row.checks.append(Check("worst delay of the loop beside aiostage, ms", worst["aiostage"], 10))
    for other in ("no copies", "_foreach_copy_ in a thread"):
        row.checks.append(Check(f"worst delay beside aiostage / beside {other}", worst["aiostage"] / worst[other], 1.1))
    return row


async def growth(rounds: int) -> AsyncIterator[Row]:
    """Measure how the cost grows with the number of tensors and with their size."""
    row = Row(10, "growth")
    speeds = {}
    # The largest first, while all memory is there. What a row leaves is given back some time after it.
    for mebibytes in (8192, 1, 32, 256, 1024, 4096):
        if _available() < 2.2 * mebibytes * MIB:
            row.notes.append(f"Too little memory for {mebibytes} MiB.")
            continue
        name = f"{mebibytes} MiB in 64 tensors"
        row.samples[name] = await _alone(few_large(mebibytes * MIB), rounds)
        speeds[mebibytes] = row.samples[name].median / mebibytes * 1024
    row.notes.append("ms a GiB: " + ", ".join(f"{size} MiB: {1e3 * cost:.0f}" for size, cost in speeds.items()))
    largest = max(speeds)
    row.checks.append(Check(f"cost a byte, of {largest} MiB by 1024 MiB", speeds[largest] / speeds[1024], 1.25))
    costs, processor = {}, {}
    for count in (1_000, 10_000, 100_000, 1_000_000):
        name, tree = f"{count} tensors of 256 bytes", many_small(count, 256)
        row.samples[name] = await _alone(tree, rounds)
        costs[count] = 1e6 * row.samples[name].median / count
        processor[count] = 1e6 * statistics.median(row.samples[name].processor) / count
    for what, figures in (("Microseconds", costs), ("Microseconds of processor time", processor)):
        row.notes.append(f"{what} a tensor: " + ", ".join(f"{count}: {cost:.2f}" for count, cost in figures.items()))
        of = "cost" if figures is costs else "processor time"
        row.checks.append(Check(f"{of} a tensor, of 1,000,000 by 10,000", figures[1_000_000] / figures[10_000], 1.25))
    row.checks.append(Check("processor time a tensor, of 1,000,000, us", processor[1_000_000], 1.3))
    alone = _calls_alone(tree, rounds)
    row.checks.append(Check("processor time a tensor / that of the calls alone", processor[1_000_000] / alone, 1.1))
    row.notes.append(f"Microseconds of processor time a tensor of the calls alone (floor.py): 1000000: {alone:.2f}")
    yield row


def _calls_alone(tree: dict[str, torch.Tensor], rounds: int) -> float:
    """Return how many microseconds of CPU time a tensor takes by the calls alone that its staging cannot do without."""
    floor = Floor(tree)
    # Full runs of the collector come by chance. aiostage has fewer of them.
    gc.collect()
    gc.freeze()
    try:
        return 1e3 * statistics.median(timed(floor.with_storages, tree) for _ in range(rounds)) / len(tree)
    finally:
        gc.unfreeze()


async def _alone(tree: Any, rounds: int) -> Samples:
    return (await turns({"aiostage": PEERS["aiostage"]()}, lambda: tree, rounds))["aiostage"]


ROWS: dict[int, Callable[[int], AsyncIterator[Row]]] = {
    1: large_warm,
    2: large_cold,
    3: small_warm,
    4: small_cold,
    5: small_shared,
    6: adam,
    8: casting,
    9: serving,
    10: growth,
}
"""Row 7, the loop's delay, is measured beside the others."""
