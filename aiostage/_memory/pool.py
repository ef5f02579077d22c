"""Leases on arenas: who may write to which host memory, and for how long."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue

import anyio
import torch

from aiostage._loop.coroutines import Finalizer, ThreadsafeEvent
from aiostage._loop.forks import register_after_fork
from aiostage._loop.workers import Job, Workers, all_settled, start_thread
from aiostage._memory.arena import Arena, Exporter, pieces
from aiostage._memory.ledger import Ledger, Request
from aiostage._memory.pinned import Pinning
from aiostage._memory.shared import SharedHandle
from aiostage._platform.limits import MEMORY_LIMIT
from aiostage.errors import HostMemoryError, StagerClosedError

__all__ = ["Lease", "Pool", "PoolStatistics"]

_logger = logging.getLogger("aiostage")

_PATIENCE_SECONDS = 10.0
"""How long a wait for the budget may take before a log line says what is waited for."""

_HELD_ELSEWHERE_SECONDS = 0.05
"""How often to ask whether other processes still map an arena; the kernel does not report when they stop."""


_RESERVED_BYTES = 64 << 20
"""How much shared memory one uninterruptible step reserves: about 10 ms."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolStatistics:
    """What a pool holds at one moment.

    Attributes:
        arenas: Host allocations, leased, idle or about to be given back.
        leases: Arenas that are referred to.
        waiting: Requests that wait for the budget.
        pageable_bytes: Bytes of ordinary memory in arenas.
        shared_bytes: Bytes of memory in arenas that other processes can open.
        pinned_bytes: Bytes registered with an accelerator; they count as pageable or shared as well.
    """

    arenas: int
    leases: int
    waiting: int
    pageable_bytes: int
    shared_bytes: int
    pinned_bytes: int


class Lease:
    """The right to write to an arena, and the hold on it.

    An arena is free again once :attr:`buffer`, every tensor and array made from it, and this object are gone. There
    is nothing to release, so nothing can be used after its release.

    Attributes:
        arena: The memory.
        buffer: One-dimensional uint8 array of exactly the bytes that were asked for, starting on a page.
    """

    __slots__ = ("arena", "buffer")

    def __init__(self, arena: Arena, buffer: Exporter) -> None:
        self.arena = arena
        self.buffer = buffer

    def share(self) -> SharedHandle:
        """Return a handle by which another process can map the buffer, for as long as this lease lasts.

        Raises:
            HostMemoryError: If the arena is private to this process.
        """
        return self.arena.share(self.buffer.nbytes)


class Pool:
    """Hands out arenas under a budget and takes them back when the last thing over them has died.

    May be used from several event loops and threads at once. Idle arenas are kept for reuse, at most as much as the
    last few leases together needed at one time. Memory is faulted in, registered and given back in worker threads.

    A forked child begins with none: to memory that is shared it would write for both, and private memory that it kept
    its parent would have to copy, page by page, when that is written again.

    Args:
        workers: The threads to do it in.
        max_bytes: How many bytes all arenas together may take; None for no limit.
        shared: Whether other processes are to open the memory.
        pinning: How to register arenas with an accelerator; None for not at all.

    Attributes:
        used: Whether memory was ever asked for, in this process.
    """

    def __init__(
        self, workers: Workers, *, max_bytes: int | None = None, shared: bool = False, pinning: Pinning | None = None
    ) -> None:
        self._workers = workers
        self._max_bytes = max_bytes
        self._pinning = pinning
        self._make = Arena.shared if shared else Arena.pageable
        self._ledger = Ledger(self._make, max_bytes)
        self._compared = False
        self._reset()
        register_after_fork(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        # Finalizers run whenever the garbage collector likes, also in a thread that holds the lock just now. They
        # only ever put into this queue, whose put() is made to be re-entered, and wake a waiter.
        self._returned: SimpleQueue[Arena | Request] = SimpleQueue()
        # Wakes the thread that outlives the leases; False ends it. What has come back itself stays in the other queue
        # until somebody takes it with the lock held: in between, it would be counted as leased.
        self._ended: SimpleQueue[bool] = SimpleQueue()
        self._closings: set[Job] = set()
        self._outliving = False
        self.used = False

    def after_fork_in_child(self) -> object:
        """Begin anew in a child. Its copies of what its parent staged hold their memory as before."""
        ledger, self._ledger = self._ledger, Ledger(self._make, self._max_bytes)
        self._ledger.closed = ledger.closed
        left_behind = (ledger.arenas, self._closings)
        self._reset()
        # Leases that end refer to it. They must neither keep idle arenas nor wake those who wait in the parent.
        for each in (ledger.free, ledger.leased, ledger.closing):
            each.clear()
        ledger.waiting = ()
        return left_behind

    def __repr__(self) -> str:
        """Show what is held."""
        state = "closed, " if self._ledger.closed else ""
        return f"<Pool {state}{self.statistics()}>"

    async def acquire(self, nbytes: int, *, device: torch.device | None = None) -> Lease:
        """Return a lease on an arena, waiting for the budget in turn.

        Args:
            nbytes: How much memory, in bytes.
            device: The accelerator that is to reach the memory, which then is registered with it if the pool pins;
                registering faults in too. None for no accelerator.

        Returns:
            A lease; its buffer is uninitialized.

        Raises:
            HostMemoryError: At once if ``nbytes`` can never fit the budget, or if the kernel refuses the memory.
            AcceleratorUnavailableError: If pinning is required and fails.
            StagerClosedError: If the pool is closed, also while waiting.

        May be cancelled at any time; whatever was granted by then goes back to the pool.
        """
        request = Request(nbytes, ThreadsafeEvent())
        if self._max_bytes is not None and request.size > self._max_bytes:
            raise HostMemoryError(
                f"{request.size} bytes of host memory are needed, but max_host_bytes is {self._max_bytes}.",
                remedy=f"Set max_host_bytes to at least {request.size}, or stage less at once.",
            )
        with self._lock:
            if self._ledger.closed:
                raise StagerClosedError
            self.used = True
            self._ledger.add(request)
        self._compare_with_limit(request)
        try:
            arena = await self._turn(request)
            await self._prepare(arena, device)
            if self._ledger.closed:
                raise StagerClosedError
            # Nothing is awaited after this. Up to here the request gives the arena back after an error, from here on
            # the death of the buffer does, and never both.
            return self._lease(arena, nbytes)
        except BaseException as error:
            request.abandoned = True
            self._returned.put(request)
            if isinstance(error, GeneratorExit):
                # The garbage collector may be closing this coroutine inside the lock.
                _nudge(self._ledger)
                if self._ledger.closed:
                    self._ended.put(True)
            else:
                self._advance()
            raise

    def _compare_with_limit(self, request: Request) -> None:
        """Say at the first lease that what may be leased is more than the container has: no error tells of that."""
        if self._compared:
            return
        self._compared = True
        wanted = self._max_bytes or request.size
        if MEMORY_LIMIT is not None and wanted > MEMORY_LIMIT:
            _logger.warning(
                "staging may take %d bytes of host memory (%s), but the control group of this process, its container, "
                "may have %d bytes in all; beyond that the kernel kills it. Lower max_host_bytes, or raise the limit.",
                wanted,
                "max_host_bytes" if self._max_bytes else "the first copy",
                MEMORY_LIMIT,
            )

    def statistics(self) -> PoolStatistics:
        """Return what is held now."""
        self._advance()
        with self._lock:
            arenas = self._ledger.arenas
            leases, waiting = len(self._ledger.leased), len(self._ledger.waiting)
        return PoolStatistics(
            arenas=len(arenas),
            leases=leases,
            waiting=waiting,
            pageable_bytes=sum(arena.nbytes for arena in arenas if arena.kind == "pageable"),
            shared_bytes=sum(arena.nbytes for arena in arenas if arena.kind == "shared"),
            pinned_bytes=sum(arena.nbytes for arena in arenas if arena.pinned),
        )

    def leased(self) -> tuple[Arena, ...]:
        """Return the arenas that are referred to now."""
        with self._lock:
            return tuple(self._ledger.leased)

    def close(self) -> None:
        """Begin to close: idle arenas are given back now, leased ones as their leases end, waiters get an error.

        Idempotent, never waits; :meth:`aclose` does.
        """
        with self._lock:
            if self._ledger.closed:
                return
            self._ledger.closed = True
        self._advance()
        with self._lock:
            # A lease that ends before the thread runs is not missed: it has put True into the queue that the thread
            # reads first.
            self._outliving = bool(self._ledger.leased)
        if self._outliving:
            # Leases end in finalizers, which may neither take locks nor start threads. Where no thread can be had, the
            # leased arenas go with the pool instead.
            with suppress(RuntimeError):
                start_thread(threading.Thread(target=self._outlive_leases, name="aiostage-leases", daemon=True))

    async def aclose(self) -> None:
        """Close, and wait until the idle arenas have been given back. Closes also when cancelled."""
        self.close()
        await all_settled(self._closings)

    async def _turn(self, request: Request) -> Arena:
        """Wait until a request is answered, and return what it was granted."""
        patience = anyio.current_time() + _PATIENCE_SECONDS
        while True:
            # Renewed before looking, so that what comes back after the look sets the one that is waited for.
            request.event = event = ThreadsafeEvent()
            self._advance()
            # Each move of the ledger answers all requests that it can; this may have been answered by another thread
            # between the two lines.
            if request.answered:
                return request.take()
            if anyio.current_time() >= patience:
                self._report(request)
                patience = math.inf
            again = _HELD_ELSEWHERE_SECONDS if self._ledger.held_elsewhere else math.inf
            await event.wait(min(again, patience - anyio.current_time()))

    def _report(self, request: Request) -> None:
        statistics = self.statistics()
        _logger.warning(
            "staging waits for %d bytes of host memory: of max_host_bytes=%s, %d are held by %d staged copies that are "
            "still referred to, and %d requests wait. It goes on when a staged copy is dropped.",
            request.size,
            self._max_bytes,
            statistics.pageable_bytes + statistics.shared_bytes,
            statistics.leases,
            statistics.waiting,
        )

    async def _prepare(self, arena: Arena, device: torch.device | None) -> None:
        """Do in worker threads what an arena needs before it is handed out."""
        # Not part of making it, because it blocks. An arena whose reservation was broken off is not used again, see
        # Ledger.advance.
        if not arena.reserved:
            await self._each(arena.reserve, pieces(0, arena.nbytes, _RESERVED_BYTES))
            arena.reserved = True
        pinning = self._pinning
        if pinning is not None and device is not None and pinning.wants(arena):
            # The driver takes an arena as a whole.
            # Faulted in first, in threads and in pieces: the driver would do it in one call that cannot be broken off.
            await self._each(arena.populate, (cold for cold in pieces(0, arena.nbytes) if not arena.is_warm(*cold)))
            await self._register(pinning, arena, device)

    async def _register(self, pinning: Pinning, arena: Arena, device: torch.device) -> None:
        """Register an arena. Cancelled, it does not wait for the driver: the next user of the arena does."""
        job = self._workers.job()
        job.put(partial(pinning.register, arena, device))
        job.close()
        try:
            try:
                await job.settled()
            finally:
                job.cancel()
            await job.join()
        finally:
            # An error's traceback has this frame in it, which must not lead back to the error.
            del job

    async def _each(self, work: Callable[[int, int], None], ranges: Iterable[tuple[int, int]]) -> None:
        async with self._workers.job() as job:
            for start, stop in ranges:
                job.put(partial(work, start, stop))

    def _lease(self, arena: Arena, nbytes: int) -> Lease:
        buffer = arena.exporter(nbytes)
        # None of these leads to the pool, which may be dropped while tensors live on. The arena is kept by this, and so
        # by the buffer's life alone.
        Finalizer(buffer, _end_lease, self._returned, self._ended, self._ledger, arena)
        return Lease(arena, buffer)

    def _advance(self) -> None:
        """Move the ledger forward with all that has come back, and carry out what it says. Never blocks for long."""
        again = True
        while again:
            with self._lock:
                # What finalizers have put into the queue is taken with the lock held, so that one thread alone sees
                # each of it.
                actions = self._ledger.advance(self._drain())
                last, self._outliving = self._outliving, self._outliving and bool(self._ledger.leased)
                # Of all threads that come here, the one that sees the last lease end says so, once.
                over = last and not self._outliving
            if over:
                self._ended.put(False)
            again = False
            # Outside of the lock, as is the closing: waking takes locks of event loops, and unmapping takes long.
            for request in actions.answered:
                if not request.event.set():
                    # Its event loop has closed, and will never take what it was granted.
                    self._returned.put(request)
                    again = True
            self._close_arenas(actions.close)

    def _drain(self) -> Iterator[Arena | Request]:
        while True:
            try:
                item = self._returned.get_nowait()
            except Empty:
                return
            yield item

    def _close_arenas(self, arenas: list[Arena]) -> None:
        if not arenas:
            return
        # Those that are over. Not by a last step of theirs, which another thread would run beside the step before it.
        for before in tuple(self._closings):
            if before.finished():
                self._closings.discard(before)
        job = self._workers.job()
        # Before its first step can end: aclose() waits for the jobs in the set, and finds it there.
        self._closings.add(job)
        for arena in arenas:
            try:
                job.put(partial(self._close_arena, arena))
            except RuntimeError:
                # No thread can be started: too many run, or the interpreter ends. This thread gives the memory back, so
                # that no arena is forgotten, and the one that outlives the leases goes on.
                job.run_next()
        job.close()

    def _close_arena(self, arena: Arena) -> None:
        try:
            arena.close()
        except Exception:
            # A driver that cannot unregister any more must not keep the next lease from its turn.
            _logger.exception("%r could not be given back properly", arena)
        finally:
            with self._lock:
                # Its bytes count until here: memory that is not yet given back must not be granted twice.
                self._ledger.closing.remove(arena)
            self._advance()

    def _outlive_leases(self) -> None:
        """Give arenas back as the leases of a closed pool end; runs in a thread of its own until the last has."""
        while self._ended.get():
            self._advance()


def _end_lease(returned: SimpleQueue[Arena | Request], ended: SimpleQueue[bool], ledger: Ledger, arena: Arena) -> None:
    """Take note that a lease has ended. Runs in a finalizer: in any thread, at any point, inside any lock."""
    returned.put(arena)
    if ledger.closed:
        ended.put(True)
    _nudge(ledger)


def _nudge(ledger: Ledger) -> None:
    """Wake the first waiter that can still be woken; it will look again, on behalf of all."""
    # A tuple that is replaced and never changed, so it may be gone through without a lock.
    for request in ledger.waiting:
        if not request.abandoned and request.event.set():
            return
        request.abandoned = True
