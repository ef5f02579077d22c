"""The device side of one staging: copies under way, who waits for them, and what outlives whom."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol

import torch

from aiostage._copy.device import DeviceCopy
from aiostage._device.streams import CallerStreams, CopyStream, CopyStreams, device_errors
from aiostage._loop.coroutines import Closing, Finalizer, finish
from aiostage._loop.polling import wait_until_done
from aiostage._loop.workers import Job, Workers, start_thread
from aiostage.abc import Backend, SupportsQuery
from aiostage.errors import StagerClosedError, StagingError

__all__ = ["Enqueueable", "PendingCopies", "PendingCopy", "StagingCopies", "in_flight"]

_POLL_SECONDS = 0.005
"""Between two queries of copies without a waiter. Only their memory waits for the outcome."""


class Enqueueable(Protocol):
    """Copies that a device is to be told to make.

    Attributes:
        device: Which device.
        nbytes: How many bytes they bring.
        number: What they are called.
        launches: How many operations were enqueued so far.
    """

    device: torch.device
    nbytes: int
    number: int
    launches: int

    @property
    def copies(self) -> int:
        """How many copies were enqueued so far."""

    def enqueue(self, backend: Backend, stream: Any) -> None:
        """Tell the device."""

    def take_memory(self) -> list[object]:
        """Return what must outlive the copies."""


# Compared by identity: two copies with equal figures are two, and a set must tell them apart.
@dataclass(eq=False, slots=True)
class PendingCopy:
    """Copies that a device has been told to make, and everything that must outlive them.

    Attributes:
        event: Completes when they are done.
        on: The stream that they are on.
        nbytes: How many bytes they bring.
        number: The number of the batch.
        copies: How many copies they are.
        launches: How many operations were enqueued in all.
        keep: Sources, destinations and the arena.
        is_made: Whether it was seen to be complete.
    """

    event: SupportsQuery
    on: CopyStream
    nbytes: int
    number: int
    copies: int
    launches: int
    keep: list[object] = field(repr=False)
    is_made: bool = False


class _InFlight:
    """Every pending copy of the process.

    An enqueued copy cannot be cancelled. This holds the memory that it reads and writes until it has completed, also
    when the staging, the stager or the event loop is gone.
    """

    def __init__(self) -> None:
        # No lock: each add and discard is one operation of a set, which the GIL (or the set's own lock in builds
        # without a GIL) makes atomic. A lock could deadlock, because finalizers call orphan() in any thread.
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
        # In this order: a thread that sees that no copy is pending may use the memory again, so it has to be free by
        # then.
        copy.keep.clear()
        self._pending.discard(copy)

    def orphan(self, copies: Sequence[PendingCopy]) -> None:
        """Watch copies without a waiter, from a thread. Takes no lock for long: finalizers call it."""
        for copy in copies:
            # Others may finish a copy at the same time. It is then put into the queue for nothing, and the thread
            # forgets it.
            if copy in self._pending:
                self._orphans.put(copy)
        self._watch()

    def _watch(self) -> None:
        # The lock says that a watching thread exists. It is taken here and released by that thread, never waited for.
        if not self._orphans.empty() and self._watching.acquire(blocking=False):
            try:
                start_thread(threading.Thread(target=self._watch_all, name="aiostage-orphans", daemon=True))
            except RuntimeError:
                # No thread can be had. Memory stays referred to until the next copy is orphaned.
                self._watching.release()

    def _watch_all(self) -> None:
        watched: list[PendingCopy] = []
        while True:
            # Only this thread takes out of the queue, so what is seen in it is still there.
            while not self._orphans.empty():
                watched.append(self._orphans.get())
            watched = self._not_over(watched)
            if not watched:
                break
            time.sleep(_POLL_SECONDS)
        self._watching.release()
        # A copy that came after the last check of the queue and before the release found the lock taken, and started
        # no thread. Check again now that the lock is free.
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


class PendingCopies:
    """Enqueues copies behind the caller's work, and waits for them. They end also if it is dropped.

    Args:
        backend: How to reach the devices.
        streams: Where to copy.
        caller: What the copies follow.
        closing: After which all waits for them end; None where there is no stager.
    """

    def __init__(
        self, backend: Backend, streams: CopyStreams, caller: CallerStreams, closing: Closing | None = None
    ) -> None:
        self._backend = backend
        self._streams = streams
        self._closing = closing
        self._caller = caller
        self._beside: dict[torch.device, CopyStream] = {}
        self._in_order: list[PendingCopy] = []
        self._lock = threading.Lock()
        # The list itself, which goes on growing: the finalizer must not lead to this object, and is to see the copies
        # that come later.
        self._abandon = Finalizer(self, in_flight.orphan, self._in_order)

    def follow_the_caller(self, device: torch.device) -> None:
        """Make the copies of a device wait for the caller's moment.

        Raises:
            StagingError: If the device has failed.
        """
        if device not in self._beside:
            # Asked for once: after a failure elsewhere the next answer is another stream, which waits for nothing.
            with device_errors():
                beside = self._streams.of(device)
            self._caller.order_before(beside.stream, device)
            self._beside[device] = beside

    def enqueue(self, copy: Enqueueable) -> PendingCopy:
        """Tell a device to copy; runs in a worker thread.

        Args:
            copy: A copy on a device that follows the caller already.

        Returns:
            The copies under way, for :meth:`wait`.

        Raises:
            torch.OutOfMemoryError: If the device has no room for what is made before a copy.
            StagingError: If the device has failed.

        After an error copies may be under way all the same, and their memory is kept.
        """
        on = self._beside[copy.device]
        with device_errors():
            try:
                copy.enqueue(self._backend, on.stream)
                return self._record(copy, on)
            except Exception:
                # Some of it may be under way, into memory that must not be given away. Should that not even be
                # recorded, the device has failed and copies no more.
                with suppress(Exception):
                    self._record(copy, on)
                raise

    def _record(self, copy: Enqueueable, on: CopyStream) -> PendingCopy:
        event = self._backend.record(on.stream)
        pending = PendingCopy(event, on, copy.nbytes, copy.number, copy.copies, copy.launches, copy.take_memory())
        # Before anything else refers to it: from here on its memory outlives whatever happens to the caller.
        in_flight.add(pending)
        with self._lock:
            # With the lock of abandon(): either that sees this copy in the list, or this sees that it was abandoned.
            self._in_order.append(pending)
            self._added(pending)
            abandoned = not self._abandon.alive
        if abandoned:
            in_flight.orphan([pending])
        return pending

    def _added(self, copy: PendingCopy) -> None:
        """Note copies that have just been enqueued, with the lock held."""

    async def wait(self, copy: PendingCopy) -> None:
        """Wait until copies have been made.

        Raises:
            StagingError: If the device has failed.
            StagerClosedError: If the stager is closed.

        Cancelling changes nothing.
        """
        # Several tasks may wait for one copy. No lock: all of them are on one event loop, and what follows the wait is
        # done twice without harm.
        if copy.is_made:
            return
        _check(copy)
        try:
            await wait_until_done(copy.event, self._closing)
        except StagerClosedError:
            raise
        except StagingError as error:
            # For all who use the stream: what lies behind a failed copy is not to be relied on, and the next staging
            # gets another stream.
            self._streams.forget(copy.on, error.__cause__)
            raise
        # The event may have completed because an earlier copy on its stream failed while this one was waited for.
        _check(copy)
        copy.is_made = True
        in_flight.finished(copy)

    def abandon(self) -> None:
        """Let what is still under way be watched over by a thread."""
        with self._lock:
            self._abandon()

    def __iter__(self) -> Iterator[PendingCopy]:
        return iter(tuple(self._in_order))


def _check(copy: PendingCopy) -> None:
    failure = copy.on.failure
    if failure is not None:
        raise StagingError(
            f"an earlier copy on the same stream of {copy.on.device} failed: {type(failure).__name__}: "
            f"{str(failure).rstrip('.')}.",
            remedy="What was enqueued on the device cannot be relied on.",
        ) from failure


class StagingCopies(PendingCopies):
    """The copies of one staging, batch by batch.

    Args:
        backend: How to reach the devices.
        streams: Where to copy.
        caller: What the copies follow.
        closing: The state of the stager: open or closed.
    """

    def __init__(self, backend: Backend, streams: CopyStreams, caller: CallerStreams, closing: Closing) -> None:
        super().__init__(backend, streams, caller, closing)
        self._stager = closing
        self._by_number: dict[int, PendingCopy] = {}

    def _added(self, copy: PendingCopy) -> None:
        self._by_number[copy.number] = copy

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
        rounds: list[list[DeviceCopy]] = []
        try:
            for device in {copy.device: None for copy in copies}:
                self.follow_the_caller(device)
            rounds += _rounds(copies, max_bytes)
            for number, members in enumerate(rounds):
                # Two rounds of half the limit each: this one starts when the one before the last has completed.
                if number >= 2:
                    for copy in [self._by_number[copy.number] for copy in rounds[number - 2]]:
                        await self.wait(copy)
                await self._enqueue_all(members, launcher)
        finally:
            # An error's traceback has this frame in it, and those of the callers, which must not keep memory alive.
            for each in (copies, *rounds):
                each.clear()

    async def _enqueue_all(self, copies: Sequence[DeviceCopy], launcher: Workers) -> None:
        job = launcher.job()
        # All steps of one round in one thread, which takes them in order: the order of the plan is that of the stream.
        for step in [partial(self.enqueue, copy) for copy in copies]:
            job.put(step)
        job.close()
        try:
            with self._stager.on_close(job.cancel):
                try:
                    await self._launched(job)
                except BaseException as error:
                    job.cancel()
                    # A coroutine that is being closed may not wait.
                    if not isinstance(error, GeneratorExit):
                        await finish(partial(self._launched, job))
                    raise
            # Closing the stager has cancelled the job, which then looks finished. Report that first.
            self._stager.check()
            await job.join()
        finally:
            # The traceback refers to this frame, which must not refer back to the error: that circle would keep memory.
            del job, step

    async def _launched(self, job: Job) -> None:
        """Wait until launches are over. Those of a closed stager may hang with their device, and keep their memory."""
        await job.until(lambda: self._stager.closed)

    async def wait_for_batch(self, number: int) -> None:
        """Wait like :meth:`wait` for the copies of a batch."""
        await self.wait(self._by_number[number])

    def order_before(self, stream: Any | None, numbers: Collection[int] | None) -> None:
        """Make later work wait, on the device, for copies enqueued so far.

        Args:
            stream: Whose work; None is the calling thread's current stream of every device that copies.
            numbers: The batches to wait for; None for all.
        """
        copies = [copy for copy in self if numbers is None or copy.number in numbers]
        # A stream runs in order, so behind the last copy of each device lie all of them. Dicts keep the last value of a
        # key.
        last: dict[torch.device, PendingCopy] = {copy.on.device: copy for copy in copies}
        with device_errors():
            for device, copy in last.items():
                self._backend.wait(self._backend.current_stream(device) if stream is None else stream, copy.event)


def _rounds(copies: Sequence[DeviceCopy], max_bytes: int | None) -> Iterator[list[DeviceCopy]]:
    """Split copies into rounds of half the limit: one is in flight while the next is enqueued."""
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
