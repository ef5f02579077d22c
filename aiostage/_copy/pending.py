"""The device side of one staging: copies under way, who waits for them, and what outlives whom."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch

from aiostage._copy.device import DeviceCopy, PendingCopy
from aiostage._device.streams import CallerStreams, CopyStreams, device_errors
from aiostage._loop.cleanup import finish
from aiostage._loop.closing import Closing
from aiostage._loop.polling import wait_transfer
from aiostage._loop.transfers import BandwidthEstimator
from aiostage._loop.workers import Job, Workers
from aiostage.abc import Backend
from aiostage.errors import StagerClosedError, StagingError

__all__ = ["PendingCopies", "in_flight", "wait_until_copied"]

_POLL_SECONDS = 0.005
"""Between two queries of copies without a waiter. Only their memory waits for the outcome."""


class _InFlight:
    """Every pending copy of the process.

    A device that was told to copy cannot be told otherwise, so what it reads and writes stays referred to here,
    whatever becomes of the staging, the stager or the event loop.
    """

    def __init__(self) -> None:
        self._pending: set[PendingCopy] = set()
        self._orphans: SimpleQueue[PendingCopy] = SimpleQueue()
        self._watching = threading.Lock()

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, copy: PendingCopy) -> None:
        """Refer to a copy until it is complete."""
        self._pending.add(copy)

    def finished(self, copy: PendingCopy) -> None:
        """Release the memory of a completed copy, which others may wait for, before the copy itself."""
        copy.keep.clear()
        self._pending.discard(copy)

    def orphan(self, copies: Sequence[PendingCopy]) -> None:
        """Watch copies without a waiter, from a thread. Takes no lock for long: finalizers call it."""
        for copy in copies:
            if copy in self._pending:
                self._orphans.put(copy)
        self._watch()

    def _watch(self) -> None:
        if not self._orphans.empty() and self._watching.acquire(blocking=False):
            try:
                threading.Thread(target=self._watch_all, name="aiostage-orphans", daemon=True).start()
            except RuntimeError:
                # No thread can be had. Memory stays referred to until the next copy is orphaned.
                self._watching.release()

    def _watch_all(self) -> None:
        watched: list[PendingCopy] = []
        while True:
            while not self._orphans.empty():
                watched.append(self._orphans.get())
            watched = self._not_over(watched)
            if not watched:
                break
            time.sleep(_POLL_SECONDS)
        self._watching.release()
        # One may have come between the look at the queue and here.
        self._watch()

    def _not_over(self, watched: Sequence[PendingCopy]) -> list[PendingCopy]:
        """Forget what is complete, and return the rest. In the thread no name may be left that refers to the former."""
        for copy in watched:
            if _is_over(copy):
                self.finished(copy)
        return [copy for copy in watched if copy in self._pending]


def _is_over(copy: PendingCopy) -> bool:
    try:
        return copy.event.query()
    except Exception:
        # The device has failed: it copies no more, and no waiter is left to get the error.
        return True


in_flight = _InFlight()


async def wait_until_copied(copy: PendingCopy, streams: CopyStreams, closing: Closing | None) -> None:
    """Wait until copies have been made.

    Raises:
        StagingError: If the device has failed.
        StagerClosedError: If the stager is closed.

    Cancelling changes nothing.
    """
    try:
        await wait_transfer(copy.event, copy.transfer, closing)
    except StagerClosedError:
        raise
    except StagingError:
        streams.forget(copy.device, copy.transfer.stream)
        raise
    in_flight.finished(copy)
    # A caller may still refer to it, but its memory is used again before that ends.
    copy.keep.clear()


class PendingCopies:
    """Launches the copies of one staging and waits for them.

    Args:
        backend: How to reach the devices.
        streams: Where to copy.
        caller: What the copies follow.
        bandwidth: Where to announce the copies.
        closing: After which all waits for them end.
    """

    def __init__(
        self,
        backend: Backend,
        streams: CopyStreams,
        caller: CallerStreams,
        bandwidth: BandwidthEstimator,
        closing: Closing,
    ) -> None:
        self._backend = backend
        self._streams = streams
        self._bandwidth = bandwidth
        self._closing = closing
        self._caller = caller
        self._pending: dict[int, PendingCopy] = {}
        self._in_order: list[PendingCopy] = []
        self._lock = threading.Lock()
        self._abandon = weakref.finalize(self, in_flight.orphan, self._in_order)
        self._abandon.atexit = False

    def __iter__(self) -> Iterator[PendingCopy]:
        return iter(tuple(self._in_order))

    async def launch(self, copies: list[DeviceCopy], launcher: Workers, max_bytes: int | None) -> None:
        """Enqueue copies on side streams, after the caller.

        Args:
            copies: In the order in which they are to be made. Emptied.
            launcher: One thread to do it in.
            max_bytes: How many bytes may be under way at once; a single copy may be larger. None for any number.

        Raises:
            torch.OutOfMemoryError: If the device has no room for casting what is to be cast.
            StagingError: If the device has failed.
            StagerClosedError: If the stager is closed.

        When cancelled, what has not been enqueued is dropped.
        """
        with device_errors():
            await self._launch(copies, launcher, max_bytes)

    async def _launch(self, copies: list[DeviceCopy], launcher: Workers, max_bytes: int | None) -> None:
        streams = {}
        for device in {copy.device: None for copy in copies}:
            # Asked for once: after a failure elsewhere the next answer is another stream, which waits for nothing.
            streams[device] = self._streams.of(device)
            self._caller.order_before(streams[device], device)
        rounds = list(_rounds(copies, max_bytes))
        try:
            for number, members in enumerate(rounds):
                if number >= 2:
                    await self._wait_for_all([copy.number for copy in rounds[number - 2]])
                await self._enqueue_all(members, streams, launcher)
        finally:
            # An error's traceback has this frame in it, and those of the callers, which must not keep memory alive.
            for each in (copies, *rounds):
                each.clear()

    async def _enqueue_all(
        self, copies: Sequence[DeviceCopy], streams: Mapping[torch.device, Any], launcher: Workers
    ) -> None:
        job = launcher.job()
        for step in [partial(self._enqueue, copy, streams[copy.device]) for copy in copies]:
            job.put(step)
        job.close()
        try:
            with self._closing.telling(job.cancel):
                try:
                    await self._launched(job)
                except BaseException as error:
                    job.cancel()
                    # A coroutine that is being closed may not wait.
                    if not isinstance(error, GeneratorExit):
                        await finish(partial(self._launched, job))
                    raise
            self._closing.check()
            await job.join()
        finally:
            # Nor may it lead back to the error.
            del job, step

    async def _launched(self, job: Job) -> None:
        """Wait until launches are over. Those of a closed stager may hang with their device, and keep their memory."""
        while not (job.finished() or self._closing.closed):
            await job.progressed(job.done)

    async def _wait_for_all(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            await self.wait(number)

    def _enqueue(self, copy: DeviceCopy, stream: Any) -> None:
        """Enqueue one copy, in a worker thread."""
        try:
            copy.enqueue(self._backend, stream)
        except Exception:
            # Some of it may be under way, into memory that must not be given away. Should that not even be
            # recorded, the device has failed and copies no more.
            with suppress(Exception):
                self._add(copy.record(self._backend, stream, self._bandwidth))
            raise
        self._add(copy.record(self._backend, stream, self._bandwidth))

    def _add(self, copy: PendingCopy) -> None:
        in_flight.add(copy)
        with self._lock:
            self._pending[copy.number] = copy
            self._in_order.append(copy)
            abandoned = not self._abandon.alive
        if abandoned:
            in_flight.orphan([copy])

    async def wait(self, number: int) -> None:
        """Wait until the copies of a batch have been made.

        Raises:
            StagingError: If the device has failed.
            StagerClosedError: If the stager is closed.

        Cancelling changes nothing.
        """
        await wait_until_copied(self._pending[number], self._streams, self._closing)

    def order_before(self, stream: Any | None, numbers: Collection[int] | None) -> None:
        """Make later work wait, on the device, for copies enqueued so far.

        Args:
            stream: Whose work; None is the calling thread's current stream of every device that copies.
            numbers: The batches to wait for; None for all.
        """
        copies = [copy for copy in self if numbers is None or copy.number in numbers]
        last: dict[torch.device, PendingCopy] = {copy.device: copy for copy in copies}
        with device_errors():
            for device, copy in last.items():
                self._backend.wait(self._backend.current_stream(device) if stream is None else stream, copy.event)

    def abandon(self) -> None:
        """Let what is still under way be watched over by a thread."""
        with self._lock:
            self._abandon()


def _rounds(copies: Sequence[DeviceCopy], max_bytes: int | None) -> Iterator[list[DeviceCopy]]:
    """Split copies into rounds of half the limit: one flies while the next is launched."""
    if max_bytes is None:
        yield list(copies)
        return
    batch: list[DeviceCopy] = []
    for copy in copies:
        if batch and sum(member.nbytes for member in batch) + copy.nbytes > max_bytes // 2:
            yield batch
            batch = []
        batch.append(copy)
    yield batch
