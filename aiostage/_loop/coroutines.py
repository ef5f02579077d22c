"""What coroutines need besides anyio: names, running concurrently, orderly ends, errors that keep no memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from traceback import clear_frames
from typing import Any, TypeVar

import anyio

__all__ = ["finish", "give_up", "named", "run_concurrently", "without_locals"]

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
