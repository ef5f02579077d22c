"""Ends waits, on any event loop, when the object that they belong to is closed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from anyio.lowlevel import current_token

from aiostage._loop.wakeup import post
from aiostage.errors import StagerClosedError

__all__ = ["Closing"]


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
    def telling(self, call: Callable[[], object]) -> Iterator[None]:
        """Have something called, in the event loop that is running now, if it is closed while the block runs.

        It comes after whatever the loop does at that moment, so that who looks at :attr:`closed` and then waits,
        without giving way in between, misses nothing. It may be called once more, or when the block was just left.
        """
        key = object()
        self._calls[key] = told = partial(post, current_token().native_token, call)
        try:
            if self.closed:
                told()
            yield
        finally:
            del self._calls[key]
