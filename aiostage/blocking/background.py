"""An event loop in a background thread, for callers that have none."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import Any, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

from aiostage._loop.forks import register_after_fork
from aiostage.errors import CheckpointError

__all__ = ["Background", "OnBackground"]

T = TypeVar("T")

_left_to_the_parent: list[object] = []
"""Kept for ever in a forked child: dropping them would leave their blocks, and wait for a thread of the parent."""


class Background:
    """An event loop in a thread. It belongs to the process that has started it."""

    def __init__(self, portal: BlockingPortal) -> None:
        self._portal = portal
        self._process = os.getpid()

    @classmethod
    @contextmanager
    def started(cls, name: str) -> Iterator[Background]:
        """Start a thread, and end it with the block."""
        # anyio's portal: it runs each call in a task of its own, and waits for all of them at the end.
        with start_blocking_portal(name=name) as portal:
            yield cls(portal)

    def check(self) -> None:
        """Refuse a forked child, which does not have the thread.

        Raises:
            CheckpointError: If this is one.
        """
        if os.getpid() != self._process:
            raise CheckpointError(
                f"the checkpointer or stager was entered by process {self._process}, from which this one was forked.",
                remedy="Make one in this process, or leave the checkpoints to the other.",
            )

    def call(self, function: Callable[..., Awaitable[T]], *arguments: object) -> T:
        """Call a function on the event loop, and block until what it returns has been awaited."""
        self.check()
        return self._portal.call(function, *arguments)

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the event loop, and block until it has ended."""
        try:
            self.check()
        except CheckpointError:
            # Python would warn that it was never awaited.
            coroutine.close()
            raise
        result: T = self._portal.call(lambda: coroutine)
        return result

    def wrap(self, manager: AbstractAsyncContextManager[T]) -> AbstractContextManager[T]:
        """Return a context manager that enters and leaves another on the event loop, in one task."""
        self.check()
        return self._portal.wrap_async_context_manager(manager)


class OnBackground:
    """An object on an event loop in a background thread, between ``__enter__`` and :meth:`close`."""

    def __init__(self) -> None:
        self._background: Background | None = None
        self._exit: ExitStack | None = None
        register_after_fork(self)

    def after_fork_in_child(self) -> None:
        """Leave the thread to the parent."""
        # self._background stays: its check() says what is wrong when the child uses this object.
        if self._exit is not None:
            _left_to_the_parent.append(self._exit)
            self._exit = None

    @contextmanager
    def _starting(
        self, manager: AbstractAsyncContextManager[Any], background: Background | None, name: str
    ) -> Iterator[ExitStack]:
        """Enter a manager on an event loop, and keep all that the block adds to the stack until this is closed.

        Args:
            manager: To be entered.
            background: The loop. None: one is started.
            name: The name of its thread.
        """
        with ExitStack() as stack:
            background = background or stack.enter_context(Background.started(name))
            stack.enter_context(background.wrap(manager))
            yield stack
            # Last: after an error above, the `with` block of the stack leaves everything again, and this object counts
            # as not entered.
            self._background, self._exit = background, stack.pop_all()

    def close(self) -> None:
        """Leave the block without ``with``. May be called more than once.

        Raises:
            Exception: As leaving the block does.
        """
        self.__exit__(None, None, None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave it, as the asynchronous one does, and end the thread."""
        # Taken out first: a second call, also one from a callback that runs here, then finds nothing to leave.
        stack, self._exit = self._exit, None
        if stack is not None:
            stack.__exit__(kind, error, traceback)
