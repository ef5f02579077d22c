"""What coroutines need besides anyio, on asyncio and on trio.

Names, running concurrently, orderly ends, errors that keep no memory, and waking: from any thread, and when what they
wait for is closed.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from traceback import clear_frames
from typing import Any, TypeVar

import anyio
from anyio.lowlevel import current_token

from aiostage.errors import StagerClosedError

__all__ = [
    "Closing",
    "ThreadsafeEvent",
    "finish",
    "give_up",
    "named",
    "post",
    "run_concurrently",
    "without_locals",
]

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)


def named(coroutine: Coroutine[Any, Any, T], name: str) -> Coroutine[Any, Any, T]:
    """Give a coroutine the name of the public function that returns it, by which Python warns if it is never awaited.

    Args:
        coroutine: As an ``async def`` function returns it.
        name: Such as ``AsyncStager.stage``.
    """
    coroutine.__qualname__ = name  # type: ignore[attr-defined]
    return coroutine


async def run_concurrently(*calls: Callable[[], Awaitable[object]]) -> None:
    """Run coroutines at once and wait for all of them.

    Args:
        calls: Each is called for something to await. The last runs in the calling task, the others beside it.

    Raises:
        BaseException: What the first of them to fail has raised, itself and not in a group; the others have been
            cancelled and have ended by then. What they raised meanwhile is lost.

    When cancelled, all of them are.
    """
    failures: list[BaseException] = []

    async def run(call: Callable[[], Awaitable[object]]) -> None:
        try:
            await call()
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            # Ctrl-C too: Trio raises it in whichever task runs, and a group of it is nothing that programs catch.
            failures.append(error)
            group.cancel_scope.cancel()
        except BaseException as error:
            # anyio leaves a cancelled task's error in a circle of frames, which must not lead to memory.
            without_locals(error)
            raise
        finally:
            # From Python 3.12 on, this frame is in that circle too.
            del call

    async with anyio.create_task_group() as group:
        for call in calls[:-1]:
            group.start_soon(run, call)
        await run(calls[-1])
    if failures:
        try:
            raise failures[0]
        finally:
            # The traceback now has this frame in it, which must not lead back to the error.
            failures.clear()


async def finish(wait: Callable[[], Awaitable[T]]) -> T:
    """Wait for something to its end, and deliver a cancellation that came meanwhile only then.

    A shielded cancel scope keeps anyio's cancellation out but not ``asyncio.Task.cancel()``, which has to be caught
    and kept; both reach the caller as the same exception.

    Args:
        wait: Called for something to await, and again after each cancellation. It must bear being repeated.

    Returns:
        What the awaitable returns.

    Raises:
        BaseException: The error of the awaitable. If the task was cancelled while waiting, the cancellation.
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
    # ``raise error from error`` makes a circle.
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        clear_frames(cause.__traceback__)
        cause = cause.__cause__
    return error.with_traceback(traceback.tb_next if traceback is not None else None)


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
