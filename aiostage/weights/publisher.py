"""The side that trains: hands out versions of its weights."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Any

import anyio

from aiostage._arguments import require_int, require_seconds, states_of
from aiostage._loop.coroutines import named
from aiostage.abc import Storage
from aiostage.errors import WeightsError, shown
from aiostage.options import StagingOptions
from aiostage.snapshot import Snapshot
from aiostage.stager import AsyncStager
from aiostage.storage.locate import Root, storage_at
from aiostage.weights.hosted import HostedEnd
from aiostage.weights.sender import SocketSender, SubscriberInfo
from aiostage.weights.sockets import TIMEOUT_SECONDS
from aiostage.weights.stored import StorageSender

__all__ = ["WeightPublisher", "socket_or_storage"]

_FEWEST_VERSIONS = 4
"""The newest, one that is being staged, and two that subscribers hold: one in use, and one that is being loaded."""


class WeightPublisher(HostedEnd[AsyncStager]):
    """Publishes versions of a model's weights to other processes.

    Over a socket at a path, for processes of one user on one machine: weights are staged into shared memory, and
    subscribers map them without a copy. Or over a storage, for other machines: weights are saved, and subscribers load
    them. Enter it with ``async with``, or call :meth:`open` and :meth:`aclose`, in any tasks of one event loop.

    Args:
        target: The path of the socket to make; or a URL, a store of obstore or a :class:`~aiostage.abc.Storage` below
            which versions are saved. A path is always a socket: a directory is ``file:///path``.
        stager: Takes the copies. It needs ``use_shared_memory=True`` for a socket. None: one is made for the block.
        max_versions: How many versions may be alive at once: the newest, one that is being staged, and those that
            subscribers hold. At least 4, and 3 more than the subscribers that load with ``assign=True``. In a storage
            that many are kept.
        timeout: Seconds of silence after which a subscriber is taken for dead, and what it holds is dropped.

    Raises:
        HostMemoryError: If this system cannot share memory.
        TypeError: If an argument has the wrong type.
        ValueError: If the stager has no shared memory for a socket, or a number is out of range.
    """

    _kind = "publisher"

    def __init__(
        self,
        target: Root,
        stager: AsyncStager | None = None,
        *,
        max_versions: int = 8,
        timeout: float = 60.0,
    ) -> None:
        super().__init__()
        if stager is not None and not isinstance(stager, AsyncStager):
            raise TypeError(f"stager must be an AsyncStager, or None, not {shown(stager)}")
        hint = " (the newest, one that is being staged, and two in use)"
        max_versions = require_int("max_versions", max_versions, least=_FEWEST_VERSIONS, hint=hint)
        timeout = require_seconds("timeout", timeout, within=TIMEOUT_SECONDS)
        place = socket_or_storage(target)
        self._sender: SocketSender | StorageSender
        if isinstance(place, Storage):
            self._sender = StorageSender(place, keep=max_versions)
        else:
            if stager is not None and not stager.options.use_shared_memory:
                raise ValueError(
                    "the stager stages into private memory, which no subscriber can open. "
                    "Make it with StagingOptions(use_shared_memory=True)."
                )
            self._sender = SocketSender(place, max_versions=max_versions, timeout=timeout)
        self._given = stager
        self._called: int | None = None
        self._lock = anyio.Lock()

    def __repr__(self) -> str:
        return f"<WeightPublisher {self._sender.location!r}, version {self._called}>"

    @property
    def _location(self) -> str:
        return self._sender.location

    @property
    def versions(self) -> tuple[int, ...]:
        """The versions that are alive, in ascending order: the newest, and those that subscribers hold."""
        return self._sender.versions

    @property
    def subscribers(self) -> tuple[SubscriberInfo, ...]:
        """The subscribers that are connected. Those of a storage are not known."""
        return self._sender.subscribers

    def publish(self, state_dict: Any, *, version: int | None = None) -> Coroutine[Any, Any, int]:
        """Return a coroutine that makes weights the newest version.

        A plain function: the copy follows what the caller's current streams had been given at the call, also if the
        coroutine is started later by a task. Several may run at once; of two, the version with the higher number
        becomes or stays the newest.

        Args:
            state_dict: A tree of tensors, or an object with ``state_dict``; or an entered :class:`~aiostage.Snapshot`
                of the publisher's stager, which is not copied again.
            version: Its number, such as the training step; higher than that of every earlier call. None: the next.

        Returns:
            The number, once subscribers can have it. For a socket it does not wait for any subscriber; the weights
            may be changed. For a storage it waits until everything is written: with a snapshot, training goes on then.

        Raises:
            WeightsError: If the publisher is not open, or another one has begun in the storage since.
            UnsupportedLeafError: If something in the tree cannot be staged or carried.
            TornSnapshotError: If the weights changed before they were captured.
            HostMemoryError: If memory cannot be had.
            StagingError: If more than 64 MiB of the tree are not in shared memory.
            TypeError: If the version is not an integer.
            ValueError: If it is below 0, or not higher than the last.
            OSError: If the storage refuses.

        The coroutine may be cancelled: then it is the newest version, or no subscriber sees it.
        """
        stager = self._opened()
        # Before anything is staged, so that a refused number costs nothing.
        number = self._numbered(version)
        source: Any
        if isinstance(self._sender, StorageSender):
            source = self._sender.save(number, state_dict, stager)
        else:
            source = state_dict if isinstance(state_dict, Snapshot) else stager.stage(states_of(state_dict))
        # After the calls above, which may raise: the caller may then use the number again.
        self._called = number
        return named(self._publish(number, source), "WeightPublisher.publish", source)

    async def _publish(self, number: int, source: Any) -> int:
        try:
            self._opened()
            self._check_loop()
            # Without the lock: several saves may run at once. They become the newest one after the other.
            saved = await self._sender.saved(number, source) if isinstance(self._sender, StorageSender) else None
            # With the lock: only one staged copy exists besides those that subscribers may have. The order in which
            # calls get it does not matter, because send() never replaces a later version.
            async with self._lock:
                self._opened()
                if isinstance(self._sender, StorageSender):
                    await self._sender.send(number, saved)
                else:
                    await self._sender.send(number, await (source.result() if isinstance(source, Snapshot) else source))
        finally:
            # If an error came first, the coroutine was never awaited. Otherwise this does nothing.
            if not isinstance(source, Snapshot):
                source.close()
        return number

    async def acknowledged(self, version: int, *, count: int = 1) -> None:
        """Wait until subscribers have acknowledged a version, or a later one.

        Args:
            version: That was published.
            count: How many of the subscribers that are connected at one time.

        Raises:
            WeightsError: If the publisher is not open, or is closed meanwhile; or publishes to a storage, whose
                subscribers do not answer.
            TypeError: If a number is not whole.
            ValueError: If the version was not published, or ``count`` is below 1.

        Cancelling changes nothing.
        """
        self._opened()
        number = require_int("a version", version)
        if self._called is None or not 0 <= number <= self._called:
            raise ValueError(f"version {number} was not published; the last is {self._called}")
        count = require_int("count", count, least=1)
        if isinstance(self._sender, StorageSender):
            raise WeightsError("subscribers of a storage do not answer.", path=self._sender.location)
        await self._sender.acknowledged(number, count)

    def _numbered(self, version: int | None) -> int:
        if version is None:
            return 0 if self._called is None else self._called + 1
        number = require_int("a version", version, least=0)
        if self._called is not None and number <= self._called:
            raise ValueError(f"versions must increase: {number} comes after {self._called}")
        return number

    @asynccontextmanager
    async def _serving(self) -> AsyncGenerator[AsyncStager, None]:
        async with AsyncExitStack() as stack:
            stager = self._given
            if stager is None:
                shared = isinstance(self._sender, SocketSender)
                stager = await stack.enter_async_context(AsyncStager(StagingOptions(use_shared_memory=shared)))
            await stack.enter_async_context(self._sender.serving())
            try:
                yield stager
            finally:
                # Here too: at the end of the loop, this block may be left without a call of aclose().
                self._content = None

    async def aclose(self) -> None:
        """Stop serving, and drop all versions. Subscribers keep what they have, and wait for another publisher.

        May be called by any task of the loop, and again. When cancelled, it is closed all the same.
        """
        # Before the wait, so that publish() refuses from now on.
        self._content = None
        await super().aclose()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop serving, as :meth:`aclose` does."""
        if isinstance(error, GeneratorExit):
            self._content = None
            self._abandon()
            return
        await self.aclose()


def socket_or_storage(target: Root) -> str | Storage:
    """Return the path of a socket, or a storage.

    Raises:
        TypeError: If it is neither.
        ValueError: If a path can be none.
    """
    if isinstance(target, (str, os.PathLike)):
        text = os.fsdecode(target)
        if "://" not in text:
            if not text or "\0" in text or text.endswith("/"):
                raise ValueError(f"{shown(text)} is not a path of a socket")
            return os.path.expanduser(text)
    return storage_at(target)
