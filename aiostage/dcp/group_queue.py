"""The queue of saves and loads over one process group: one thread, and a gloo group of its own.

Ranks that enter collectives in different orders deadlock. Therefore each operation gets a number at the call, and the
thread runs the operations in this order, also when a later one is ready first.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

import anyio.lowlevel
import torch
import torch.distributed as dist
from anyio import get_cancelled_exc_class
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint.api import CheckpointException

from aiostage._arguments import check_flags, require_seconds
from aiostage._device import CallerStreams, default_backend
from aiostage._loop.coroutines import Finalizer, finish
from aiostage._loop.workers import Job, Workers
from aiostage.dcp.barrier import RankBarrier, StoreLostError
from aiostage.dcp.errors import RanksFailedError
from aiostage.errors import RankFailedError, StagingError

__all__ = ["DEFAULT_TIMEOUT", "Action", "GroupQueue", "QueuedOperation", "close", "operation_for"]

T = TypeVar("T")

Action: TypeAlias = Callable[[], Callable[[Any], T]]
"""The two steps of an operation. The first needs no other rank. It returns the second, which runs collectives on a
process group, or gets None in a single process."""

DEFAULT_TIMEOUT = 1800.0
"""Seconds: half an hour, what gloo grants each collective too."""

_ANSWER_SECONDS = 1.0
"""How often a rank in an operation checks whether another rank asks if it is alive."""


class QueuedOperation(Generic[T]):
    """One save or load of a queue: its number, and its result."""

    def __init__(self, queue: GroupQueue, number: int, timeout: float, tree: Any) -> None:
        self.number = number
        self.timeout = timeout
        self.job: Job = queue.workers.job()
        self._queue = queue
        self.caller = CallerStreams.record(default_backend(), tree)
        self._action: Action[T] | None = None
        self._results: list[T] = []
        # Its number has been given: without a word of this rank the others would wait for it until their timeout.
        self._on_drop = Finalizer(self, queue.skip, number, self.job)

    def hand_over(self, action: Action[T]) -> None:
        """Run it in the queue's thread, after the operations with lower numbers."""
        self._on_drop.detach()
        self._action = action
        self._queue.hand_over(self)

    async def refuse(self, reason: str) -> None:
        """Report to the other ranks that this one does not take part, unless the operation has started.

        It is shielded from cancellation: the other ranks get the reason first.
        """
        await finish(partial(self._queue.refuse, self.number, reason))
        # An operation that has not started never starts. One that has started ends by itself: the barrier decides how.
        self.job.cancel()
        self._action = None
        # Not handed over yet: its number is, so that the operations behind it get their turn.
        if self._on_drop.detach():
            self._queue.hand_over(self)

    async def outcome(self) -> T:
        """Wait until it has run. Cancelling changes nothing.

        Returns:
            What the action returned.

        Raises:
            RankFailedError: If any rank failed.
        """
        await self.job.settled()
        if self._results:
            return self._results[0]
        raise self.job.error or StagingError("the operation was cancelled before it ran.")

    async def complete(self, before: Callable[[], Awaitable[object]] = anyio.lowlevel.checkpoint) -> T:
        """Wait until it has run. When cancelled, refuse it; if it has started, wait until it has ended.

        Args:
            before: Is awaited first, and hands the operation over.

        Returns:
            What the action returned.

        Raises:
            RankFailedError: If any rank failed.
        """
        try:
            await before()
            return await self.outcome()
        except GeneratorExit:
            # A coroutine that is being closed may not await. `_on_drop` informs the other ranks.
            raise
        except get_cancelled_exc_class():
            await finish(partial(self.refuse, "it was cancelled"))
            await finish(self.job.settled)
            raise

    def carry_out(self) -> None:
        """Run it, in the queue's thread."""
        action, self._action = self._action, None
        if action is not None:
            # A thread starts on device 0, where it would create a context, and on default streams, which do not wait
            # for the caller's streams.
            with self.caller.entered():
                self._results.append(self._queue.carry_out(self.number, action, self.timeout))


class GroupQueue:
    """Runs the saves and loads over one process group, in the order of their calls.

    Args:
        parent: The process group whose ranks take part; None for this process alone.
    """

    def __init__(self, parent: Any) -> None:
        self.workers = Workers(1, "aiostage-dcp")
        # Two, so that a rank can refuse a later operation while it answers in the one that runs.
        self._messengers = Workers(2, "aiostage-dcp-messages")
        self._ranks: list[int] = dist.get_process_group_ranks(parent) if parent is not None else []
        self._rank = parent.rank() if parent is not None else 0
        self._parents_store: Any = parent.get_group_store() if parent is not None else None
        self._parents_name = parent.group_name if parent is not None else ""
        self._own_store: Any = None
        self._messengers_store: Any = None
        self._group: Any = None
        self._calls = 0
        self._turn = 0
        self._handed: deque[tuple[int, QueuedOperation[Any] | None]] = deque()
        self._waiting: dict[int, QueuedOperation[Any] | None] = {}
        self._arranging = self.workers.job()
        self._met: int | None = None

    def call(self, timeout: float, tree: Any) -> QueuedOperation[Any]:
        """Return the operation with the next number. All ranks must make the same calls in the same order."""
        # At the call, in the caller's thread. Ranks make their calls in one order, so the numbers agree although the
        # threads do not.
        number, self._calls = self._calls, self._calls + 1
        return QueuedOperation(self, number, timeout, tree)

    def hand_over(self, call: QueuedOperation[Any]) -> None:
        """Run an operation after those before it, or skip it if it was cancelled."""
        self._handed.append((call.number, call))
        self._arranging.put(self._take_turns)

    def skip(self, number: int, job: Job) -> None:
        """Skip an operation that was dropped.

        The collector calls this, in any thread. Therefore it takes no lock and only queues work.
        """
        job.cancel()
        self._handed.append((number, None))
        self._arranging.put(self._take_turns)
        tell = self._messengers.job()
        tell.put(partial(self._refuse, number, "its save or load was dropped before it was awaited"))
        tell.close()

    async def refuse(self, number: int, reason: str) -> None:
        """Report to the other ranks that this one does not take part in an operation."""
        if self._parents_store is not None:
            await self._messengers.run(partial(self._refuse, number, reason))

    def _refuse(self, number: int, reason: str) -> None:
        # If the store does not answer, each rank finds that out by itself.
        with contextlib.suppress(StoreLostError):
            self._messengers_barrier(number).refuse(reason)

    def _take_turns(self) -> None:
        """Queue the operations that are next in order. Only the queue's thread does this, so it needs no lock."""
        while self._handed:
            number, call = self._handed.popleft()
            self._waiting[number] = call
        # A number that has not been handed over holds up all behind it: the other ranks run them in this order too.
        while self._turn in self._waiting:
            call = self._waiting.pop(self._turn)
            self._turn += 1
            if call is not None:
                call.job.put(call.carry_out)
                call.job.close()

    def carry_out(self, number: int, action: Action[T], timeout: float) -> T:
        """Wait for the other ranks, then run the collectives, in the queue's thread."""
        if self._parents_store is None:
            return _act(action(), None, [0])
        try:
            if self._own_store is None:
                # A connection of its own: a wait on the parent's would block all other users of it in this process.
                self._own_store = self._parents_store.clone()
            barrier = RankBarrier(self._own_store, number, self._rank, len(self._ranks))
            try:
                collectives = action()
            except Exception as error:
                barrier.refuse(f"{type(error).__name__}: {error}")
                raise
            failures = barrier.arrive(timeout)
            if failures:
                raise RanksFailedError(self._named(failures))
            return self._run_collectives(collectives, barrier, number, timeout)
        except StoreLostError as error:
            self._drop_group()
            reason = f"the store of the process group, which this rank usually serves, does not answer ({error})"
            raise RanksFailedError({self._ranks[0]: reason}, lost=True) from error

    def _run_collectives(self, collectives: Callable[[Any], T], barrier: RankBarrier, number: int, timeout: float) -> T:
        over = threading.Event()
        # All ranks have arrived at this operation, so none looks at the keys of the one before.
        before, self._met = self._met, number
        answering = self._messengers.job()
        answering.put(partial(self._answer, number, over, before))
        answering.close()
        try:
            result = _act(collectives, self._group_for(number, timeout), self._ranks)
        except RankFailedError:
            _leave(barrier)
            raise
        except Exception as error:
            # The frames refer to the group, and its connections close only when the last reference is gone. Peers that
            # wait for this rank wake up when the connections close.
            broken = error.with_traceback(None)
        else:
            _leave(barrier)
            return result
        finally:
            # Ends the thread that answers, which waits for this.
            over.set()
        self._drop_group()
        reason = f"{type(broken).__name__}: {broken}"
        raise RanksFailedError(self._named(barrier.blame(reason)), lost=True) from broken

    def _answer(self, number: int, over: threading.Event, before: int | None) -> None:
        """Report that this process is alive if another rank asks, until the operation has ended.

        Before that, delete the keys of an operation before it: each is a round trip to the store, for which the
        collectives need not wait.
        """
        with contextlib.suppress(StoreLostError):
            if before is not None:
                self._messengers_barrier(before).forget()
            barrier = self._messengers_barrier(number)
            while not over.wait(_ANSWER_SECONDS):
                if barrier.answer():
                    return

    def _messengers_barrier(self, number: int) -> RankBarrier:
        # No lock: two threads may both make a connection. One of the two is dropped. They share the other: its requests
        # take turns by themselves, and neither thread waits in it, which would hold up the other.
        if self._messengers_store is None:
            self._messengers_store = self._parents_store.clone()
        return RankBarrier(self._messengers_store, number, self._rank, len(self._ranks))

    def _group_for(self, number: int, timeout: float) -> Any:
        """Return the gloo group. It is made at the first use, and again after a rank was lost."""
        if self._group is None or self._group not in distributed_c10d._world.pg_map:
            # A private function, because dist.new_group names a group by the number of groups in this process. That
            # number may differ between ranks while their trainers make groups of their own.
            group, _ = distributed_c10d._new_process_group_helper(
                len(self._ranks),
                self._rank,
                self._ranks,
                dist.Backend(dist.Backend.GLOO),
                self._parents_store,
                distributed_c10d.GroupName(f"aiostage-{self._parents_name}-{number}"),
                timeout=timedelta(seconds=timeout),
                group_desc="aiostage checkpoints",
            )
            distributed_c10d._world.pg_group_ranks[group] = {rank: number for number, rank in enumerate(self._ranks)}
            self._group = group
        backend = self._group._get_backend(torch.device("cpu"))
        # TORCH_DISTRIBUTED_DEBUG=DETAIL wraps it.
        getattr(backend, "wrapped_pg", backend)._set_default_timeout(timedelta(seconds=timeout))
        return self._group

    def _drop_group(self) -> None:
        group, self._group = self._group, None
        if group is not None and group in distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)

    async def close(self) -> None:
        """Wait for the operations that were handed over, then close the gloo group. A later operation makes another."""
        closing = self.workers.job()

        def after_those_before() -> None:
            closing.put(self._drop_group)
            closing.close()

        self._arranging.put(self._take_turns)
        # Behind the turns: what was handed over by now is in the queue before the step that drops the group.
        self._arranging.put(after_those_before)
        await finish(closing.settled)

    def _named(self, failures: Mapping[int, str]) -> dict[int, str]:
        return {self._ranks[rank]: reason for rank, reason in failures.items()}


def _act(collectives: Callable[[Any], T], group: Any, ranks: Sequence[int]) -> T:
    try:
        return collectives(group)
    except CheckpointException as error:
        failures = {}
        for rank, (raised, _) in error.failures.items():
            failures[ranks[rank]] = f"{type(raised).__name__}: {raised}"
            # The frames refer to the staged tensors, which must not live as long as this error. Clearing the frames
            # does not help, because DCP's are those of closures. The error has them as text.
            raised.__traceback__ = None
        raise RanksFailedError(failures) from error.with_traceback(None)


def _leave(barrier: RankBarrier) -> None:
    # The result stands. If the store is lost, the next operation reports it.
    with contextlib.suppress(StoreLostError):
        barrier.leave()


_ALONE = GroupQueue(None)
_QUEUES: weakref.WeakKeyDictionary[Any, GroupQueue] = weakref.WeakKeyDictionary()


def operation_for(process_group: Any, tree: Any, *, no_dist: bool, timeout: float) -> QueuedOperation[Any]:
    """Return the next operation in the queue of a process group.

    Args:
        process_group: Its ranks take part; None for all ranks.
        tree: What is saved or loaded into.
        no_dist: Whether this process acts alone, as it does if there are no process groups.
        timeout: Seconds to wait for other ranks.

    Raises:
        TypeError: If the timeout is no number.
        ValueError: If this rank is not in the group, or the timeout is not above 0.
    """
    check_flags(no_dist=no_dist)
    timeout = require_seconds("timeout", timeout)
    if no_dist or not dist.is_available() or not dist.is_initialized():
        return _ALONE.call(timeout, tree)
    return _queue_of(process_group).call(timeout, tree)


def _queue_of(process_group: Any) -> GroupQueue:
    """Return the queue of a process group, made once."""
    parent = process_group if process_group is not None else dist.group.WORLD
    if dist.get_rank(parent) < 0:
        raise ValueError(f"rank {dist.get_rank()} is not in the process group; call this only on its ranks")
    if parent not in _QUEUES:
        _QUEUES[parent] = GroupQueue(parent)
    return _QUEUES[parent]


async def close(process_group: Any = None) -> None:
    """Close the gloo group that saves and loads over a process group have used, once those asked for are done.

    A later save or load makes another. ``dist.destroy_process_group()`` closes it too, and needs this before it only if
    a save may still be under way.

    Args:
        process_group: As for :func:`~aiostage.dcp.save`.

    May be cancelled; the group is closed first.
    """
    if dist.is_available() and dist.is_initialized():
        await _queue_of(process_group).close()
