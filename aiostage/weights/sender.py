"""The publisher's end of a socket: which subscriber gets which version, and how long each version is kept."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
from anyio.abc import TaskGroup

from aiostage._loop.coroutines import finish, run_concurrently
from aiostage._loop.workers import Workers
from aiostage._platform.memory import shared_memory_reason
from aiostage.errors import HostMemoryError, WeightsError, said, shown
from aiostage.weights.description import Described, describe
from aiostage.weights.signal import Signal
from aiostage.weights.sockets import (
    BEATS_PER_TIMEOUT,
    PROTOCOL,
    Endpoint,
    MalformedError,
    PacketSocket,
    hello_of,
    int_in,
)

__all__ = ["SocketSender", "SubscriberInfo"]

_log = logging.getLogger("aiostage")

_MAX_CONNECTIONS = 1024
"""A guess: as many as a process may have descriptors by default."""


_RETRY_SECONDS = 0.1
"""After which to accept again when there was no descriptor for a connection. A guess."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SubscriberInfo:
    """One connected subscriber.

    Attributes:
        pid: Its process, as the publisher's process sees it.
        acknowledged: The last version that it has acknowledged; None if it has not yet.
        holds: The versions whose memory it maps, in ascending order.
    """

    pid: int
    acknowledged: int | None
    holds: tuple[int, ...]


@dataclass(slots=True)
class _Version:
    """One version that is alive. The staged tree keeps the memory from being used again."""

    number: int
    staged: Any
    described: Described


class _Connection:
    """A connected subscriber, as the publisher sees it.

    Attributes:
        wants: Whether it waits for a version.
        seen: The last version that it was sent, or had before this connection; -1 if none.
        sent: The last version that it was sent over this connection; -1 if none.
        holds: The versions that it was sent and has not released.
        told: The version that it knows as the newest.
        waits: Whether the log says already that it waits for other subscribers.
    """

    def __init__(self, peer: PacketSocket, timeout: float, seen: int) -> None:
        self.peer = peer
        self.timeout = timeout
        self.seen = seen
        self.sent = -1
        self.wants = self.waits = False
        self.holds: set[int] = set()
        self.acknowledged: int | None = None
        self.told: int | None = None


class SocketSender:
    """Hands versions of weights to the subscribers that connect to a socket.

    A subscriber asks for a version when it is ready for one, and gets the newest. So there are no queues, and the
    publisher never waits for a subscriber. It keeps the newest version, and those that a subscriber holds.

    Args:
        path: The path of the socket.
        max_versions: How many versions may be alive at once.
        timeout: Seconds of silence after which a subscriber is taken for dead.
    """

    def __init__(self, path: str, *, max_versions: int, timeout: float) -> None:
        reason = shared_memory_reason()
        if reason is not None:
            raise HostMemoryError(f"{reason}.", remedy="Publish to a storage: pass a URL.")
        self.location = path
        self.epoch = secrets.token_hex(8)
        # The other two: the newest, and one that is being staged.
        self._max_held = max_versions - 2
        self._timeout = timeout
        self._workers = Workers(1, "aiostage-weights")
        self._versions: dict[int, _Version] = {}
        self._connections: set[_Connection] = set()
        self._newest: _Version | None = None
        self._closed = False

    @asynccontextmanager
    async def serving(self) -> AsyncGenerator[None, None]:
        """Listen, and serve subscribers. All versions are dropped at the end."""
        # Everything below runs on one event loop and needs no lock: between two awaits, no other code uses the versions
        # or the connections.
        self.changed, self._closed = Signal(), False
        endpoints: list[Endpoint] = []
        try:
            # Kept in a list: a cancelled call loses its result, and the socket would stay.
            await self._workers.run(lambda: endpoints.append(Endpoint(self.location)))
            async with anyio.create_task_group() as group:
                group.start_soon(self._accept, endpoints[0], group)
                try:
                    yield
                finally:
                    # Ends _accept and every _serve; the group waits for them, so no connection is left when the socket
                    # goes.
                    group.cancel_scope.cancel()
        finally:
            self._closed = True
            self._versions.clear()
            self._newest = None
            self.changed.set()
            for endpoint in endpoints:
                await finish(partial(self._workers.run, endpoint.close))
            self._workers.stop()

    @property
    def versions(self) -> tuple[int, ...]:
        """The versions that are alive, in ascending order."""
        return tuple(sorted(self._versions))

    @property
    def subscribers(self) -> tuple[SubscriberInfo, ...]:
        """Those that are connected."""
        return tuple(
            SubscriberInfo(pid=each.peer.pid, acknowledged=each.acknowledged, holds=tuple(sorted(each.holds)))
            for each in self._connections
        )

    async def send(self, number: int, staged: Any) -> None:
        """Make a staged tree the newest version, unless a later one already is.

        Raises:
            UnsupportedLeafError: If something in it cannot be carried.
            StagingError: If too much of it is not in shared memory.

        When cancelled, it has not become the newest.
        """
        described = await self._workers.run(partial(describe, staged))
        # After the wait: another call may have made a later version the newest meanwhile.
        if self._newest is None or number > self._newest.number:
            self._newest = self._versions[number] = _Version(number, staged, described)
            self._drop_unused()

    def _drop_unused(self) -> None:
        held = self._held()
        for number in list(self._versions):
            if number not in held and self._versions[number] is not self._newest:
                # This drops the staged tree too. Its memory is free for the next staging.
                del self._versions[number]
        self.changed.set()

    def _held(self) -> set[int]:
        return {number for connection in self._connections for number in connection.holds}

    async def _accept(self, endpoint: Endpoint, group: TaskGroup) -> None:
        while True:
            try:
                peer = await endpoint.accept()
            except OSError as error:
                _log.warning("no subscriber of %s can be accepted: %s", self.location, error)
                await anyio.sleep(_RETRY_SECONDS)
            else:
                group.start_soon(self._serve, peer, name=f"serve weights to {peer.pid}")
            # This frame must not keep it open while it waits for the next one.
            peer = None  # type: ignore[assignment]

    async def _serve(self, peer: PacketSocket) -> None:
        """Serve one subscriber until it is gone."""
        connection: _Connection | None = None
        try:
            connection = await self._greet(peer)
            # After the hello: `subscribers` and the limit count only programs of this kind.
            self._connections.add(connection)
            await run_concurrently(partial(self._read, connection), partial(self._write, connection))
        except (EOFError, OSError) as error:
            # TimeoutError is an OSError.
            _log.info("subscriber %d of %s is gone: %s", peer.pid, self.location, said(error))
        except MalformedError as error:
            _log.warning("subscriber %d of %s was refused: it sent %s", peer.pid, self.location, error)
            peer.refuse(f"it was sent {error}")
        finally:
            peer.close()
            if connection is not None:
                self._connections.discard(connection)
                self._drop_unused()

    async def _greet(self, peer: PacketSocket) -> _Connection:
        message = await self._receive(peer)
        # After the first packet was received. A peer that is still sending would get an error in place of the refusal.
        if peer.uid != os.geteuid():
            raise MalformedError(f"a request as user {peer.uid}; the publisher is user {os.geteuid()}")
        if len(self._connections) >= _MAX_CONNECTIONS:
            raise MalformedError(f"a request beside {_MAX_CONNECTIONS} other subscribers")
        timeout = hello_of(message)
        have, seen = message.get("have"), -1
        if have is not None:
            if type(have) is not list or len(have) != 2 or type(have[0]) is not str:
                raise MalformedError(f"have is {shown(have)}")
            number = int_in({"version": have[1]}, "version")
            # Another publisher counts its versions anew.
            seen = number if have[0] == self.epoch else -1
        hello = {"aiostage": "weights", "protocol": PROTOCOL, "timeout": self._timeout, "epoch": self.epoch}
        await peer.send(hello)
        return _Connection(peer, timeout, seen)

    async def _receive(self, peer: PacketSocket) -> dict[str, Any]:
        message, descriptors = await peer.receive_within(self._timeout)
        for descriptor in descriptors:
            os.close(descriptor)
        if descriptors:
            raise MalformedError("descriptors")
        return message

    async def _read(self, connection: _Connection) -> None:
        while True:
            message = await self._receive(connection.peer)
            match message:
                # A second request before the first is answered matches the last case, which refuses it.
                case {"next": None} if not connection.wants:
                    connection.wants = True
                    self.changed.set()
                case {"acknowledged": _}:
                    number = int_in(message, "acknowledged")
                    if number > connection.sent:
                        raise MalformedError(f"an acknowledgement of version {number}, which it was not sent")
                    connection.acknowledged = max(number, connection.acknowledged or 0)
                    self.changed.set()
                case {"released": _}:
                    number = int_in(message, "released")
                    if number not in connection.holds:
                        raise MalformedError(f"a release of version {number}, which it does not hold")
                    # The subscriber has unmapped it. If no other holds it and it is not the newest, it is dropped.
                    connection.holds.remove(number)
                    self._drop_unused()
                case {"alive": True}:
                    pass
                case _:
                    raise MalformedError(f"a packet with {shown(' '.join(message))}")

    async def _write(self, connection: _Connection) -> None:
        # Often enough for the shorter of the two timeouts.
        beat = min(self._timeout, connection.timeout) / BEATS_PER_TIMEOUT
        peer = connection.peer
        while True:
            changed = self.changed.event
            # After the event was taken: a change from here on sets it, and the wait below ends at once.
            version = self._choose(connection)
            if version is not None:
                number, described = version.number, version.described
                connection.wants = connection.waits = False
                connection.seen = connection.sent = connection.told = number
                # Before the send, which may wait: meanwhile _drop_unused() must find that it is held.
                connection.holds.add(number)
                del version
                await peer.send({"version": number} | described.message(), described.descriptors)
                # This frame must not keep its memory during the next wait.
                del described
            elif self._newest is not None and connection.told != self._newest.number:
                connection.told = self._newest.number
                await peer.send({"newest": connection.told})
            else:
                with anyio.move_on_after(beat):
                    await changed.wait()
                    continue
                await peer.send({"alive": True})

    def _choose(self, connection: _Connection) -> _Version | None:
        """Return the version that a subscriber gets now; None if it has to wait.

        It is the newest. If as many versions are held as may be, it is the newest of the held ones, which takes no more
        memory.
        """
        newest = self._newest
        if not connection.wants or newest is None or newest.number <= connection.seen:
            return None
        held = self._held()
        # Giving out the newest adds one version to those held, unless another subscriber holds it already.
        if newest.number in held or len(held) < self._max_held:
            return newest
        number = max((each for each in held if each > connection.seen), default=None)
        if number is not None:
            return self._versions[number]
        if not connection.waits:
            connection.waits = True
            holders = ", ".join(f"{each.pid} holds {list(each.holds)}" for each in self.subscribers if each.holds)
            _log.warning(
                "subscriber %d of %s waits for version %d: as many versions as max_versions allows are in use (%s)",
                connection.peer.pid,
                self.location,
                newest.number,
                holders,
            )
        return None

    async def acknowledged(self, number: int, count: int) -> None:
        """Wait until ``count`` of the connected subscribers have acknowledged a version or a later one."""
        while True:
            changed = self.changed.event
            have = [each.acknowledged for each in self._connections]
            if sum(each is not None and each >= number for each in have) >= count:
                return
            await changed.wait()
            # A flag, and not the absence of a newest version: the first version may still be in staging.
            if self._closed:
                raise WeightsError("the publisher was closed.", path=self.location)
