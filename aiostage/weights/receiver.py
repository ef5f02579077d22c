"""The subscriber's end of a socket: connects, and connects again."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterable
from functools import partial
from typing import Any

import anyio

from aiostage._loop.coroutines import Finalizer, post, run_concurrently, without_locals
from aiostage._loop.workers import Workers
from aiostage._platform.memory import shared_memory_reason
from aiostage.errors import HostMemoryError, WeightsError, said, shown
from aiostage.weights.description import open_described
from aiostage.weights.inbox import Inbox, WeightVersion
from aiostage.weights.sockets import (
    BEATS_PER_TIMEOUT,
    PROTOCOL,
    MalformedError,
    PacketSocket,
    connect,
    hello_of,
    int_in,
)

__all__ = ["SocketReceiver"]

_log = logging.getLogger("aiostage")


_FIRST_WAIT_SECONDS = 0.02
_LONGEST_WAIT_SECONDS = 1.0
"""Between two attempts to connect. A guess: a new publisher takes seconds to start."""


class _Session:
    """One connection to a publisher."""

    def __init__(self, peer: PacketSocket, epoch: str, timeout: float, inbox: Inbox) -> None:
        self.peer = peer
        self.epoch = epoch
        self.timeout = timeout
        self.requested = False
        self.ended = False
        self._inbox = inbox

    def tell(self, **message: object) -> None:
        """Send a message soon. After the end of the session this does nothing: the publisher holds nothing for it."""
        # The finalizer of a version's memory may post this call long after the session. Numbers of an ended session
        # must not reach the next one, whose publisher may count anew.
        if not self.ended:
            self._inbox.unsent.append(message)
            self._inbox.changed.set()


class SocketReceiver:
    """Receives versions of weights from whichever publisher listens at a socket.

    Args:
        path: The path of the socket.
        inbox: Takes the versions.
        classes: Classes whose objects are made again.
        timeout: Seconds of silence after which a publisher is taken for dead.
    """

    def __init__(self, path: str, inbox: Inbox, *, classes: Iterable[type], timeout: float) -> None:
        reason = shared_memory_reason()
        if reason is not None:
            raise HostMemoryError(f"{reason}.", remedy="Subscribe to a storage: pass a URL.")
        self._path = path
        self._inbox = inbox
        self._classes = tuple(classes)
        self._timeout = timeout

    async def run(self) -> None:
        """Receive what is asked for, until cancelled."""
        workers = Workers(1, "aiostage-weights")
        wait = _FIRST_WAIT_SECONDS
        try:
            while True:
                peer: PacketSocket | None = None
                try:
                    # A cancelled call loses its result. The socket then closes when it is dropped.
                    peer = await workers.run(partial(connect, self._path))
                    # The wait is reset only after an answer. A process that accepts and never answers is tried less and
                    # less often.
                    session = await self._greet(peer)
                    wait = _FIRST_WAIT_SECONDS
                    await self._serve(session, workers)
                except WeightsError as error:
                    self._inbox.fail(without_locals(error))
                    return
                except (EOFError, OSError) as error:
                    # One line for each absence of the publisher, not for each attempt.
                    level = logging.INFO if wait == _FIRST_WAIT_SECONDS else logging.DEBUG
                    _log.log(level, "no publisher at %s: %s", self._path, said(error))
                except MalformedError as error:
                    _log.warning("the publisher at %s is left: it sent %s", self._path, error)
                finally:
                    if peer is not None:
                        peer.close()
                # A random time, so that not all subscribers connect at once.
                await anyio.sleep(wait * random.uniform(0.5, 1.0))
                wait = min(2 * wait, _LONGEST_WAIT_SECONDS)
        finally:
            workers.stop()

    async def _greet(self, peer: PacketSocket) -> _Session:
        await peer.send(
            {"aiostage": "weights", "protocol": PROTOCOL, "timeout": self._timeout, "have": self._inbox.seen}
        )
        message, descriptors = await peer.receive_within(self._timeout)
        for descriptor in descriptors:
            os.close(descriptor)
        if "refused" in message:
            raise WeightsError(
                f"process {peer.pid} refused this subscriber: {shown(message['refused'])}.",
                path=self._path,
                remedy="Run publisher and subscribers with the same aiostage, as one user.",
            )
        timeout = hello_of(message)
        epoch = message.get("epoch")
        if type(epoch) is not str:
            raise MalformedError(f"epoch is {shown(epoch)}")
        return _Session(peer, epoch, timeout, self._inbox)

    async def _serve(self, session: _Session, workers: Workers) -> None:
        inbox = self._inbox
        # These messages were for another session.
        inbox.unsent.clear()
        inbox.set_connected(True)
        try:
            await run_concurrently(partial(self._read, session, workers), partial(self._write, session))
        finally:
            session.ended = True
            inbox.set_connected(False)

    async def _read(self, session: _Session, workers: Workers) -> None:
        while True:
            message, descriptors = await session.peer.receive_within(self._timeout)
            try:
                match message:
                    case {"version": _} if session.requested:
                        # The descriptors are closed below. The memory that was mapped from them stays mapped.
                        await self._open(session, message, descriptors, workers)
                    case {"newest": _} if not descriptors:
                        self._inbox.set_newest(session.epoch, int_in(message, "newest"))
                    case {"alive": True} if not descriptors:
                        pass
                    case _:
                        raise MalformedError(f"a packet with {shown(' '.join(message))}")
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)

    async def _open(self, session: _Session, message: dict[str, Any], descriptors: list[int], workers: Workers) -> None:
        """Open a version, and put it into the inbox."""
        number = int_in(message, "version")
        seen = (session.epoch, number)
        try:
            tree, memory = await workers.run(
                partial(open_described, message, descriptors, self._classes, path=f"{self._path} version {number}")
            )
        except Exception as error:
            session.requested = False
            session.tell(released=number)
            # Marked as seen, so that this version is not asked for again. The next one may open.
            self._inbox.put(without_locals(error), seen=seen)
            return
        # Only now: the subscriber wants a version until one is in the inbox, and the writer would ask for another. No
        # await comes between the two.
        session.requested = False
        if memory is None:
            session.tell(released=number)
        else:
            # The last tensor over it may die in any thread, and inside any lock. Posting to a loop takes no lock.
            released = partial(session.tell, released=number)
            Finalizer(memory, post, self._inbox.native, released)
        acknowledged = partial(session.tell, acknowledged=number)
        version = WeightVersion(number, session.epoch, tree, partial(post, self._inbox.native, acknowledged))
        self._inbox.put(version, seen=seen)

    async def _write(self, session: _Session) -> None:
        inbox, peer = self._inbox, session.peer
        beat = min(self._timeout, session.timeout) / BEATS_PER_TIMEOUT
        while True:
            changed = inbox.changed.event
            if inbox.unsent:
                # Left in the queue until it is sent: flush() waits for the queue to be empty.
                await peer.send(inbox.unsent[0])
                inbox.unsent.popleft()
                inbox.changed.set()
            elif inbox.wants and not session.requested:
                # Before the send, which may wait: the answer may arrive first, and the reader refuses what was not
                # asked for.
                session.requested = True
                await peer.send({"next": None})
            else:
                with anyio.move_on_after(beat):
                    await changed.wait()
                    continue
                await peer.send({"alive": True})
