"""Waking one coroutine at a time finer than the event loops' own clocks."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any

import anyio
from anyio.lowlevel import current_token

from aiostage._platform import open_timer, set_timer

__all__ = ["Alarm"]

_COARSE_SECONDS = 0.001
"""Without a timer of its own it never sleeps less: uvloop rounds half a millisecond to nothing and would spin."""

_BLIND_SECONDS = 0.005
"""Without a timer of its own it never sleeps longer, since it is not told of an alarm that is set meanwhile."""


class Alarm:
    """A time of :func:`time.monotonic` that one coroutine waits for, and that may be changed while it does.

    Event loops sleep in whole milliseconds: asyncio rounds up to epoll's grain, uvloop rounds to the nearest. On Linux
    the kernel's own timer is a file descriptor that every loop can watch, good to some ten microseconds. Elsewhere, or
    when there are no descriptors left, the loop's clock has to do, never finer than a millisecond.

    It belongs to the event loop that is running when it is made.
    """

    __slots__ = ("_descriptor", "_native", "_ringing", "_when")

    def __init__(self) -> None:
        self._descriptor = -1
        self._when = 0.0
        self._native: Any = current_token().native_token
        self._ringing: asyncio.Future[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether it holds a descriptor."""
        return self._descriptor >= 0

    def set(self, when: float) -> None:
        """Ring at a time, and not at the one set before. A time that has passed rings at once."""
        self._when = when
        if not self.is_open:
            self._open()
        if self.is_open:
            # It is never read: being set anew is what makes it unreadable again.
            set_timer(self._descriptor, self._when)

    async def wait(self) -> None:
        """Wait until it rings, or somewhat less. Set it before. Cancelling changes nothing."""
        if not self.is_open:
            await anyio.sleep(min(max(self._when - monotonic(), _COARSE_SECONDS), _BLIND_SECONDS))
        elif isinstance(self._native, asyncio.AbstractEventLoop):
            # Not anyio.wait_readable: it notes the waiting in a table of its own that keeps a loop which is closed
            # meanwhile, and all that waits on it, alive for ever. And it watches and unwatches each time.
            self._ringing = self._native.create_future()
            await self._ringing
        else:
            await anyio.wait_readable(self._descriptor)

    def close(self) -> None:
        """Give the descriptor back. No task may be waiting. Setting it opens another."""
        if not self.is_open:
            return
        if isinstance(self._native, asyncio.AbstractEventLoop):
            # A loop that has been closed watches nothing.
            with suppress(RuntimeError):
                self._native.remove_reader(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1

    def close_soon(self, *, unless: Callable[[], bool]) -> None:
        """Close after the running callback has gone on: it takes some 50 microseconds.

        Args:
            unless: Asked then; if it returns True, it stays open.
        """
        if not (self.is_open and isinstance(self._native, asyncio.AbstractEventLoop)):
            self.close()
            return
        try:
            self._native.call_soon(self._close_unless, unless)
        except RuntimeError:
            # The loop has been closed.
            self.close()

    def _close_unless(self, wanted: Callable[[], bool]) -> None:
        if not wanted():
            self.close()

    def _open(self) -> None:
        self._descriptor = open_timer()
        if self.is_open and isinstance(self._native, asyncio.AbstractEventLoop):
            self._native.add_reader(self._descriptor, self._ring)

    def _ring(self) -> None:
        if self._ringing is not None and not self._ringing.done():
            self._ringing.set_result(None)
