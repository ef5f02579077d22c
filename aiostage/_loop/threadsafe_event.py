"""Waking coroutines, on asyncio and on trio: from any thread, and when what they wait for is closed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import anyio
from anyio.lowlevel import current_token

from aiostage.errors import StagerClosedError

__all__ = ["Closing", "ThreadsafeEvent", "post"]


class ThreadsafeEvent:
    """A one-shot event that any thread may set and one event loop waits for.

    It belongs to the loop that is running when it is made. Setting it after that loop has closed wakes
    no task, and returns that.
    """

    __slots__ = ("_event", "_native", "_set")

    def __init__(self) -> None:
        self._event = anyio.Event()
        self._native: Any = current_token().native_token
        self._set = False

    def set(self) -> bool:
        """Wake the waiters. May be called from any thread, from a finalizer, and more than once.

        Returns:
            Whether there is a loop to wake them in. False once it has closed, and its coroutines with it.
        """
        self._set = True
        return post(self._native, self._event.set)

    def is_set(self) -> bool:
        """Return whether :meth:`set` has been called; the waiters may still be about to run."""
        return self._set

    async def wait(self, at_most: float = math.inf) -> None:
        """Wait until set. Cancelling changes nothing but that this waiter leaves.

        Args:
            at_most: Seconds after which to return in any case; all waiters then return, and it stays unset.
        """
        if at_most == math.inf:
            await self._event.wait()
        elif _is_asyncio(self._native):
            # Not a cancel scope: leaving one needs its running loop, which a coroutine that the collector closes
            # after its loop has gone does not have. Trio leaves no coroutine behind.
            timer = self._native.call_later(at_most, self._event.set)
            try:
                await self._event.wait()
            finally:
                timer.cancel()
        else:
            with anyio.move_on_after(at_most):
                await self._event.wait()


def post(native: Any, call: Callable[[], object]) -> bool:
    """Have something called in an event loop. May be called from any thread, and from a finalizer.

    Args:
        native: anyio's ``native_token`` of the loop.
        call: What to call there, between two steps of its coroutines.

    Returns:
        Whether there is such a loop still.
    """
    try:
        (native.call_soon_threadsafe if _is_asyncio(native) else native.run_sync_soon)(call)
    except RuntimeError:
        # asyncio's loop is closed, or trio's run is over.
        return False
    return True


def _is_asyncio(native: object) -> bool:
    return isinstance(native, asyncio.AbstractEventLoop)


class Closing:
    """Whether a stager is closed, and whom to tell when it is.

    Attributes:
        closed: Whether :meth:`close` was called.
    """

    def __init__(self) -> None:
        self.closed = False
        # Without a lock: the collector may close a coroutine that waits, in a thread that is closing just now.
        self._calls: dict[object, Callable[[], object]] = {}

    def check(self) -> None:
        """Raise StagerClosedError if it is closed."""
        if self.closed:
            raise StagerClosedError

    def close(self) -> None:
        """Tell all. From any thread, and more than once."""
        self.closed = True
        for call in list(self._calls.values()):
            call()

    @contextmanager
    def on_close(self, call: Callable[[], object]) -> Iterator[None]:
        """Have something called, in the event loop that is running now, if it is closed while the block runs.

        It comes after whatever the loop does at that moment, so that a caller that checks :attr:`closed` and then
        waits, without giving way in between, misses nothing. It may be called once more, or when the block was just
        left.
        """
        key = object()
        self._calls[key] = told = partial(post, current_token().native_token, call)
        try:
            if self.closed:
                told()
            yield
        finally:
            del self._calls[key]
