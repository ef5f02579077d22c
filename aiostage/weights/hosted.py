"""Opening and closing of both ends, by any tasks of one event loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractAsyncContextManager
from typing import ClassVar, Generic, Self, TypeVar

from anyio.lowlevel import current_token

from aiostage._loop.hosting import HostedContext
from aiostage.errors import WeightsError

__all__ = ["HostedEnd"]

T = TypeVar("T")


class HostedEnd(ABC, Generic[T]):
    """A publisher or a subscriber, from when it is opened until it is closed."""

    _kind: ClassVar[str]

    def __init__(self) -> None:
        # The value of the context; None before it is entered and after it is left.
        self._content: T | None = None
        self._host: HostedContext[T] | None = None
        self._loop: object = None

    @property
    @abstractmethod
    def _location(self) -> str:
        """Where it is, for errors."""

    @abstractmethod
    def _serving(self) -> AbstractAsyncContextManager[T]:
        """Return what runs in a task of its own until it is closed."""

    async def open(self) -> None:
        """Begin, for programs that cannot enter a block: :meth:`aclose` ends it, in any task.

        Raises:
            WeightsError: If it was opened before; or, for a publisher, if another process publishes at the path, or the
                path is not a socket.
            OSError: If the file system or the storage refuses what a publisher needs.

        When cancelled, nothing has begun, and it may be called again.
        """
        if self._host is not None:
            raise WeightsError(f"the {self._kind} was opened before.", remedy=f"Make a new {type(self).__name__}.")
        # Before anything is awaited, so that a second call is refused.
        host = self._host = HostedContext(self._serving())
        self._loop = current_token().native_token
        try:
            self._content = await host.open()
        except BaseException:
            self._host = None
            raise

    def _opened(self) -> T:
        if self._content is None:
            raise WeightsError(
                f"the {self._kind} is {'not open' if self._host is None else 'closed'}.",
                path=self._location,
                remedy="Use it inside its `async with` block, or between open() and aclose().",
            )
        return self._content

    def _check_loop(self) -> None:
        """Refuse an event loop other than the one that it was opened on."""
        if self._loop is not current_token().native_token:
            raise WeightsError(f"the {self._kind} was opened on another event loop.", path=self._location)

    async def aclose(self) -> None:
        """Stop, as leaving the block does. Versions that were taken stay good. May be called by any task, and again.

        When cancelled, it is closed all the same.
        """
        if self._host is not None:
            await self._host.aclose()

    def _abandon(self) -> None:
        """Let its task close it, without waiting: a coroutine that is being closed may not wait."""
        if self._host is not None:
            self._host.abandon()

    async def __aenter__(self) -> Self:
        """Begin, as :meth:`open` does."""
        await self.open()
        return self
