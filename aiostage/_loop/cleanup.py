"""Finishing what must not be left half-done, also when the task is cancelled meanwhile; errors that keep no memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from traceback import clear_frames
from typing import Any, TypeVar

import anyio

__all__ = ["finish", "give_up", "without_locals"]

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)


async def finish(wait: Callable[[], Awaitable[T]]) -> T:
    """Wait for something to its end, and deliver a cancellation that came meanwhile only then.

    A shielded cancel scope keeps anyio's cancellation out but not ``asyncio.Task.cancel()``, which has to be caught
    and kept; both reach the caller as the same exception.

    Args:
        wait: Called for something to await, and again after each cancellation. It must bear being repeated.

    Returns:
        What the awaitable returns.

    Raises:
        BaseException: Whatever the awaitable raises. If the task was cancelled while waiting, the cancellation.
    """
    cancelled: BaseException | None = None
    with anyio.CancelScope(shield=True):
        while True:
            try:
                result = await wait()
                break
            except anyio.get_cancelled_exc_class() as error:
                cancelled = error
    if cancelled is not None:
        raise cancelled
    return result


async def give_up(aborting: Coroutine[Any, Any, object], error: BaseException) -> None:
    """Abort something after an error.

    A coroutine that is being closed may not wait; the abort then gets as far as it gets without waiting.
    """
    if not isinstance(error, GeneratorExit):
        await aborting
        return
    with suppress(Exception):
        # StopIteration is the end; no caller is left for any other error.
        aborting.send(None)
    aborting.close()


def without_locals(error: E) -> E:
    """Drop what an error's traceback keeps alive: memory must not live as long as the report that copying it failed.

    Called where the error is caught; the frame that calls is dropped from the traceback. What the error was raised from
    is treated alike, but not what was being handled meanwhile, which is the caller's.
    """
    traceback = error.__traceback__
    cause: BaseException | None = error
    while cause is not None:
        clear_frames(cause.__traceback__)
        cause = cause.__cause__
    return error.with_traceback(traceback.tb_next if traceback is not None else None)
