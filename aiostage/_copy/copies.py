"""The copies of one staging, handed over to threads while the leaves are still being built."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import Any

import numpy as np

from aiostage._capture.plan import Batch
from aiostage._copy.building import build_batch, build_destinations
from aiostage._copy.device import DeviceCopy
from aiostage._copy.host import HostCopy
from aiostage._copy.looking import Look
from aiostage._copy.sources import Sources
from aiostage._copy.window import Chunk
from aiostage._loop.workers import Job
from aiostage.observe import OpenSpan, inside

__all__ = ["Copies"]


class Copies:
    """Makes the staged leaves and starts the copies into them.

    Those from host memory become steps of a job; those from devices are returned, for they are launched in order and
    not by several threads.

    Args:
        look: At the source.
        job: For the threads.
        batches: Of the plan, with their numbers, in the order in which they are copied.
        landed: Where the threads note the numbers of the batches that they have copied.
        span: What the copies are part of, for observers.
        inline: Whether to copy in the calling thread, and at once.
    """

    def __init__(
        self,
        look: Look,
        job: Job,
        batches: Iterable[tuple[int, Batch]],
        *,
        landed: set[int],
        span: OpenSpan | None,
        inline: bool,
    ) -> None:
        self._look = look
        self.sources = Sources(look.leaves, look.specs)
        self._job = job
        self._batches = list(batches)
        self._span = span
        self._landed = landed
        self._inline = inline

    def build(self, memory: np.ndarray[Any, Any], staged: list[Any]) -> Generator[None, None, list[DeviceCopy]]:
        """Make the staged leaves; threads copy what they can meanwhile.

        Args:
            memory: One-dimensional uint8, the arena.
            staged: Where to put the leaves, by their indices.

        Returns:
            The copies from devices.
        """
        waiting: dict[int, HostCopy] = {}
        for number, batch in self._batches:
            if batch.device is None:
                copies = HostCopy(self.sources, staged, memory)
                yield from copies.fill(batch)
                if copies.ready:
                    self._start(number, batch, copies)
                else:
                    waiting[number] = copies
                yield
        from_devices: list[DeviceCopy] = []
        for number, batch in self._batches:
            yield from build_batch(batch, memory, staged, self._look.specs)
            if batch.device is not None:
                from_devices.append((yield from DeviceCopy.of(number, batch, self.sources, staged, memory)))
            elif number in waiting:
                self._start(number, batch, waiting.pop(number))
            yield
        return from_devices

    def outline(self, addresses: np.ndarray[Any, Any], staged: list[Any]) -> Generator[None, None, None]:
        """Make the staged leaves over addresses that have no memory behind them, and copy nothing."""
        for _, batch in self._batches:
            yield from build_batch(batch, addresses, staged, self._look.specs)

    def fill(self, chunk: Chunk, memory: np.ndarray[Any, Any]) -> Generator[None, None, list[DeviceCopy]]:
        """Start the copies into a part of what passes through memory.

        Args:
            chunk: The part.
            memory: One-dimensional uint8, of the chunk's size.

        Returns:
            The copies from devices.
        """
        from_devices: list[DeviceCopy] = []
        for number, placed in self._batches[chunk.batches.start : chunk.batches.stop]:
            batch = placed.moved(-chunk.start)
            destinations = build_destinations(batch, memory)
            if batch.device is not None:
                from_devices.append((yield from DeviceCopy.of(number, batch, self.sources, destinations, memory)))
            else:
                copies = HostCopy(self.sources, destinations, memory)
                yield from copies.fill(batch)
                self._start(number, batch, copies)
            yield
        return from_devices

    def _start(self, number: int, batch: Batch, copies: HostCopy) -> None:
        step: Callable[[], None] = partial(self._copy, number, batch.stop - batch.start, copies)
        self._job.put(step)
        if self._inline:
            self._job.run_next()

    def _copy(self, number: int, nbytes: int, copies: HostCopy) -> None:
        """Copy one batch; runs in a worker thread."""
        # A cold arena is faulted in by the copy itself: measured as fast as populating it first at best, twice as fast
        # where huge pages are slow to come, and two threads do it at once.
        with inside(self._span, "batch", number=number, nbytes=nbytes):
            if copies.run(self._job):
                self._landed.add(number)
