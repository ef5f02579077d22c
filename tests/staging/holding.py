"""Keeping a stager's copies from running until a test lets them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import anyio.lowlevel

from aiostage import AsyncStager
from aiostage._loop.workers import Job
from tests.patience import seconds

THREADS = 2
"""How many copies a stager runs at once."""


@contextmanager
def copies_held(stager: AsyncStager) -> Iterator[threading.Event]:
    """Occupy every copy thread of a stager; setting the event, or leaving, lets them go on."""
    release = threading.Event()
    busy = threading.Barrier(THREADS + 1)

    def occupy() -> None:
        busy.wait(seconds(10))
        release.wait(seconds(30))

    job = stager._resources.workers.job()
    for _ in range(THREADS):
        job.put(occupy)
    job.close()
    busy.wait(seconds(10))
    try:
        yield release
    finally:
        release.set()


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until a condition holds; the test's timeout is the limit."""
    while not condition():
        await anyio.lowlevel.checkpoint()


async def until_copies_wait(stager: AsyncStager) -> None:
    """Let the loop turn until a staging has handed over all its copies, and only waits for them."""
    running = stager._resources.running
    await until(lambda: any(not job._open for job in running))


class SlowJob(Job):
    """A job whose steps take a while."""

    def __init__(self, submit: Callable[[Job], None], seconds: float) -> None:
        super().__init__(submit)
        self.seconds = seconds

    def put(self, step: Callable[[], object]) -> None:
        """Add a step that takes a while."""

        def slow() -> None:
            time.sleep(self.seconds)
            step()

        super().put(slow)


@contextmanager
def copies_slowed(stager: AsyncStager, seconds: float = 0.002) -> Iterator[None]:
    """Let every step of a stager's threads take a while, so that what waits for them is met waiting."""
    workers = stager._resources.workers
    make = workers.job

    def job(*, inline: bool = False) -> Job:
        return SlowJob(make(inline=inline)._submit, seconds)

    workers.job = job  # type: ignore[method-assign]
    try:
        yield
    finally:
        del workers.job  # type: ignore[method-assign]
