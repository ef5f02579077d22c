"""Cancelling a coroutine at each of its awaits in turn.

``Task.cancel()`` cancels where the task happens to be. Here the coroutine is driven by hand, and the error is thrown in
at one chosen suspension. So a test covers all of them, and each failure names its await.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

__all__ = ["CancelledAt", "at_every_await"]

T = TypeVar("T")


class CancelledAt(Generic[T]):
    """Runs a coroutine, and raises CancelledError at its n-th suspension instead of suspending there.

    Later suspensions are those of the clean-up. They reach the event loop. For asyncio and uvloop.

    Args:
        coroutine: Not started yet.
        number: At which of its suspensions, from 0.

    Attributes:
        reached: Whether there was such a suspension.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, T], number: int) -> None:
        self._coroutine = coroutine
        self._number = number
        self.reached = False

    def __await__(self) -> Generator[Any, Any, T]:
        """Run it."""
        suspensions = 0
        error: BaseException | None = None
        while True:
            try:
                waited = self._coroutine.send(None) if error is None else self._coroutine.throw(error)
            except StopIteration as stop:
                result: T = stop.value
                return result
            finally:
                # The error's traceback has this frame in it, which must not lead back to the error.
                error = None
            if suspensions == self._number:
                self.reached = True
                # What was waited for is not yielded: no event loop has begun to wait for it.
                error = asyncio.CancelledError()
            else:
                try:
                    yield waited
                except BaseException as raised:
                    # The event loop throws into this coroutine; the inner one is the one that handles it.
                    error = raised
            suspensions += 1


async def at_every_await(make: Callable[[], Coroutine[Any, Any, T]]) -> AsyncIterator[int]:
    """Run a coroutine again and again, cancelled at its first await, its second and so on, until one run completes.

    For asyncio and uvloop.

    Args:
        make: Returns a new coroutine for each round.

    Yields:
        The number of the await at which the last round was cancelled. Check here what that has left behind.

    Raises:
        AssertionError: If a cancellation is swallowed.
    """
    number = 0
    while True:
        cancelled = CancelledAt(make(), number)
        try:
            await cancelled
        except asyncio.CancelledError:
            # The test itself was cancelled.
            if not cancelled.reached:
                raise
            yield number
        else:
            if cancelled.reached:
                raise AssertionError(f"the cancellation at await {number} was swallowed")
            return
        number += 1
