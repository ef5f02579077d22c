"""An event loop in a background thread, for callers that have none."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from typing import Any, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

from aiostage.errors import CheckpointError

__all__ = ["Background", "left_to_the_parent"]

T = TypeVar("T")

left_to_the_parent: list[object] = []
"""What a forked child must not drop: to be closed, it would wait for its parent's thread."""


class Background:
    """The event loop in its thread, which is that of the process that has started it."""

    def __init__(self, portal: BlockingPortal) -> None:
        self._portal = portal
        self._process = os.getpid()

    @classmethod
    @contextmanager
    def started(cls, name: str) -> Iterator[Background]:
        """Start a thread, and end it with the block."""
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
            coroutine.close()
            raise
        result: T = self._portal.call(lambda: coroutine)
        return result

    def wrap(self, manager: AbstractAsyncContextManager[T]) -> AbstractContextManager[T]:
        """Return a context manager that enters and leaves another on the event loop, in one task."""
        self.check()
        return self._portal.wrap_async_context_manager(manager)
