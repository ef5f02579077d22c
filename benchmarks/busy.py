"""What staging costs a training that keeps every core busy, and how late the event loop is beside both.

    python benchmarks/busy.py                       # some three minutes and 6 GiB
    python benchmarks/busy.py --seconds 10 --rounds 7 --json busy.json

A thread trains: matrix products by as many threads as there are cores, step after step. In each window of time one
checkpoint (1 GiB) is staged, by a peer or, for comparison, by none. *Slower* is the mean step of a window with a
staging by that of the window without one in the same round; the median over the rounds. The loop's delay is that of a
clock that ticks every millisecond while the peer stages, and for none, during the whole window: that is by how much the
training alone makes it late. The bare copy beside it shows what any copy adds. The worst
delay of a window varies by a factor of ten: its median over the windows says more than the worst of all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import threading
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from delays import LoopDelay, percentile
from measuring import WARM_UPS
from peers import PEERS, Peer
from report import Check, machine
from workloads import few_large

NONE = "no staging"
COPY = "two threads that offer their cores"
"""The floor of a staging: the bare copy, beside the same training and the same clock."""

NAMES = ["aiostage", COPY, "DefaultStager", "torch_checkpointing"]
WIDTH, PRODUCTS = 1024, 4
"""One step multiplies so many square matrices."""
LEAST_STEPS = 3
"""In a window, however slow the machine is."""


class Training:
    """Steps in a thread of their own, until its context is left."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Training:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        weights = [torch.randn(WIDTH, WIDTH) / WIDTH**0.5 for _ in range(PRODUCTS)]
        batch = torch.randn(WIDTH, WIDTH)
        while not self._over.is_set():
            values = batch
            for weight in weights:
                values = torch.relu(values @ weight)
            self.ends.append(perf_counter())

    def mean_step(self, begin: float, end: float) -> float:
        """Return the mean seconds of the steps that lie within a window."""
        inside = [each for each in self.ends if begin <= each <= end]
        return (inside[-1] - inside[0]) / (len(inside) - 1)


class Measured:
    """What was found out of one peer."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.seconds: list[float] = []
        self.delays: list[float] = []
        self.worst: list[float] = []

    def slower(self, alone: Measured) -> float:
        """Return by which factor steps are slower than without a staging."""
        return statistics.median(mine / its for mine, its in zip(self.steps, alone.steps, strict=True))

    def as_json(self, alone: Measured) -> dict[str, Any]:
        """Return everything for a file."""
        return {
            "step_seconds": self.steps,
            "slower": self.slower(alone),
            "staging_seconds": self.seconds,
            "delay_p99": percentile(self.delays, 0.99),
            "delay_worst": max(self.delays, default=0.0),
            "delay_worst_of_each": self.worst,
        }


async def window(seconds: float, training: Training, peer: Peer | None, tree: Any, measured: Measured) -> None:
    """Stage once, or not, and wait until the window is over."""
    begin, already = perf_counter(), len(training.ends)
    async with LoopDelay() as delay:
        if peer is None:
            await asyncio.sleep(seconds)
        else:
            staged = await peer.stage(tree)
            measured.seconds.append(perf_counter() - begin)
            del staged
    await asyncio.sleep(max(0.0, begin + seconds - perf_counter()))
    while len(training.ends) < already + LEAST_STEPS:
        await asyncio.sleep(seconds)
    measured.steps.append(training.mean_step(begin, perf_counter()))
    measured.delays += delay.delays
    measured.worst.append(max(delay.delays, default=0.0))


async def measure(seconds: float, rounds: int, mib: int, names: list[str]) -> dict[str, Measured]:
    """Let peers take turns in a random order."""
    tree = few_large(mib << 20)
    peers: dict[str, Peer | None] = {NONE: None} | {name: PEERS[name]() for name in names}
    found = {name: Measured() for name in peers}
    for peer in filter(None, peers.values()):
        for _ in range(WARM_UPS):
            await peer.stage(tree)
    with Training() as training:
        # Its first steps are slow.
        while len(training.ends) < WARM_UPS:
            await asyncio.sleep(0.1)
        for _ in range(rounds):
            for name in random.sample(list(peers), len(peers)):
                await window(seconds, training, peers[name], tree, found[name])
    for peer in filter(None, peers.values()):
        await peer.close()
    return found


def _median_ratio(one: Measured, other: Measured) -> float:
    return statistics.median(one.worst) / statistics.median(other.worst)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="how long a window is: one checkpoint in each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=1024, help="how large a checkpoint is")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    found = asyncio.run(measure(arguments.seconds, arguments.rounds, arguments.mib, NAMES))
    alone = found[NONE]
    print(f"{machine()}; {arguments.mib} MiB staged every {arguments.seconds:g} s beside a training on all cores\n")
    print(
        "| peer | step | slower | staging | loop delay, 99th percentile | worst | worst of a window, median |\n| --- |"
        + " ---: |" * 6
    )
    for name, each in found.items():
        took = f"{1e3 * statistics.median(each.seconds):.0f} ms" if each.seconds else ""
        step, slower = statistics.median(each.steps), each.slower(alone) - 1
        late = [percentile(each.delays, 0.99), max(each.delays), statistics.median(each.worst)]
        delays = " | ".join(f"{1e3 * seconds:.1f} ms" for seconds in late)
        print(f"| {name} | {1e3 * step:.1f} ms | {slower:.1%} | {took} | {delays} |")
    ours, least = found["aiostage"], found[COPY]
    checks = [
        Check("steps beside aiostage / without a staging", ours.slower(alone), 1.05),
        Check("worst delay of the loop beside aiostage, ms", 1e3 * max(ours.delays), 10),
        Check(f"worst delay beside aiostage / {COPY}, medians", _median_ratio(ours, least), 1.1),
        Check(f"worst delay beside aiostage / {NONE}, medians", _median_ratio(ours, alone), 1.1),
    ]
    print("\n| target | figure | limit | |\n| --- | ---: | ---: | --- |")
    for check in checks:
        print(check.as_row())
    if arguments.json:
        figures = {"machine": machine(), "seconds": arguments.seconds}
        figures |= {"peers": {name: each.as_json(alone) for name, each in found.items()}}
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
