"""Events that can only be asked whether they are done, as awaitables.

Asking takes a turn of the event loop, so one waiter asks for all. No task is started for it: the first waiter
*leads*. It sleeps, asks about the events that are due, and wakes the waiters whose events are done, until its own is.
A leader that leaves names another in the same step. So there is a leader whenever there are waiters, no event is asked
without a waiter, and nothing is left behind after the last one.
"""

from __future__ import annotations

import heapq
from contextlib import nullcontext, suppress
from functools import partial
from inspect import iscoroutinefunction
from itertools import count
from time import monotonic
from typing import Final
from weakref import ReferenceType, ref

import anyio
from anyio.lowlevel import RunVar, checkpoint

from aiostage._loop.alarm import Alarm
from aiostage._loop.closing import Closing
from aiostage._loop.transfers import Transfer, time_to_next_look
from aiostage.abc import SupportsQuery
from aiostage.errors import StagerClosedError, StagingError, shown

__all__ = ["wait_event", "wait_transfer"]

_LONGEST_LOOK_SECONDS: Final = 0.0005
"""After this the loop gets its turn, and the rest of the events are asked later."""

_TOGETHER_SECONDS: Final = 20e-6
"""What is due this soon is asked about now. Guessed, from what a turn of the loop costs."""

_SPIN_SECONDS: Final = 100e-6
"""Sleeps as short as this, near the expected end of a transfer, are spent giving the loop turn after turn."""

_REST: Final = 4
"""How many times as long as a look has taken the loop is left alone, however many events there are and slow to ask."""


async def wait_event(event: SupportsQuery) -> None:
    """Wait until an event is done, without blocking the event loop.

    Any number of coroutines may wait for any number of events, and several for one; each event loop asks about all of
    them together, soon after the start and then less and less often, up to every 10 ms.

    Args:
        event: Anything with ``query() -> bool``: ``torch.Event``, that of a device, or your own. It is asked in
            the thread of the event loop, so ``query`` must not block.

    Raises:
        StagingError: If ``query`` raises; its error is the cause. Every waiter gets an error of its own.
        TypeError: If it has no ``query()``, or one that is a coroutine function, whose result would count as true.

    Cancelling changes nothing but that this waiter leaves.
    """
    query = getattr(event, "query", None)
    if not callable(query) or isinstance(event, type) or iscoroutinefunction(query):
        raise TypeError(f"an event has a plain method query() that says whether it is done; {shown(event)} has none")
    await _wait(event, None, None)


async def wait_transfer(event: SupportsQuery, transfer: Transfer, closing: Closing | None = None) -> None:
    """Wait like :func:`wait_event` for an event behind a transfer, asking mostly when it should be done.

    Args:
        event: Done when the bytes have arrived.
        transfer: The bytes, announced when the device was told to move them.
        closing: Of the stager that wants them. Once that is closed, all waits end.

    Raises:
        StagingError: If ``query`` raises, or has raised for an event of the same stream before.
        StagerClosedError: If the stager is closed.
    """
    await _wait(event, transfer, closing)


async def _wait(event: SupportsQuery, transfer: Transfer | None, closing: Closing | None) -> None:
    if closing is not None:
        closing.check()
    current = _polling.get()
    polling = current() if current is not None else None
    if polling is None or not polling.watches(event):
        done, error = _ask(event, transfer)
        if error is not None:
            raise _failure(event, error) from error
        if done:
            await checkpoint()
            return
    if polling is None:
        polling = _Polling()
        _polling.set(ref(polling))
    await polling.wait(event, transfer, closing)


class _Watch:
    """An event with a waiter."""

    __slots__ = ("began", "event", "looked", "transfer", "waiters")

    def __init__(self, event: SupportsQuery, transfer: Transfer | None) -> None:
        # None once it has no waiter: an entry of the agenda must not keep an event alive.
        self.event: SupportsQuery | None = event
        self.transfer = transfer
        self.looked = monotonic()
        self.began = self.looked if transfer is None else transfer.began
        # In the order of their coming, and to be left in any.
        self.waiters: dict[_Waiter, None] = {}

    def next_look(self) -> float:
        """Return when to ask again."""
        expected = None if self.transfer is None else self.transfer.expected()
        elapsed = self.looked - self.began
        if expected is None:
            return self.looked + time_to_next_look(elapsed, None)
        return self.looked + time_to_next_look(elapsed, expected.when - self.looked, expected.uncertainty)


class _Waiter:
    """One call of :func:`wait_event`. It is woken when its event is done, when it is sent away, or to lead."""

    __slots__ = ("__weakref__", "done", "error", "is_sent_away", "wake", "watch")

    def __init__(self, watch: _Watch) -> None:
        self.watch = watch
        self.wake = anyio.Event()
        # Whether there is nothing to wait for any more.
        self.done = False
        self.is_sent_away = False
        self.error: Exception | None = None


class _Polling:
    """Those who wait on one event loop. The coroutines that wait keep it alive, and nothing else does."""

    def __init__(self) -> None:
        self._watches: dict[int, _Watch] = {}
        # When to ask about which. May hold watches that have been left or are done.
        self._agenda: list[tuple[float, int, _Watch]] = []
        self._order = count()
        # One of those who wait, whenever there are any; it may have been named but not run yet.
        self._leader: _Waiter | None = None
        self._alarm = Alarm()
        self._alarm_at = 0.0
        self._rest_until = 0.0

    def watches(self, event: SupportsQuery) -> bool:
        """Return whether an event has a waiter already."""
        return id(event) in self._watches

    async def wait(self, event: SupportsQuery, transfer: Transfer | None, closing: Closing | None) -> None:
        """Wait for an event that was not done a moment ago."""
        waiter = self._join(event, transfer)
        try:
            # Weakly: a stager must not keep a coroutine alive whose loop has gone.
            with nullcontext() if closing is None else closing.telling(partial(_send_away, ref(self), ref(waiter))):
                await self._until_done(waiter)
        finally:
            self._leave(waiter)
        if waiter.is_sent_away:
            raise StagerClosedError
        if waiter.error is not None:
            raise _failure(event, waiter.error) from waiter.error

    async def _until_done(self, waiter: _Waiter) -> None:
        """Wait, and lead whenever no other waiter does, until a waiter's event is done or it is sent away."""
        if self._leader is not waiter:
            await waiter.wake.wait()
        while not waiter.done:
            self._set_alarm()
            if self._is_imminent():
                # Waking from a sleep takes longer than the sleep would.
                while monotonic() < self._alarm_at:
                    await checkpoint()
            else:
                await self._alarm.wait()
            self._look()

    def send_away(self, waiter: _Waiter) -> None:
        """Have a waiter leave, although its event is not done."""
        if not waiter.done:
            waiter.done = waiter.is_sent_away = True
            _wake(waiter)
            if self._leader is waiter:
                self._alarm.set(monotonic())

    def _join(self, event: SupportsQuery, transfer: Transfer | None) -> _Waiter:
        watch = self._watches.get(id(event))
        if watch is None:
            watch = self._watches[id(event)] = _Watch(event, transfer)
            self._plan(watch)
        waiter = _Waiter(watch)
        watch.waiters[waiter] = None
        if self._leader is None:
            self._leader = waiter
        elif self._agenda[0][0] < self._alarm_at:
            self._set_alarm()
        return waiter

    def _leave(self, waiter: _Waiter) -> None:
        watch = waiter.watch
        watch.waiters.pop(waiter, None)
        if not watch.waiters and watch.event is not None:
            del self._watches[id(watch.event)]
            watch.event = None
        if self._leader is not waiter:
            return
        self._leader = None
        if self._watches:
            # Of those who came last: they are likely to wait longest.
            self._leader = next(reversed(self._watches[next(reversed(self._watches))].waiters))
            _wake(self._leader)
        else:
            self._agenda.clear()
            self._alarm.close_soon(unless=self._is_wanted)

    def _is_wanted(self) -> bool:
        return bool(self._watches)

    def _plan(self, watch: _Watch) -> None:
        heapq.heappush(self._agenda, (watch.next_look(), next(self._order), watch))

    def _set_alarm(self) -> None:
        """Set the alarm to what is due next. What the leader waits for is on the agenda, so there is something."""
        while self._agenda[0][2].event is None:
            heapq.heappop(self._agenda)
        self._alarm_at = max(self._agenda[0][0], self._rest_until)
        self._alarm.set(self._alarm_at)

    def _is_imminent(self) -> bool:
        """Return whether what is due next is a transfer that is expected to arrive now, within some microseconds."""
        transfer = self._agenda[0][2].transfer
        if transfer is None or self._alarm_at - monotonic() > _SPIN_SECONDS:
            return False
        return transfer.expected() is not None

    def _look(self) -> None:
        """Ask about what is due, in the order in which it is, and wake those whose events are done."""
        began = now = monotonic()
        # What is due in a moment is asked about at once, rather than in a turn of its own.
        horizon = now + _TOGETHER_SECONDS
        while self._agenda and self._agenda[0][0] <= horizon and now - began < _LONGEST_LOOK_SECONDS:
            watch = heapq.heappop(self._agenda)[2]
            if watch.event is None:
                continue
            done, error = _ask(watch.event, watch.transfer, watch.looked)
            now = watch.looked = monotonic()
            if done:
                self._finish(watch, error)
            else:
                self._plan(watch)
        self._rest_until = now + _REST * (now - began)

    def _finish(self, watch: _Watch, error: Exception | None) -> None:
        del self._watches[id(watch.event)]
        watch.event = None
        for waiter in watch.waiters:
            waiter.done, waiter.error = True, error
            _wake(waiter)


_polling: RunVar[ReferenceType[_Polling] | None] = RunVar("aiostage_polling", None)


def _ask(event: SupportsQuery, transfer: Transfer | None, since: float | None = None) -> tuple[bool, Exception | None]:
    """Return whether an event is done, and what has become of it if that is an error.

    Args:
        event: Which.
        transfer: What it stands for.
        since: When it was last seen not to be done, None if it was never asked.
    """
    if transfer is not None and (failure := transfer.failure) is not None:
        return True, failure
    try:
        done = event.query()
    except Exception as error:
        # Its frames lead to those who asked, and it would keep them and all that they copy alive.
        error.__traceback__ = None
        if transfer is not None:
            transfer.failed(error)
        return True, error
    if done and transfer is not None and since is not None:
        transfer.arrived(monotonic(), since)
    return bool(done), None


def _send_away(polling: ReferenceType[_Polling], waiter: ReferenceType[_Waiter]) -> None:
    there, whom = polling(), waiter()
    if there is not None and whom is not None:
        there.send_away(whom)


def _wake(waiter: _Waiter) -> None:
    # A coroutine that the collector closes after its loop has been closed has no waiter to wake.
    with suppress(RuntimeError):
        waiter.wake.set()


def _failure(event: SupportsQuery, error: Exception) -> StagingError:
    return StagingError(
        f"waiting for {shown(event)} failed: {type(error).__name__}: {str(error).rstrip('.')}.",
        remedy="What was enqueued on its stream cannot be relied on.",
    )
