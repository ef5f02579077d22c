"""A context that any task may enter and any other may leave: it is open in a task of its own."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, TypeVar

import anyio
from anyio.lowlevel import current_token

from aiostage._loop.coroutines import finish

__all__ = ["HostedContext"]

T = TypeVar("T")


class HostedContext(Generic[T]):
    """Enters a context in a task of its own and leaves it there, which cancel scopes and task groups need.

    Args:
        context: Entered once. It has to enter without waiting long, and may be cancelled at any time.
    """

    def __init__(self, context: AbstractAsyncContextManager[T]) -> None:
        self._context = context
        self._entered: list[T] = []
        self._error: BaseException | None = None
        self._task: object = None
        self.has_ended = False

    async def open(self) -> T:
        """Enter the context.

        Returns:
            What it gives.

        Raises:
            Exception: What entering raises.

        When cancelled, it has been left again.
        """
        # Made here and not in the constructor, which may run without an event loop.
        self._scope = anyio.CancelScope()
        self._opened, self._closing, self._ended = anyio.Event(), anyio.Event(), anyio.Event()
        self._task = _start(self._run())
        try:
            # Shielded, because the task has begun: a cancellation that came in between would leave a context of which
            # the caller does not know. It is delivered once it is known what there is to leave.
            await finish(self._opened.wait)
        except BaseException as error:
            self.abandon()
            # A coroutine that is being closed may not wait.
            if not isinstance(error, GeneratorExit):
                await finish(self._ended.wait)
            raise
        self._raise_error()
        return self._entered[0]

    def abandon(self) -> None:
        """Have the context cancelled and left. :meth:`aclose` waits for that."""
        if not self.has_ended:
            self._scope.cancel()

    async def aclose(self) -> None:
        """Leave the context, and wait until it is left. May be called by several tasks, and again.

        Raises:
            Exception: What leaving raises; once.

        When cancelled, the context is too, and has been left then.
        """
        # Set before the wait and never reset, so that several callers, and one that was cancelled and calls again, all
        # mean the same end.
        self._closing.set()
        try:
            await self._ended.wait()
        except BaseException as error:
            self.abandon()
            if not isinstance(error, GeneratorExit):
                await finish(self._ended.wait)
            raise
        self._raise_error()

    async def _run(self) -> None:
        try:
            with self._scope:
                async with self._context as entered:
                    self._entered.append(entered)
                    self._opened.set()
                    await self._closing.wait()
        except anyio.get_cancelled_exc_class():
            # The loop itself ends.
            raise
        except BaseException as error:
            # For the caller: here it would end a trio loop, and asyncio's would only log it.
            self._error = error
        finally:
            # Both events, also if entering failed: open() and aclose() wait for nothing else.
            self.has_ended = True
            self._opened.set()
            self._ended.set()

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                # The traceback now has this frame in it, which must not lead back to the error.
                del error


def _start(coroutine: Any) -> object:
    """Start a task that no other owns. The loop cancels it when it ends."""
    native = current_token().native_token
    if isinstance(native, asyncio.AbstractEventLoop):
        return native.create_task(coroutine)
    import trio

    async def run() -> None:
        await coroutine

    return trio.lowlevel.spawn_system_task(run)
