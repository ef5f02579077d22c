"""Waking a coroutine from any thread, on asyncio and on trio."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import anyio
from anyio.lowlevel import current_token

__all__ = ["Wakeup", "post"]


class Wakeup:
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
