"""Being called in an event loop at a time finer than the loop's own clock."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from time import monotonic
from typing import Any

import anyio
from anyio.lowlevel import current_token

from aiostage._loop.coroutines import post
from aiostage._platform.threads import open_timer, set_timer

__all__ = ["Timer"]

_COARSE_SECONDS = 0.001
"""Without a timer of its own it never sleeps less: uvloop rounds half a millisecond to nothing and would spin."""

_BLIND_SECONDS = 0.005
"""On trio without a timer of its own it never sleeps longer, since a sleep is not cut short by a new time."""

_EXPIRATION_BYTES = 8


class Timer:
    """Calls its own :meth:`ring`, in the event loop that made it, at a time of :func:`time.monotonic`.

    Event loops sleep in whole milliseconds: asyncio rounds up to epoll's grain, uvloop rounds to the nearest. On Linux
    the kernel's own timer is a file descriptor that every loop can watch, good to some ten microseconds. Elsewhere, or
    when there are no descriptors left, the loop's clock has to do, never finer than a millisecond.

    The loop keeps the timer until it is stopped. A base class, and not a timer with a callback: that would be a cycle,
    and the descriptor of a loop that is closed meanwhile would stay open until the collector finds it.
    """

    def __init__(self) -> None:
        self._native = current_token().native_token
        self._asyncio = self._native if isinstance(self._native, asyncio.AbstractEventLoop) else None
        self._is_open = self._is_set = False
        self._when = 0.0
        self._descriptor = -1
        self._coarse: asyncio.TimerHandle | None = None
        self._scope: Any = None

    def ring(self) -> None:
        """Be called, perhaps too early, or once more than was asked for. Must raise nothing."""
        raise NotImplementedError

    def set(self, when: float) -> None:
        """Ring at a time, and not at the one set before. A time that has passed is now."""
        self._is_set, self._when = True, when
        if not self._is_open:
            self._open()
        if self._descriptor >= 0:
            set_timer(self._descriptor, when)
        elif self._asyncio is not None:
            if self._coarse is not None:
                self._coarse.cancel()
            self._coarse = self._asyncio.call_later(max(when - monotonic(), _COARSE_SECONDS), self.ring)

    def stop(self) -> None:
        """Do not ring, and give the descriptor back unless it is set again by the loop's next turn."""
        self._is_set = False
        # Posted, and not closed now: a wait that begins in the same turn finds the timer open, so that a row of short
        # waits opens one descriptor and not one each.
        if self._is_open and not post(self._native, self._close_unless_set):
            # The loop has been closed.
            self._close()

    def _open(self) -> None:
        self._is_open = True
        self._descriptor = open_timer()
        if self._asyncio is None:
            import trio

            self._scope = trio.CancelScope()
            # A system task, because no nursery of the user's lasts as long as the timer. An error in one ends the whole
            # run, hence the rule that ring() raises nothing.
            trio.lowlevel.spawn_system_task(self._serve, self._descriptor, self._scope, name="aiostage timer")
        elif self._descriptor >= 0:
            # Not anyio.wait_readable: it notes the waiting in a table of its own that keeps a loop which is closed
            # meanwhile, and all that waits on it, alive for ever.
            self._asyncio.add_reader(self._descriptor, self._read_and_ring)

    def _close_unless_set(self) -> None:
        if not self._is_set:
            self._close()

    def _close(self) -> None:
        descriptor, self._descriptor, self._is_open = self._descriptor, -1, False
        if self._coarse is not None:
            self._coarse.cancel()
        if self._scope is not None:
            # The descriptor is closed where it is waited for.
            self._scope.cancel()
        elif descriptor >= 0:
            # A loop that has been closed watches nothing.
            with suppress(RuntimeError):
                if self._asyncio is not None:
                    self._asyncio.remove_reader(descriptor)
            os.close(descriptor)

    # The loop may have collected this call before the reader was removed in the same turn; then there is no descriptor
    # any more.
    def _read_and_ring(self) -> None:
        if self._descriptor >= 0:
            _read(self._descriptor)
            self.ring()

    async def _serve(self, descriptor: int, scope: Any) -> None:
        """Be the timer of a trio run, which ends all its system tasks."""
        try:
            with scope:
                while True:
                    if descriptor >= 0:
                        await anyio.wait_readable(descriptor)
                        _read(descriptor)
                    else:
                        # No descriptor could be had. The sleep is short enough to notice a time that was set meanwhile.
                        await anyio.sleep(min(max(self._when - monotonic(), _COARSE_SECONDS), _BLIND_SECONDS))
                    self.ring()
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def __del__(self) -> None:
        """Close the descriptor of an asyncio loop that was closed while the timer was set."""
        # The collector may call this before it closes the coroutines that wait, which then stop the timer. By then its
        # number may be another file's.
        descriptor, self._descriptor = self._descriptor, -1
        if self._asyncio is not None and descriptor >= 0:
            os.close(descriptor)


def _read(descriptor: int) -> None:
    # Unread, it would wake the loop again and again. One that was set anew meanwhile is unread already.
    with suppress(BlockingIOError):
        os.read(descriptor, _EXPIRATION_BYTES)
