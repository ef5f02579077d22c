"""Events that can only be asked whether they are done, as awaitables.

One timer of each event loop asks about the events of all its waiters, without a thread. The longer a wait has taken,
the longer it is until its event is asked again, so that asking costs a small share of the time, and the waiter runs a
small share of the time late.
"""

from __future__ import annotations

import heapq
from contextlib import nullcontext
from functools import partial
from inspect import iscoroutinefunction
from itertools import count
from time import monotonic
from typing import Final
from weakref import ReferenceType, ref

import anyio
from anyio.lowlevel import RunVar, checkpoint

from aiostage._loop.coroutines import Closing
from aiostage._loop.timer import Timer
from aiostage.abc import SupportsQuery
from aiostage.errors import StagerClosedError, StagingError, shown

__all__ = ["wait_event", "wait_until_done"]

_SHARE: Final = 1 / 10
"""Of the time that a wait has taken already, until its event is asked again: half of it is how late the waiter is."""

_SHORTEST_SECONDS: Final = 100e-6
"""Between two looks. A look costs the loop some 20 to 40 us, most of it for waking up."""

_LONGEST_SECONDS: Final = 0.02

_LONGEST_POLL_SECONDS: Final = 0.0005
"""After this the loop gets its turn, and the rest of the events are asked later."""

_REST: Final = 15
"""How many times as long as a look has taken no event is asked, however many events there are and slow to ask."""


async def wait_event(event: SupportsQuery) -> None:
    """Wait until an event is done, without blocking the event loop.

    Any number of coroutines may wait for any number of events, and several for one. Each event loop asks about all of
    them together: after 100 us at first, then after a tenth of the time that a wait has taken, at most 20 ms.

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
    await wait_until_done(event, None)


async def wait_until_done(event: SupportsQuery, closing: Closing | None) -> None:
    """Wait like :func:`wait_event`.

    Args:
        event: Which.
        closing: The state of the stager that waits. Once it is closed, all waits end.

    Raises:
        StagingError: If ``query`` raises.
        StagerClosedError: If the stager is closed.
    """
    if closing is not None:
        closing.check()
    current = _polling.get()
    polling = current() if current is not None else None
    # An event that is watched already was asked a moment ago, and will be soon; all who wait for it share that
    # question.
    if polling is None or not polling.watches(event):
        done, error = _ask(event)
        if error is not None:
            raise _failure(event, error) from error
        if done:
            await checkpoint()
            return
    if polling is None:
        # Weakly: what is kept for a loop would keep the loop. Its timer and those who wait keep it.
        polling = _Polling()
        _polling.set(ref(polling))
    await polling.wait(event, closing)


class _Watch:
    """An event with a waiter."""

    __slots__ = ("began", "event", "waiters")

    def __init__(self, event: SupportsQuery) -> None:
        # None once it has no waiter: an entry of the agenda must not keep an event alive.
        self.event: SupportsQuery | None = event
        self.began = monotonic()
        self.waiters: set[_Waiter] = set()

    def interval(self, now: float) -> float:
        """Return how long it is to be until the event is asked again."""
        return min(max((now - self.began) * _SHARE, _SHORTEST_SECONDS), _LONGEST_SECONDS)


class _Waiter:
    """One call of :func:`wait_until_done`."""

    __slots__ = ("__weakref__", "error", "wake")

    def __init__(self) -> None:
        self.wake = anyio.Event()
        self.error: BaseException | None = None


class _Polling(Timer):
    """Those who wait on one event loop."""

    # No lock: all of it runs in the thread of that loop. What other threads want of it, they post there.

    def __init__(self) -> None:
        super().__init__()
        self._watches: dict[int, _Watch] = {}
        # When to ask about which. May hold watches that have no waiter any more.
        self._agenda: list[tuple[float, int, _Watch]] = []
        self._order = count()
        self._next_poll = 0.0
        self._rest_until = 0.0

    def watches(self, event: SupportsQuery) -> bool:
        """Return whether an event has a waiter already."""
        return id(event) in self._watches

    async def wait(self, event: SupportsQuery, closing: Closing | None) -> None:
        """Wait for an event that was not done a moment ago."""
        waiter = _Waiter()
        # By identity, for an event need not be hashable. A watch refers to its event, so that no other has its id.
        watch = self._watches.get(id(event))
        if watch is None:
            watch = self._watches[id(event)] = _Watch(event)
            self._plan(watch, watch.began)
            # Otherwise the timer is set to an earlier time, and ring() sets it anew.
            if len(self._watches) == 1 or self._agenda[0][0] < self._next_poll:
                self._set_timer()
        watch.waiters.add(waiter)
        try:
            # Weakly: a stager must not keep a coroutine alive whose loop has gone.
            with nullcontext() if closing is None else closing.on_close(partial(_end, ref(waiter))):
                await waiter.wake.wait()
        finally:
            watch.waiters.discard(waiter)
            if not watch.waiters:
                self._forget(watch)
        if isinstance(waiter.error, Exception) and not isinstance(waiter.error, StagerClosedError):
            raise _failure(event, waiter.error) from waiter.error
        if waiter.error is not None:
            raise waiter.error

    def _plan(self, watch: _Watch, now: float) -> None:
        # The counter makes entries of one time comparable, and keeps them in order: watches have no order of their own.
        heapq.heappush(self._agenda, (now + watch.interval(now), next(self._order), watch))

    def _set_timer(self) -> None:
        """Set the timer to what is due next, if anything is."""
        # Entries of forgotten watches are taken out when they come to the front, because a heap cannot remove from its
        # middle. Each watch has one entry at most, so they are not many.
        while self._agenda and self._agenda[0][2].event is None:
            heapq.heappop(self._agenda)
        if self._agenda:
            self._next_poll = max(self._agenda[0][0], self._rest_until)
            self.set(self._next_poll)

    def ring(self) -> None:
        """Ask about what is due, in the order in which it is, and wake those whose events are done."""
        began = now = monotonic()
        # Planned again only after the loop: an entry that is due at once would otherwise be asked twice in one ring.
        asked: list[_Watch] = []
        while self._agenda and now - began < _LONGEST_POLL_SECONDS:
            due, _, watch = self._agenda[0]
            # What is due soon for its age is asked at once, rather than in a turn of its own.
            if watch.event is not None and due > now and due - began > watch.interval(now) / 2:
                break
            heapq.heappop(self._agenda)
            if watch.event is None:
                continue
            done, error = _ask(watch.event)
            now = monotonic()
            if done:
                self._finish(watch, error)
            else:
                asked.append(watch)
        for watch in asked:
            self._plan(watch, now)
        # Bounded, for the look may have taken long because other threads and processes had the core.
        self._rest_until = now + min(_REST * (now - began), _LONGEST_SECONDS)
        self._set_timer()

    def _finish(self, watch: _Watch, error: BaseException | None) -> None:
        # Before they are woken: a caller that waits for the same event again gets a new watch and not this one.
        self._forget(watch)
        for waiter in watch.waiters:
            waiter.error = error
            waiter.wake.set()

    def _forget(self, watch: _Watch) -> None:
        if watch.event is not None:
            del self._watches[id(watch.event)]
            watch.event = None
        # Without watches nothing may ring: the timer keeps this object alive, and a descriptor open.
        if not self._watches:
            self._agenda.clear()
            self.stop()


_polling: RunVar[ReferenceType[_Polling] | None] = RunVar("aiostage_polling", None)


def _ask(event: SupportsQuery) -> tuple[bool, BaseException | None]:
    """Return whether an event is done, and what has become of it if that is an error."""
    try:
        return bool(event.query()), None
    except BaseException as error:
        # Its frames lead to those who asked, and it would keep them and all that they copy alive.
        error.__traceback__ = None
        return True, error


def _end(waiter: ReferenceType[_Waiter]) -> None:
    """Have a waiter end, although its event is not done."""
    there = waiter()
    if there is not None and not there.wake.is_set():
        there.error = StagerClosedError()
        there.wake.set()


def _failure(event: SupportsQuery, error: BaseException) -> BaseException:
    """Return what a waiter raises for an error of its event: an interrupt as it is."""
    if not isinstance(error, Exception):
        return error
    return StagingError(
        f"waiting for {shown(event)} failed: {type(error).__name__}: {str(error).rstrip('.')}.",
        remedy="What was enqueued on its stream cannot be relied on.",
    )
