"""The copies of one staging, handed over to threads while the leaves are still being built, and how far they are."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np

from aiostage._capture.build import build_batch, build_destinations
from aiostage._capture.plan import Batch
from aiostage._copy.device import DeviceCopy
from aiostage._copy.host import HostCopy
from aiostage._copy.inspection import SourceInspection, Sources
from aiostage._copy.pending import StagingCopies
from aiostage._copy.window import Chunk, Window
from aiostage._loop.workers import Job
from aiostage._memory.arena import Arena
from aiostage.errors import StagingError
from aiostage.observe import OpenSpan

__all__ = ["Copies", "CopyProgress"]


class Copies:
    """Makes the staged leaves and starts the copies into them.

    Those from host memory become steps of a job; those from devices are returned, for they are launched in order and
    not by several threads.

    Args:
        inspection: The inspection of the source.
        job: For the threads.
        batches: The batches of the plan, with their numbers, in the order in which they are copied.
        copied: Where the threads note the numbers of the batches that they have copied.
        span: What the copies are part of, for observers.
        inline: Whether to copy in the calling thread, and at once.

    Attributes:
        arena: Where the copies go, if all of them go to one.
    """

    def __init__(
        self,
        inspection: SourceInspection,
        job: Job,
        batches: Iterable[tuple[int, Batch]],
        *,
        copied: set[int],
        span: OpenSpan | None,
        inline: bool,
    ) -> None:
        self._inspection = inspection
        self.sources = Sources(inspection.leaves, inspection.specs)
        self._job = job
        self._batches = list(batches)
        self._span = span
        self._copied = copied
        self._inline = inline
        self.arena: Arena | None = None

    def build(self, memory: np.ndarray[Any, Any], staged: list[Any]) -> Generator[None, None, list[DeviceCopy]]:
        """Make the staged leaves; threads copy what they can meanwhile.

        Args:
            memory: One-dimensional uint8, the arena.
            staged: Where to put the leaves, by their indices.

        Returns:
            The copies from devices.
        """
        # Two passes. The first starts every copy that needs the arena alone, so that threads are busy while the second
        # makes the leaves.
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
            yield from build_batch(batch, memory, staged, self._inspection.specs)
            if batch.device is not None:
                # After their leaves, because copies of whole leaves go into these and not to addresses.
                from_devices.append((yield from DeviceCopy.of(number, batch, self.sources, staged, memory)))
            elif number in waiting:
                self._start(number, batch, waiting.pop(number))
            yield
        return from_devices

    def outline(self, addresses: np.ndarray[Any, Any], staged: list[Any]) -> Generator[None, None, None]:
        """Make the staged leaves over addresses that have no memory behind them, and copy nothing."""
        for _, batch in self._batches:
            yield from build_batch(batch, addresses, staged, self._inspection.specs)

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
            # The plan counts from the beginning of the arena, this memory from that of the chunk.
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
        step: Callable[[], None] = partial(self._copy, number, batch, copies)
        self._job.put(step)
        # The job has no threads then.
        if self._inline:
            self._job.run_next()

    def _copy(self, number: int, batch: Batch, copies: HostCopy) -> None:
        """Copy one batch; runs in a worker thread."""
        # A cold arena is faulted in by the copy itself: measured as fast as populating it first at best, twice as fast
        # where huge pages are slow to come, and two threads do it at once.
        arena = self.arena
        cold = arena.cold(batch.start, batch.stop) if arena is not None else None
        span = self._span
        with span.child("batch", number=number, nbytes=batch.stop - batch.start) if span else nullcontext():
            # Not if it was cancelled half-way: then neither the pages are all there nor the bytes.
            if copies.run(self._job, cold):
                if arena is not None:
                    arena.written(batch.start, batch.stop)
                # One operation of a set, which needs no lock. It comes before the end of the step: those who wait for
                # the batch look at the set when a step has ended.
                self._copied.add(number)


class CopyProgress:
    """How far the copies of one staging are, for those who wait for some of them.

    Args:
        job: The job of the threads that copy from host memory.

    Attributes:
        pending: The copies from devices; None without an accelerator, and once the staging is over.
        batches: The batches of the plan.
        window: What the copy passes through, if it is larger than the memory for it.
        memory: The addresses of the staged memory.
        copied: The numbers of the batches that were seen to have been copied.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self.pending: StagingCopies | None = None
        self.batches: Sequence[Batch] = ()
        self.window: Window | None = None
        self.memory = range(0)
        self.copied: set[int] = set()

    async def batch(self, number: int) -> bool:
        """Wait until a batch has been copied.

        Returns:
            False if it will not be: the staging has failed, was abandoned or closed.

        Raises:
            StagingError: If the device has failed.

        Cancelling changes nothing.
        """
        if self.window is not None:
            # Before that the batch has no memory, and no copy that could be waited for.
            await self.window.launched(number)
        if self.batches[number].device is not None and self.pending is not None:
            await self.pending.wait_for_batch(number)
            self.copied.add(number)
        while number not in self.copied and not self._job.finished():
            # The count is read before the wait, so a step that ends in between ends the wait at once.
            await self._job.progressed(self._job.done)
        return number in self.copied

    async def bytes(self, address: int, nbytes: int) -> bool:
        """Wait until the copies into a range of staged memory have been made; elsewhere there is nothing to wait for.

        Returns:
            False if they will not be: the staging has failed, was abandoned or closed.

        Raises:
            StagingError: If the device has failed.

        Cancelling changes nothing.
        """
        start = max(address - self.memory.start, 0)
        stop = min(address + nbytes, self.memory.stop) - self.memory.start
        # Batches lie in the arena in the order of their numbers, without overlap: the first one that ends behind the
        # start, and those after it until one begins behind the stop.
        for number in range(bisect_right(self.batches, start, key=_stop), len(self.batches)):
            if self.batches[number].start >= stop:
                break
            if not await self.batch(number):
                return False
        return True

    def order_before(self, stream: Any | None, numbers: Collection[int] | None) -> None:
        """Make later work of a stream wait, on the device, for the copies.

        Args:
            stream: Whose work; None for the current stream of each device that copies.
            numbers: The batches to wait for; None for all.

        Raises:
            StagingError: If copies from host memory are under way, for which no stream can wait.
        """
        # Its later copies do not exist yet, so there is no event that a stream could wait for.
        if self.window is not None and not self._job.finished():
            raise StagingError(
                "the copy passes through memory smaller than itself, so some of its copies wait for memory.",
                remedy="Await captured() before you change the source.",
            )
        in_host_memory = {number for number, batch in enumerate(self.batches) if batch.device is None} - self.copied
        if in_host_memory if numbers is None else not in_host_memory.isdisjoint(numbers):
            raise StagingError(
                "tensors in host memory are being copied by threads, for which no stream of a device can wait.",
                remedy="Await source_free() or captured() before you change them.",
            )
        if self.pending is not None:
            self.pending.order_before(stream, numbers)


_stop = attrgetter("stop")
