"""Several coroutines at once, of which the first error is everybody's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio

from aiostage._loop.cleanup import without_locals

__all__ = ["together"]


async def together(*calls: Callable[[], Awaitable[object]]) -> None:
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
