"""The side that uses weights: an inference server, an evaluator, a rollout worker."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from types import TracebackType

import anyio

from aiostage._arguments import require_seconds
from aiostage.abc import Storage
from aiostage.errors import WeightsError
from aiostage.format.classes import Classes
from aiostage.storage.locate import Root
from aiostage.weights.hosted import HostedEnd
from aiostage.weights.inbox import Inbox, WeightVersion
from aiostage.weights.publisher import socket_or_storage
from aiostage.weights.receiver import SocketReceiver
from aiostage.weights.sockets import TIMEOUT_SECONDS
from aiostage.weights.stored import StorageReceiver

__all__ = ["WeightSubscriber"]


class WeightSubscriber(HostedEnd[Inbox]):
    """Receives the versions of weights that a :class:`WeightPublisher` publishes.

    Iterate over it with ``async for``: each turn acknowledges the last version and waits for a newer one. If several
    were published meanwhile, it gets the newest. A publisher need not exist yet. When one is gone, the subscriber keeps
    its versions and connects to the next one. Enter it with ``async with``, or call :meth:`open` and :meth:`aclose`, in
    any tasks of one event loop. One task at a time waits for versions.

    Args:
        target: As for the publisher: the path of a socket, or what names a storage.
        classes: As for :func:`aiostage.load`: of your own, whose objects are to come back as they were.
        timeout: Seconds of silence after which a publisher at a socket is taken for dead.
        interval: Seconds between two looks into a storage.

    Raises:
        HostMemoryError: If this system cannot share memory.
        TypeError: If an argument has the wrong type.
        ValueError: If a path can be none, or a number is out of range.
    """

    _kind = "subscriber"

    def __init__(
        self, target: Root, *, classes: Iterable[type] = (), timeout: float = 60.0, interval: float = 1.0
    ) -> None:
        super().__init__()
        self._place = socket_or_storage(target)
        self._classes = Classes(classes).passed
        self._timeout = require_seconds("timeout", timeout, within=TIMEOUT_SECONDS)
        self._interval = require_seconds("interval", interval, infinite=True)
        self._last: WeightVersion | None = None
        self._guard = anyio.ResourceGuard("waiting for weights from")

    def __repr__(self) -> str:
        return f"<WeightSubscriber {self._location!r}, {'connected' if self.connected else 'not connected'}>"

    @property
    def _location(self) -> str:
        return self._place.location if isinstance(self._place, Storage) else self._place

    @property
    def connected(self) -> bool:
        """Whether the publisher, or the storage, could be reached at the last exchange."""
        return self._content is not None and self._content.connected

    @property
    def newest(self) -> int | None:
        """The newest version that is known of; None before there is one. In a storage it is known when asked for."""
        return self._content.newest[1] if self._content is not None and self._content.newest is not None else None

    async def get(self) -> WeightVersion:
        """Wait for a version that is newer than the last one, and return it.

        Returns:
            The newest that there is, as a rule. Acknowledge it when you have loaded it.

        Raises:
            WeightsError: If the subscriber is not open, or is closed meanwhile; or if the publisher is of another user
                or another version of the protocol.
            CheckpointError: If the version has an object that cannot be made again. The next call waits for the next.
            OSError: If there is no memory for it.

        When cancelled, nothing is lost: the next call returns what this one would have, or what is newer.
        """
        with self._guard:
            inbox = self._opened()
            self._check_loop()
            self._last = version = await inbox.take()
        return version

    def __aiter__(self) -> WeightSubscriber:
        return self

    async def __anext__(self) -> WeightVersion:
        """Acknowledge the last version, then wait as :meth:`get` does. Raises as that does."""
        self._acknowledge_last()
        return await self.get()

    def _acknowledge_last(self) -> None:
        if self._last is not None:
            self._last.acknowledge()
            self._last = None

    @asynccontextmanager
    async def _serving(self) -> AsyncGenerator[Inbox, None]:
        inbox = Inbox()
        receiver: SocketReceiver | StorageReceiver
        if isinstance(self._place, Storage):
            receiver = StorageReceiver(self._place, inbox, classes=self._classes, interval=self._interval)
        else:
            receiver = SocketReceiver(self._place, inbox, classes=self._classes, timeout=self._timeout)
        async with anyio.create_task_group() as group:
            group.start_soon(receiver.run, name=f"receive weights from {self._location}")
            try:
                yield inbox
            finally:
                # Before the receiver is cancelled, so that a task that waits in get() gets this error.
                inbox.fail(WeightsError("the subscriber was closed.", path=self._location))
                inbox.drop()
                group.cancel_scope.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Acknowledge the last version unless the block has failed, and disconnect."""
        if isinstance(error, GeneratorExit):
            self._abandon()
            return
        try:
            if error is None and self._content is not None:
                self._acknowledge_last()
                # Otherwise the acknowledgement could be lost with the connection, and the publisher may wait for it.
                await self._content.flush()
        finally:
            await self.aclose()
