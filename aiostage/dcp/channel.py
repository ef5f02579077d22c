"""The ranks of one process group: their own gloo group, and one thread in which they save and load in the order asked.

Ranks that enter collectives in different orders wait for each other for ever. Calls are therefore numbered when they
are made, and carried out one after the other, whichever is ready first.
"""

from __future__ import annotations

import contextlib
import math
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

from aiostage._device import CallerStreams, default_backend
from aiostage._loop.coroutines import finish
from aiostage._loop.workers import Job, Workers
from aiostage.dcp.errors import RanksFailedError
from aiostage.dcp.roll import RollCall, StoreLostError
from aiostage.errors import RankFailedError, StagingError, shown

__all__ = ["DEFAULT_TIMEOUT", "Action", "Call", "Channel", "call_for", "close"]

T = TypeVar("T")

Action: TypeAlias = Callable[[], Callable[[Any], T]]
"""What a call does: what this rank can do by itself first, which returns what it then does together with the others, on
a process group, or None in a single process."""

DEFAULT_TIMEOUT = 1800.0
"""Seconds: half an hour, what gloo grants each collective too."""

_LOOK_SECONDS = 1.0
"""How often a rank in the middle of a call looks whether another asks if it lives."""


class Call(Generic[T]):
    """One save or load of a channel: its place in the order, and how it goes."""

    def __init__(self, channel: Channel, number: int, timeout: float, tree: Any) -> None:
        self.number = number
        self.timeout = timeout
        self.job: Job = channel.workers.job()
        self._channel = channel
        self.caller = CallerStreams.record(default_backend(), tree)
        self._action: Action[T] | None = None
        self._results: list[T] = []
        self._forsaken = weakref.finalize(self, channel.forsake, number, self.job)
        self._forsaken.atexit = False

    def hand_over(self, action: Action[T]) -> None:
        """Let it be carried out, in the channel's thread, when its turn comes."""
        self._forsaken.detach()
        self._action = action
        self._channel.hand_over(self)

    async def refuse(self, reason: str) -> None:
        """Tell the other ranks that this one will not take part, if that is not too late.

        Shielded from cancellation: the other ranks get the reason first.
        """
        await finish(partial(self._channel.refuse, self.number, reason))
        # If it has not begun it never will; if it has, it ends by itself, at once or with its work done.
        self.job.cancel()
        self._action = None
        if self._forsaken.detach() is not None:
            self._channel.hand_over(self)

    async def outcome(self) -> T:
        """Wait until it has been carried out. Cancelling changes nothing.

        Returns:
            What the action returned.

        Raises:
            RankFailedError: If any rank failed.
        """
        await self.job.settled()
        if self._results:
            return self._results[0]
        raise self.job.error or StagingError("the call was given up before it was carried out.")

    async def complete(self, before: Callable[[], Awaitable[object]] = anyio.lowlevel.checkpoint) -> T:
        """Wait until it has been carried out. When cancelled, refuse it, or wait all the same if that is too late.

        Args:
            before: What has to be awaited first, and hands it over.

        Returns:
            What the action returned.

        Raises:
            RankFailedError: If any rank failed.
        """
        try:
            await before()
            return await self.outcome()
        except GeneratorExit:
            # A coroutine that is being closed may not wait. The other ranks are told when this is dropped.
            raise
        except get_cancelled_exc_class():
            await finish(partial(self.refuse, "it was cancelled"))
            await finish(self.job.settled)
            raise

    def carry_out(self) -> None:
        """Do it, in the channel's thread."""
        action, self._action = self._action, None
        if action is not None:
            # A thread begins on device 0, which it would wake up, and on default streams, which follow nothing.
            with self.caller.entered():
                self._results.append(self._channel.carry_out(self.number, action, self.timeout))


class Channel:
    """What saves and loads over one process group have in common.

    Args:
        parent: Whose ranks take part; None for this process alone.
    """

    def __init__(self, parent: Any) -> None:
        self.workers = Workers(1, "aiostage-dcp")
        # Two, so that a rank can refuse a later call while it answers for the present one.
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
        self._handed: deque[tuple[int, Call[Any] | None]] = deque()
        self._waiting: dict[int, Call[Any] | None] = {}
        self._arranging = self.workers.job()
        self._met: RollCall | None = None

    def call(self, timeout: float, tree: Any) -> Call[Any]:
        """Return the next place in the order. Every rank must make the same calls in the same order."""
        number, self._calls = self._calls, self._calls + 1
        return Call(self, number, timeout, tree)

    def hand_over(self, call: Call[Any]) -> None:
        """Carry out a call when its turn comes, or step over it if it was cancelled."""
        self._handed.append((call.number, call))
        self._arranging.put(self._take_turns)

    def forsake(self, number: int, job: Job) -> None:
        """Skip a call that can no longer be handed over. Called by the collector, so it only leaves notes."""
        job.cancel()
        self._handed.append((number, None))
        self._arranging.put(self._take_turns)
        tell = self._messengers.job()
        tell.put(partial(self._refuse, number, "its save or load was dropped before it was awaited"))
        tell.close()

    async def refuse(self, number: int, reason: str) -> None:
        """Tell the other ranks that this one will not take part in a call."""
        if self._parents_store is not None:
            await self._messengers.run(partial(self._refuse, number, reason))

    def _refuse(self, number: int, reason: str) -> None:
        # A store that does not answer reaches no rank, and every rank finds that out by itself.
        with contextlib.suppress(StoreLostError):
            self._messengers_roll_call(number).refuse(reason)

    def _take_turns(self) -> None:
        """Put the calls that are ready in order. Only the channel's thread does this, so it needs no lock."""
        while self._handed:
            number, call = self._handed.popleft()
            self._waiting[number] = call
        while self._turn in self._waiting:
            call = self._waiting.pop(self._turn)
            self._turn += 1
            if call is not None:
                call.job.put(call.carry_out)
                call.job.close()

    def carry_out(self, number: int, action: Action[T], timeout: float) -> T:
        """Meet the other ranks and act together with them, in the channel's thread."""
        if self._parents_store is None:
            return _act(action(), None, [0])
        try:
            if self._own_store is None:
                # A connection of its own: waiting in the parent's would keep everybody else in the process from it.
                self._own_store = self._parents_store.clone()
            roll = RollCall(self._own_store, number, self._rank, len(self._ranks))
            try:
                together = action()
            except Exception as error:
                roll.refuse(f"{type(error).__name__}: {error}")
                raise
            failures = roll.arrive(timeout)
            if failures:
                raise RanksFailedError(self._named(failures))
            if self._met is not None:
                self._met.forget()
            self._met = roll
            return self._act_together(together, roll, number, timeout)
        except StoreLostError as error:
            self._drop_group()
            reason = f"the store by which the ranks met, which it usually keeps, does not answer ({error})"
            raise RanksFailedError({self._ranks[0]: reason}, lost=True) from error

    def _act_together(self, together: Callable[[Any], T], roll: RollCall, number: int, timeout: float) -> T:
        over = threading.Event()
        answering = self._messengers.job()
        answering.put(partial(self._answer, number, over))
        answering.close()
        try:
            result = _act(together, self._group_for(number, timeout), self._ranks)
        except RankFailedError:
            _leave(roll)
            raise
        except Exception as error:
            # The frames refer to the group, and its connections are closed only once nothing does. Peers that wait
            # for this rank wake up by that.
            broken = error.with_traceback(None)
        else:
            _leave(roll)
            return result
        finally:
            over.set()
        self._drop_group()
        reason = f"{type(broken).__name__}: {broken}"
        raise RanksFailedError(self._named(roll.blame(reason)), lost=True) from broken

    def _answer(self, number: int, over: threading.Event) -> None:
        """Say that this process lives if another asks, until the call is over."""
        with contextlib.suppress(StoreLostError):
            roll = self._messengers_roll_call(number)
            while not over.wait(_LOOK_SECONDS):
                if roll.answer():
                    return

    def _messengers_roll_call(self, number: int) -> RollCall:
        # Two threads may both make one, of which one is then dropped.
        if self._messengers_store is None:
            self._messengers_store = self._parents_store.clone()
        return RollCall(self._messengers_store, number, self._rank, len(self._ranks))

    def _group_for(self, number: int, timeout: float) -> Any:
        """Return the gloo group, which is made when it is first needed and after the ranks have lost each other."""
        if self._group is None or self._group not in distributed_c10d._world.pg_map:
            # new_group would name it by how many groups this process has, which need not be the same on all ranks
            # while their trainers make groups of their own.
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
        # With TORCH_DISTRIBUTED_DEBUG=DETAIL it is wrapped.
        getattr(backend, "wrapped_pg", backend)._set_default_timeout(timedelta(seconds=timeout))
        return self._group

    def _drop_group(self) -> None:
        group, self._group = self._group, None
        if group is not None and group in distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)

    async def close(self) -> None:
        """Wait for the calls that were handed over, then close the gloo group. A later call makes another."""
        closing = self.workers.job()

        def after_those_before() -> None:
            closing.put(self._drop_group)
            closing.close()

        self._arranging.put(self._take_turns)
        self._arranging.put(after_those_before)
        await finish(closing.settled)

    def _named(self, failures: Mapping[int, str]) -> dict[int, str]:
        return {self._ranks[rank]: reason for rank, reason in failures.items()}


def _act(together: Callable[[Any], T], group: Any, ranks: Sequence[int]) -> T:
    try:
        return together(group)
    except CheckpointException as error:
        failures = {}
        for rank, (raised, _) in error.failures.items():
            failures[ranks[rank]] = f"{type(raised).__name__}: {raised}"
            # The frames lead to the staged tensors, which must not live as long as the report that writing them failed.
            # Clearing frames would not do, for DCP's are those of closures. The error has them as text.
            raised.__traceback__ = None
        raise RanksFailedError(failures) from error.with_traceback(None)


def _leave(roll: RollCall) -> None:
    # The call went as it went; if the store is lost, the next one will say so.
    with contextlib.suppress(StoreLostError):
        roll.leave()


_ALONE = Channel(None)
_CHANNELS: weakref.WeakKeyDictionary[Any, Channel] = weakref.WeakKeyDictionary()


def call_for(process_group: Any, tree: Any, *, no_dist: bool, timeout: float) -> Call[Any]:
    """Return the next call of the channel of a process group.

    Args:
        process_group: Its ranks take part; None for all ranks.
        tree: What is saved or loaded into.
        no_dist: Whether this process acts alone, as it does if there are no process groups.
        timeout: Seconds to wait for other ranks.

    Raises:
        ValueError: If this rank is not in the group, or the timeout is not above 0.
    """
    if isinstance(timeout, str) or not 0 < timeout < math.inf:
        raise ValueError(f"timeout must be a number of seconds above 0, not {shown(timeout)}")
    if no_dist or not dist.is_available() or not dist.is_initialized():
        return _ALONE.call(timeout, tree)
    return _channel_of(process_group).call(timeout, tree)


def _channel_of(process_group: Any) -> Channel:
    """Return the channel of a process group, made once."""
    parent = process_group if process_group is not None else dist.group.WORLD
    if dist.get_rank(parent) < 0:
        raise ValueError(f"rank {dist.get_rank()} is not in the process group: only the ranks that are may call this")
    if parent not in _CHANNELS:
        _CHANNELS[parent] = Channel(parent)
    return _CHANNELS[parent]


async def close(process_group: Any = None) -> None:
    """Close the gloo group that saves and loads over a process group have used, once those asked for are done.

    A later save or load makes another. ``dist.destroy_process_group()`` closes it too, and needs this before it only if
    a save may still be under way.

    Args:
        process_group: As for :func:`~aiostage.dcp.save`.

    May be cancelled; the group is closed first.
    """
    if dist.is_available() and dist.is_initialized():
        await _channel_of(process_group).close()
