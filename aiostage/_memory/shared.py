"""Host memory that other processes can open, and the handle by which they do."""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass

import numpy
import numpy.typing

from aiostage._loop.coroutines import Finalizer
from aiostage._loop.forks import register_after_fork
from aiostage._platform.files import lock, try_lock, unlock
from aiostage._platform.memory import PAGE_BYTES, memory_file, reserve_memory, shared_memory_reason
from aiostage.errors import HostMemoryError

__all__ = ["SentMemory", "SharedFile", "SharedHandle", "map_memory"]

_GENERATION = struct.Struct("<Q")


class SharedFile:
    """An anonymous file in memory: one descriptor, no name, gone with the last process that has it open or mapped.

    Its last page is not mapped and holds a generation number, which goes up each time the memory is given to
    a new lease. A process that opens a handle takes a shared lock on the file for as long as it maps it, so the owner
    can tell by asking for an exclusive one whether a process still reads; the kernel drops the locks of the dead.

    Args:
        nbytes: How much memory to offer, whole pages.

    Raises:
        OSError: If the kernel refuses.
        HostMemoryError: If this machine cannot share memory at all.
    """

    __slots__ = ("__weakref__", "_close", "_descriptor", "_generation", "_identity", "_sent", "nbytes")

    def __init__(self, nbytes: int) -> None:
        reason = shared_memory_reason()
        if reason is not None:
            raise HostMemoryError(f"{reason}.", remedy="Stage with use_shared_memory=False.")
        self.nbytes = nbytes
        # Written behind the data for processes that open a handle: a handle of an earlier generation then fails, and
        # does not show later contents.
        self._generation = 0
        self._sent: dict[int, SentMemory] = {}
        self._descriptor = memory_file("aiostage")
        self._close = Finalizer(self, os.close, self._descriptor)
        self._identity = _identity(self._descriptor)
        os.ftruncate(self._descriptor, nbytes + PAGE_BYTES)
        register_after_fork(self)

    def map(self) -> mmap.mmap:
        """Map it all, to read and to write."""
        return mmap.mmap(self._descriptor, self.nbytes, flags=mmap.MAP_SHARED)

    def reserve(self, offset: int, nbytes: int) -> None:
        """Allocate the pages of a range. Blocks.

        Raises:
            OSError: If there are not enough.
        """
        reserve_memory(self._descriptor, offset, nbytes)

    def claim(self) -> bool:
        """Begin a new generation, unless another process still maps this one; return whether it was begun."""
        # Their locks would be taken for those of readers.
        self._sent.clear()
        if not try_lock(self._descriptor):
            return False
        self._generation += 1
        # With the exclusive lock: a process that is opening a handle waits for it, and reads the new number then.
        os.pwrite(self._descriptor, _GENERATION.pack(self._generation), self.nbytes)
        unlock(self._descriptor)
        return True

    def handle(self, nbytes: int) -> SharedHandle:
        """Return the way for another process to what is in the first ``nbytes`` bytes now."""
        return SharedHandle(os.getpid(), self._descriptor, *self._identity, nbytes, self._generation)

    def send(self) -> SentMemory | None:
        """Return what a message to another process carries of the present contents, or None if this is closed.

        The same until the next generation begins, so that a pickler that meets it many times writes it once.
        """
        # Without a lock, which another thread might hold when this process forks.
        sent = self._sent.get(self._generation)
        if sent is not None:
            return sent
        try:
            made = SentMemory(f"/proc/self/fd/{self._descriptor}", self.nbytes)
        except OSError:
            return None
        if _identity(made.descriptor) != self._identity:
            # This was closed, and its number is that of another file now.
            made.close()
            return None
        # Of two threads that make one at once, the first stays; the other is closed when it is dropped.
        return self._sent.setdefault(self._generation, made)

    def close(self) -> None:
        """Close the descriptor; mappings stay."""
        self._close()
        self._sent.clear()

    def after_fork_in_child(self) -> None:
        """Forget what the parent has sent. It is closed in a child, where its number may be another file's."""
        self._sent.clear()


class SentMemory:
    """A descriptor of the contents that a :class:`SharedFile` has now, locked against a new generation.

    The lock belongs to what was opened, and so to every duplicate: one that is on its way to another process, or
    mapped there, holds it when this one is closed.

    Args:
        path: The path of the file.
        nbytes: How many bytes to map.
    """

    __slots__ = ("__weakref__", "_close", "descriptor", "nbytes")

    def __init__(self, path: str, nbytes: int) -> None:
        self.nbytes = nbytes
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # Before the lock is asked for, so that an error there leaves nothing open.
        self._close = Finalizer(self, os.close, self.descriptor)
        lock(self.descriptor)
        register_after_fork(self)

    def close(self) -> None:
        """Close it. Dropping it does so too."""
        self._close()

    def after_fork_in_child(self) -> None:
        """Close it in a child, which would hold the lock for as long as it lives."""
        self._close()


def map_memory(descriptor: int, nbytes: int) -> numpy.typing.NDArray[numpy.uint8]:
    """Map a file that another process has staged to. Writing to the memory changes this process's view only.

    Raises:
        OSError: If the kernel refuses.
        ValueError: If the file is shorter.
    """
    # Private, so that a write here cannot reach the staged copies of others.
    memory = mmap.mmap(descriptor, nbytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return numpy.frombuffer(memory, numpy.uint8)


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


@dataclass(frozen=True, slots=True)
class SharedHandle:
    """Where shared memory is, small enough to send to any process of the same user on the same machine.

    It is valid while the staged copy that it was made from is alive in the process that made it. Memory that was opened
    stays valid while something refers to it, also after that process has ended.

    Attributes:
        pid: The process that holds the memory.
        descriptor: Its file descriptor there.
        device: The file's device number, which with the next two tells a reused descriptor or process number.
        inode: The file's inode number.
        nbytes: How many bytes to map.
        generation: Which of the successive contents of the memory is meant.
    """

    pid: int
    descriptor: int
    device: int
    inode: int
    nbytes: int
    generation: int

    def open(self) -> numpy.typing.NDArray[numpy.uint8]:
        """Map the memory without copying it.

        Returns:
            The bytes. Writing to them changes this process's view and no other. The memory stays as it is, and
            its owner does not use it again, until this array and everything made from it are gone.

        Raises:
            HostMemoryError: If the owner or its staged copy is gone, or this process may not look into it.
        """
        try:
            descriptor = os.open(f"/proc/{self.pid}/fd/{self.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._gone(f"process {self.pid} cannot be reached for its memory: {error}") from error
        try:
            status = os.fstat(descriptor)
            if (status.st_dev, status.st_ino) != (self.device, self.inode):
                raise self._gone(f"process {self.pid} has closed it")
            # Opening made a description of its own, so the lock is ours alone, and the mapping's duplicate of the
            # descriptor holds it until the mapping goes.
            lock(descriptor)
            (generation,) = _GENERATION.unpack(os.pread(descriptor, _GENERATION.size, status.st_size - PAGE_BYTES))
            if generation != self.generation:
                raise self._gone(f"process {self.pid} has dropped the staged copy and used its memory again")
            return map_memory(descriptor, self.nbytes)
        finally:
            os.close(descriptor)

    def _gone(self, reason: str) -> HostMemoryError:
        return HostMemoryError(
            f"the shared staged copy of {self.nbytes} bytes cannot be opened: {reason}.",
            remedy="Keep the staged copy until it has been opened, by a process of the same user on the same machine.",
        )
