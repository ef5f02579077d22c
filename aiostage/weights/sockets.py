"""Packets of JSON, some with descriptors, between processes of one user over a socket at a path.

The socket is of the kind SOCK_SEQPACKET: a packet arrives as a whole, with its descriptors, or not at all. The other
end may be of another version, or any other program. Therefore each packet has a bounded length and is checked before it
is used.
"""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import stat
import struct
from array import array
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

import anyio
from anyio.lowlevel import checkpoint

from aiostage._loop.coroutines import Finalizer
from aiostage._loop.forks import register_after_fork
from aiostage._platform.files import try_lock
from aiostage.errors import WeightsError, said, shown
from aiostage.format.lines import parse_line

__all__ = [
    "BEATS_PER_TIMEOUT",
    "MAX_PACKET_BYTES",
    "PROTOCOL",
    "TIMEOUT_SECONDS",
    "Endpoint",
    "MalformedError",
    "PacketSocket",
    "connect",
    "hello_of",
    "int_in",
]

PROTOCOL = 1
"""Increased when a peer of the last version would misunderstand a packet."""

MAX_PACKET_BYTES = 4096
"""Longer packets are neither sent nor read."""

_MAX_DESCRIPTORS = 2
"""A version has one for the text, and one for the memory of the tensors."""

_ANCILLARY_BYTES = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array("i").itemsize)
_TRUNCATED = socket.MSG_TRUNC | socket.MSG_CTRUNC

_CREDENTIALS = struct.Struct("3i")
"""``struct ucred``: process, user, group."""

_BACKLOG = 128
"""Connections that wait to be accepted. A guess: a subscriber that finds the queue full connects again."""

_LONGEST_REASON = 1000
_MOST_DISCARDED = 64
"""Packets that are read and dropped before a connection is closed. A guess. There is a limit, because the peer may send
without end."""

_MAX_NUMBER = (1 << 63) - 1
BEATS_PER_TIMEOUT = 4
"""Messages of each end in the time of silence after which the other gives up. A guess: three may be late in a row."""

TIMEOUT_SECONDS = (0.01, 1e6)
"""The shortest and the longest timeout that a peer may ask for. The longest are eleven days."""


class MalformedError(Exception):
    """A peer has sent bytes that are not a packet of this protocol."""


class PacketSocket:
    """One end of a connection. One task may send and one may receive at a time.

    Args:
        connection: Connected, of packets that keep their boundaries.

    Attributes:
        pid: The process at the other end, when it connected or began to listen.
        uid: Its user.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        # The kernel recorded these when the connection was made. The peer cannot forge them.
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self.pid, self.uid, _ = _CREDENTIALS.unpack(credentials)
        self._close = Finalizer(self, connection.close)
        register_after_fork(self)

    def close(self) -> None:
        """Close it. No task may wait for it. Dropping it does so too."""
        self._close()

    def after_fork_in_child(self) -> None:
        """Close it in a child. A copy there would hide from the other end that this process has ended."""
        self._close()

    def send_nowait(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> bool:
        """Send a packet if there is room for it; return whether there was.

        Raises:
            OSError: If the other end is gone.
        """
        # MSG_NOSIGNAL: if the other end is gone, this raises an error and no SIGPIPE.
        data = json.dumps(message, separators=(",", ":")).encode()
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
        try:
            self._socket.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
        except (BlockingIOError, InterruptedError):
            return False
        return True

    async def send(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Send a packet.

        Args:
            message: JSON.
            descriptors: Duplicates of which the other end gets.

        Raises:
            OSError: If the other end is gone.

        When cancelled, it was not sent.
        """
        await checkpoint()
        while not self.send_nowait(message, descriptors):
            # A packet is sent as a whole or not at all, so trying again sends nothing twice.
            await anyio.wait_writable(self._socket)

    async def receive(self) -> tuple[dict[str, Any], list[int]]:
        """Wait for a packet.

        Returns:
            The message, and its descriptors, which the caller has to close.

        Raises:
            EOFError: If the other end is closed.
            MalformedError: If it has sent something else.
            OSError: If the connection fails.

        When cancelled, nothing was received.
        """
        while True:
            # A cancellation is delivered here, and not after recvmsg(), which would lose the packet. It also lets other
            # tasks run when a peer sends without a pause.
            await checkpoint()
            try:
                # One byte more than a packet may have, so that a longer one is recognized.
                data, ancillary, flags, _ = self._socket.recvmsg(
                    MAX_PACKET_BYTES + 1, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
                )
                break
            except (BlockingIOError, InterruptedError):
                await anyio.wait_readable(self._socket)
        return self._received(data, ancillary, flags)

    async def receive_within(self, seconds: float) -> tuple[dict[str, Any], list[int]]:
        """Wait for a packet as :meth:`receive` does, and no longer than so.

        Raises:
            TimeoutError: If none came. A packet that arrived while this process was busy counts as received in time.
        """
        with anyio.move_on_after(seconds):
            return await self.receive()
        # The time may have passed because this process computed or was suspended. Then the packet is there.
        if self._is_readable():
            return await self.receive()
        raise TimeoutError(f"silent for {seconds} seconds")

    def refuse(self, reason: str) -> None:
        """Send the reason why the connection ends, if there is room: the other end may not be reading."""
        with suppress(OSError):
            self.send_nowait({"refused": reason[:_LONGEST_REASON]})
        # Then read what the other end has sent. Closing a socket with unread packets resets the connection, and the
        # other end would get an error before the reason.
        for _ in range(_MOST_DISCARDED):
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(1, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
            except OSError:
                return
            with suppress(EOFError, MalformedError):
                for descriptor in self._received(data, ancillary, flags & ~_TRUNCATED)[1]:
                    os.close(descriptor)

    def _is_readable(self) -> bool:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    @staticmethod
    def _received(data: bytes, ancillary: list[Any], flags: int) -> tuple[dict[str, Any], list[int]]:
        descriptors = array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(content[: len(content) // descriptors.itemsize * descriptors.itemsize])
        try:
            # The end of the connection reads as an empty packet. Peers never send one.
            if not data:
                raise EOFError
            if flags & _TRUNCATED or len(data) > MAX_PACKET_BYTES:
                raise MalformedError(f"a packet of more than {MAX_PACKET_BYTES} bytes or too many descriptors")
            return _parsed(data), descriptors.tolist()
        except BaseException:
            # The kernel has put them into this process already. A hostile packet must not fill its table.
            for descriptor in descriptors:
                os.close(descriptor)
            raise


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        message = parse_line(data)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"a packet that is not JSON: {said(error)}") from error
    if type(message) is not dict:
        raise MalformedError(f"a packet that is not an object: {shown(message)}")
    return message


def int_in(message: dict[str, Any], key: str) -> int:
    """Return an integer of a message.

    Raises:
        MalformedError: If there is none.
    """
    value = message.get(key)
    # Not isinstance(): JSON's true is a bool, which is an int.
    if type(value) is not int or not 0 <= value <= _MAX_NUMBER:
        raise MalformedError(f"{key} is {shown(value)}, and not an integer")
    return value


def hello_of(message: dict[str, Any]) -> float:
    """Check the first message of a peer, and return its timeout: it takes this end for dead after that much silence.

    Raises:
        MalformedError: If it is not a first message, or of another version of the protocol.
    """
    if message.get("aiostage") != "weights":
        raise MalformedError("a first packet that is not of aiostage")
    if message.get("protocol") != PROTOCOL:
        raise MalformedError(f"version {shown(message.get('protocol'))} of the protocol; this end has {PROTOCOL}")
    timeout = message.get("timeout")
    if not isinstance(timeout, (int, float)) or not TIMEOUT_SECONDS[0] <= timeout <= TIMEOUT_SECONDS[1]:
        raise MalformedError(f"timeout is {shown(timeout)}")
    return float(timeout)


def connect(path: str) -> PacketSocket:
    """Connect to the process that listens at a path. Blocks, briefly.

    Raises:
        OSError: If no process listens there, or its queue is full.
        WeightsError: If the process there is of another user, or no program of this kind.
    """
    with ExitStack() as stack:
        try:
            directory, name = _open_directory(path)
            stack.callback(os.close, directory)
            connection = stack.enter_context(_new_socket())
            connection.connect(_beside(directory, name))
        except OSError as error:
            if error.errno == errno.EPROTOTYPE:
                reason, remedy = "another program listens there.", "Choose a path of its own."
                raise WeightsError(reason, path=path, remedy=remedy) from error
            if isinstance(error, PermissionError):
                raise WeightsError(
                    f"this process may not connect: {error.strerror}.",
                    path=path,
                    remedy="Publisher and subscribers have to run as one user.",
                ) from error
            raise
        # A duplicate, so that leaving the stack can close the first in every case.
        peer = PacketSocket(connection.dup())
    if peer.uid != os.geteuid():
        peer.close()
        raise WeightsError(
            f"process {peer.pid} listens there as user {peer.uid}, and this one is user {os.geteuid()}.",
            path=path,
            remedy="Publisher and subscribers have to run as one user.",
        )
    return peer


class Endpoint:
    """A socket on which only this process listens.

    The process holds a lock on the file ``PATH.lock``. The kernel releases the lock when the process ends, so the files
    of a killed process are known to be stale.

    Args:
        path: The path of the socket. Missing directories are created, for this user only. Blocks.

    Raises:
        WeightsError: If another process listens there, or the path exists and is not a socket.
        OSError: If the file system refuses.
    """

    def __init__(self, path: str) -> None:
        self.path = path = os.path.abspath(path)
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        # The socket first: it closes itself if the directory cannot be opened, and a bare descriptor does not.
        self._socket = _new_socket()
        try:
            self._directory, self._name = _open_directory(path)
        except OSError:
            self._socket.close()
            raise
        self._lock = -1
        self._inode = -1
        self._close = Finalizer(self, _close_all, self._socket, self._directory)
        try:
            self._take()
            self._listen()
        except BaseException:
            self._close()
            raise
        register_after_fork(self)

    def _take(self) -> None:
        """Lock the path."""
        name = f"{self._name}.lock"
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        while True:
            lock = os.open(name, flags, 0o600, dir_fd=self._directory)
            try:
                # The lock says who owns the path. The socket's file does not: killed processes leave theirs behind.
                if not try_lock(lock):
                    owner = os.pread(lock, 20, 0).decode("ascii", "replace") or "another one"
                    raise WeightsError(
                        f"process {owner} publishes there.",
                        path=self.path,
                        remedy="End it, or publish at another path. One publisher serves any number of subscribers.",
                    )
                # The last owner may have removed the file between our open() and the lock. A lock on a removed file
                # does not keep other processes out.
                if os.fstat(lock).st_ino == _inode_of(name, self._directory):
                    break
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)
        # The new finalizer closes the lock too. If the old one stayed, both would close the socket.
        self._close.detach()
        self._lock = lock
        self._close = Finalizer(self, _close_all, self._socket, self._directory, lock)
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)

    def _listen(self) -> None:
        try:
            status = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            pass
        else:
            if not stat.S_ISSOCK(status.st_mode):
                raise WeightsError(
                    "the path exists and is not a socket.", path=self.path, remedy="Choose a path of its own."
                )
            # A killed process has left it: a living one would have the lock.
            os.unlink(self._name, dir_fd=self._directory)
        # bind() gives the file the mode of the socket, so that no other user can connect, not even for a moment.
        os.fchmod(self._socket.fileno(), 0o600)
        self._socket.bind(_beside(self._directory, self._name))
        self._inode = _inode_of(self._name, self._directory)
        self._socket.listen(_BACKLOG)

    async def accept(self) -> PacketSocket:
        """Wait for a process to connect. Cancelling changes nothing.

        Raises:
            OSError: If no more descriptors can be had.
        """
        while True:
            await checkpoint()
            try:
                connection, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                await anyio.wait_readable(self._socket)
            else:
                return PacketSocket(connection)

    def close(self) -> None:
        """Stop listening, and remove the files. Blocks, briefly."""
        if self._close.alive:
            # Only this socket's own file: another process may have replaced it.
            if _inode_of(self._name, self._directory) == self._inode:
                os.unlink(self._name, dir_fd=self._directory)
            if _inode_of(f"{self._name}.lock", self._directory) == os.fstat(self._lock).st_ino:
                os.unlink(f"{self._name}.lock", dir_fd=self._directory)
            # Last: until the lock is released, no other process takes the path.
            self._close()

    def after_fork_in_child(self) -> None:
        """Close it in a child, which would hold the lock for as long as it lives."""
        self._close()


def _new_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)


def _open_directory(path: str) -> tuple[int, str]:
    directory, name = os.path.split(os.path.abspath(path))
    return os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC), name


def _beside(directory: int, name: str) -> str:
    """Return a path to a file in an open directory that is short enough for a socket: these have at most 107 bytes."""
    return f"/proc/self/fd/{directory}/{name}"


def _inode_of(name: str, directory: int) -> int:
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False).st_ino
    except FileNotFoundError:
        return -1


def _close_all(listening: socket.socket, *descriptors: int) -> None:
    listening.close()
    for descriptor in descriptors:
        os.close(descriptor)
