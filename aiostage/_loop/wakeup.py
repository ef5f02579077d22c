"""Waking a coroutine from any thread, on asyncio and on trio."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
from anyio.lowlevel import current_token

__all__ = ["Wakeup"]


class Wakeup:
    """A one-shot event that any thread may set and one event loop waits for.

    It belongs to the loop that is running when it is made. Setting it after that loop has closed wakes
    nobody, and says so.
    """

    __slots__ = ("_event", "_post", "_set")

    def __init__(self) -> None:
        self._event = anyio.Event()
        self._post = _poster()
        self._set = False

    def set(self) -> bool:
        """Wake the waiters. May be called from any thread, from a finalizer, and more than once.

        Returns:
            Whether there is a loop to wake them in. False once it has closed, and its coroutines with it.
        """
        self._set = True
        try:
            self._post(self._event.set)
        except RuntimeError:
            # asyncio's loop is closed, or trio's run is over.
            return False
        return True

    def is_set(self) -> bool:
        """Return whether :meth:`set` has been called; the waiters may still be about to run."""
        return self._set

    async def wait(self) -> None:
        """Wait until set. Cancelling changes nothing but that this waiter leaves."""
        await self._event.wait()


def _poster() -> Callable[[Callable[[], object]], object]:
    """Return the running loop's way of taking calls from other threads."""
    native: Any = current_token().native_token
    post: Callable[[Callable[[], object]], object] = (
        native.call_soon_threadsafe if hasattr(native, "call_soon_threadsafe") else native.run_sync_soon
    )
    return post
