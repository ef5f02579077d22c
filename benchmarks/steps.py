"""How long the steps of a staging on the event loop are, in CPU time, and which the garbage collector made long.

    python benchmarks/steps.py [--rounds 25]

The CPU time of a step says what the library and the interpreter do to the loop, also on a machine that other programs
keep busy, where a clock measures these. asyncio only, whose handles can be looked into.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
from asyncio.events import Handle
from collections.abc import Callable, Generator
from contextlib import contextmanager
from time import thread_time
from typing import Any

from delays import percentile
from measuring import WARM_UPS
from report import machine
from workloads import Adam350M, few_large, many_small

import aiostage


class Steps:
    """The callbacks that the event loop of this thread ran, and the runs of the collector within them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.collected: list[tuple[int, float]] = []

    @contextmanager
    def counted(self) -> Generator[None, None, None]:
        """Count what runs within the block."""
        real: Callable[[Handle], None] = Handle._run  # type: ignore[attr-defined]
        begun = 0.0
        is_counting = True

        def run(handle: Handle) -> None:
            begin = thread_time()
            real(handle)
            # The step that leaves the block goes on with what comes after it.
            if is_counting:
                self.seconds.append(thread_time() - begin)

        def collect(phase: str, about: dict[str, int]) -> None:
            nonlocal begun
            if phase == "start":
                begun = thread_time()
            else:
                self.collected.append((about["generation"], thread_time() - begun))

        Handle._run = run  # type: ignore[attr-defined]
        gc.callbacks.append(collect)
        try:
            yield
        finally:
            is_counting = False
            gc.callbacks.remove(collect)
            Handle._run = real  # type: ignore[attr-defined]


async def measure(make: Callable[[], Any], rounds: int) -> Steps:
    """Stage again and again, each time what ``make`` returns."""
    steps = Steps()
    async with aiostage.AsyncStager() as stager:
        for number in range(WARM_UPS + rounds):
            tree = make()
            with steps.counted():
                # So that the first step is one that was counted from its beginning.
                staged = await asyncio.create_task(stager.stage(tree))
            del staged
            if number < WARM_UPS:
                steps = Steps()
    return steps


def row(name: str, steps: Steps) -> str:
    """Return a row of the table, in milliseconds."""
    late = sum(each > 1e-3 for each in steps.seconds)
    runs = []
    for generation in range(3):
        found = [seconds for which, seconds in steps.collected if which == generation]
        runs.append(f"{len(found)} ({1e3 * max(found):.1f})" if found else "0")
    return (
        f"| {name} | {len(steps.seconds)} | {1e3 * percentile(steps.seconds, 0.99):.2f} | {late} "
        f"| {1e3 * max(steps.seconds):.1f} | {' | '.join(runs)} |"
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    print(f"{machine()}; CPU time of steps on the event loop, in ms; runs of the collector by generation (longest)\n")
    print("| work, warm | steps | 99 % | above 1 ms | longest | young | middle | whole heap |\n| --- |" + " ---: |" * 7)
    large, small = few_large(1 << 30), many_small()
    print(row("1 GiB in 64 tensors", asyncio.run(measure(lambda: large, rounds))))
    large.clear()
    print(row("50,000 tensors of 1 KiB", asyncio.run(measure(lambda: small, rounds))))
    small.clear()
    print(row("a model and its Adam, 350 M parameters", asyncio.run(measure(Adam350M().state_dict, rounds))))


if __name__ == "__main__":
    main()
