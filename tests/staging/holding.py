"""Keeping a stager's copies from running until a test lets them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import anyio.lowlevel

from aiostage import AsyncStager

THREADS = 2
"""How many copies a stager runs at once."""


@contextmanager
def copies_held(stager: AsyncStager) -> Iterator[threading.Event]:
    """Occupy every copy thread of a stager; setting the event, or leaving, lets them go on."""
    release = threading.Event()
    busy = threading.Barrier(THREADS + 1)

    def occupy() -> None:
        busy.wait(10)
        release.wait(30)

    job = stager._resources.workers.job()
    for _ in range(THREADS):
        job.put(occupy)
    job.close()
    busy.wait(10)
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
