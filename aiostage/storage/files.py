"""Files and directories as the system has them: descriptors that close themselves, direct I/O, locks, moves."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from aiostage._arguments import require_int
from aiostage._loop.coroutines import Finalizer
from aiostage._loop.workers import releasing_gil
from aiostage._platform.files import open_direct, read_into, reserve_file, set_direct, sync, try_lock, unlock
from aiostage._platform.files import rename as _rename
from aiostage._platform.memory import PAGE_BYTES
from aiostage._platform.page_cache import counts_cached_pages, is_cached
from aiostage._platform.system import NOT_SUPPORTED
from aiostage._platform.threads import yield_core
from aiostage.abc import Buffer
from aiostage.errors import CheckpointCorruptError, shown
from aiostage.format.parts import PART_ALIGNMENT

__all__ = [
    "Descriptor",
    "InputFile",
    "OutputFile",
    "PartBuffers",
    "address_of",
    "aligned_memory",
    "check_file",
    "check_names",
    "exchange",
    "is_current",
    "is_empty_directory",
    "is_plain_name",
    "locked_directory",
    "make_parents",
    "move",
    "open_directory",
    "remove",
    "sync_directory",
    "try_lock_directory",
]

_BOUNCE_BYTES = 1 << 20
"""Bytes that are copied to aligned memory and written at once. A guess: small enough to stay in the CPU's caches."""

_READ_BYTES = 512 << 10
"""Bytes that are read in one call. A kernel without preemption copies all of a call before another thread gets the
core, and that may be the event loop's: 8 MiB at once delayed it by 6 ms."""

_FAULTED_BYTES = 2 << 20
"""New memory that is faulted in before a thread offers its core: a huge page, which takes 0.2 to 4.5 ms. NumPy asks for
these. With ordinary pages a disk takes smaller requests, and a load from it a third longer."""

_NO_FILE = frozenset((errno.ENXIO, errno.ENODEV, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG))
"""Errors of opening sockets, devices without a driver, and names that no file can have."""


def aligned_memory(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return new uint8 memory that direct I/O accepts."""
    memory = np.empty(nbytes + PART_ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % PART_ALIGNMENT
    return memory[start : start + nbytes]


def is_plain_name(name: object) -> bool:
    """Return whether something is the name of a file in a checkpoint: a str that cannot lead out of its directory.

    Names come from manifests and metadata, which may be hostile. ``openat`` follows ``..``, and takes an absolute path
    as it is, whatever directory it is given.
    """
    return isinstance(name, str) and not {"/", "\0"}.intersection(name) and name not in ("", ".", "..")


def check_file(name: object, nbytes: object) -> None:
    """Refuse what a file of a checkpoint cannot be.

    Raises:
        ValueError: If its name is not a plain one, or its size is below 0.
        TypeError: If its size is not an integer.
    """
    if not is_plain_name(name):
        raise ValueError(f"{shown(name)} is not a plain name for a file")
    require_int("nbytes", nbytes, least=0)


def check_names(keep: object) -> None:
    """Refuse what is not several names: in a single text others would be looked for as parts of it.

    Raises:
        TypeError: If it is not.
    """
    if isinstance(keep, (str, bytes)) or not isinstance(keep, Collection):
        raise TypeError(f"keep must be a collection of names, not {shown(keep)}")


def address_of(data: Buffer) -> int:
    """Return where a buffer starts."""
    return int(np.frombuffer(data, np.uint8).ctypes.data) if len(data) else 0


class Descriptor:
    """A file descriptor that is closed at the latest when the last reference to it is gone.

    Steps in worker threads refer to this object and not to the number. Otherwise the number could be closed, and be
    that of another file, while one of them runs.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        # It refers to the number and not to this object, which it would keep alive. It runs once: by close(), or when
        # this object dies.
        self._finalizer = Finalizer(self, os.close, number)

    def __enter__(self: D) -> D:
        """Return self."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close, except for GeneratorExit: a coroutine that is being closed has not waited for steps in threads."""
        # The descriptor then closes when the last of these steps drops its reference.
        if kind is not GeneratorExit:
            self.close()

    def fileno(self) -> int:
        """Return the descriptor's number."""
        return self._number

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return not self._finalizer.alive

    def close(self) -> None:
        """Close it. May be called more than once."""
        self._finalizer()


D = TypeVar("D", bound=Descriptor)


class OutputFile(Descriptor):
    """A new file of known size, written in parts from several threads.

    Args:
        path: Must not exist.
        nbytes: How long the file will be.
        direct: Whether to keep the data out of the page cache, if the file system can.

    Raises:
        OSError: If the file cannot be created or its space cannot be reserved.
    """

    def __init__(self, path: str, nbytes: int, *, direct: bool) -> None:
        # O_EXCL: two writers of one file name are a fault, and neither may write into the other's file.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self.path = path
        self.nbytes = nbytes
        self.direct = direct
        super().__init__(os.open(path, flags, 0o666))
        try:
            if self.direct:
                self.direct = self._set_direct(True)
            if self.direct:
                self._reserve()
        except BaseException:
            # No caller has this object yet, so it removes the file itself. The name is free for another attempt.
            os.unlink(path)
            self.close()
            raise

    def write(self, data: Buffer, offset: int) -> None:
        """Write all of a buffer. With direct I/O the offset must be aligned, and the length too unless it is the end.

        Raises:
            OSError: If the file system refuses, with the file's path.
        """
        if not self.direct:
            self._write(data, offset)
            return
        straight = len(data) // PART_ALIGNMENT * PART_ALIGNMENT if address_of(data) % PART_ALIGNMENT == 0 else 0
        self._write(data[:straight], offset)
        rest, offset = data[straight:], offset + straight
        bounce = aligned_memory(min(len(rest) + PART_ALIGNMENT, _BOUNCE_BYTES))
        for start in range(0, len(rest), _BOUNCE_BYTES):
            piece = rest[start : start + _BOUNCE_BYTES]
            padded = -(-len(piece) // PART_ALIGNMENT) * PART_ALIGNMENT
            # Memory that is not aligned is copied to a buffer that is. The last block is filled up with zeros.
            # finish() cuts them off.
            bounce[: len(piece)] = piece
            bounce[len(piece) : padded] = 0
            self._write(bounce.data[:padded], offset + start)

    def _write(self, view: Buffer, offset: int) -> None:
        while view:
            try:
                written = os.pwrite(self._number, view, offset)
            except OSError as error:
                if self.direct and error.errno in NOT_SUPPORTED:
                    # Some file systems let direct I/O be switched on and then refuse it.
                    self.direct = self._set_direct(False)
                    continue
                raise self._named(error) from error
            view, offset = view[written:], offset + written

    def finish(self) -> None:
        """Cut the padding off, wait until everything is on the disk, and close. Called once, after every write."""
        try:
            # Before the sync, so that the length is on the disk too.
            os.ftruncate(self._number, self.nbytes)
            sync(self._number)
        except OSError as error:
            raise self._named(error) from error
        self.close()

    def _set_direct(self, on: bool) -> bool:
        """Switch direct I/O; return whether it is on now."""
        try:
            return set_direct(self._number, on)
        except OSError as error:
            raise self._named(error) from error

    def _reserve(self) -> None:
        """Reserve the file's space: a full disk shows before anything is written, and threads need not take turns."""
        try:
            reserve_file(self._number, max(self.nbytes, 1))
        except OSError as error:
            raise self._named(error) from error

    def _named(self, error: OSError) -> OSError:
        return OSError(error.errno, error.strerror, self.path)


class InputFile(Descriptor):
    """A file of a checkpoint that is read in parts from several threads.

    Args:
        directory: The checkpoint's; it stays the same directory even if its path is given to another one.
        name: The name of the file in it; a plain one.
        path: For errors.

    Raises:
        CheckpointCorruptError: If there is no such file, or it is not a regular one; a link is none.
    """

    def __init__(self, directory: Descriptor, name: str, *, path: str) -> None:
        self.path = path
        try:
            # A FIFO would otherwise be waited for, and a link may lead to anything that this process may read.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
            number = os.open(name, flags, dir_fd=directory.fileno())
        except FileNotFoundError as error:
            raise CheckpointCorruptError("the file is missing.", path=path) from error
        except ValueError as error:
            raise CheckpointCorruptError("no file can have this name.", path=ascii(path)) from error
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise CheckpointCorruptError(
                    "it is a link, and links in a checkpoint are not followed.",
                    path=path,
                    remedy="Put the file itself in its place. The directory may be a link.",
                ) from error
            if error.errno in _NO_FILE:
                raise CheckpointCorruptError("it is not a regular file.", path=path) from error
            raise
        super().__init__(number)
        # Asked of the descriptor and not of the path, which may name another file by now.
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise CheckpointCorruptError("it is not a regular file.", path=path)
        self.nbytes = status.st_size
        self.modified = status.st_mtime
        self._directory = directory
        self._name = name
        self._is_same = partial(os.path.samestat, status)
        self._direct: Descriptor | None = None

    @property
    def descriptors(self) -> int:
        """How many descriptors the file has open."""
        return 1 if self._direct is None else 2

    def cold_parts(self, part_bytes: int) -> list[int]:
        """Return which parts are better read past the page cache, because little of them is in it. Blocks.

        None are where the file system cannot do that, or where another reader of the machine is doing it already: that
        one and this one would both read all of the file from the disk. Then it is read through the cache, so that
        however many processes load one checkpoint, the disk is read twice.

        Args:
            part_bytes: How long each part is, a multiple of :data:`~aiostage.format.parts.PART_ALIGNMENT`.
        """
        if part_bytes % PAGE_BYTES or not self._open_direct():
            return []
        offsets, count = enumerate(range(0, self.nbytes, part_bytes)), counts_cached_pages()
        return [
            index
            for index, offset in releasing_gil(offsets)
            if not is_cached(self._number, offset, min(part_bytes, self.nbytes - offset), count=count)
        ]

    def read_past_cache(self, into: Buffer, offset: int, used: int = 0) -> None:
        """Fill a buffer, as far as the file goes, from the disk; with what is not on the disk yet, too.

        Args:
            into: Aligned to :data:`~aiostage.format.parts.PART_ALIGNMENT`, and as long as a multiple of it.
            offset: A multiple of it.
            used: How much of the buffer was written to before. The rest is faulted in first.

        Raises:
            CheckpointCorruptError: If the file has become shorter.
            OSError: If the file cannot be read.
        """
        if used < len(into):
            _fault_in(into[used:])
        stop, done = min(len(into), self.nbytes - offset), 0
        # In a local variable: another thread may give it up meanwhile, and its number would be closed during this read.
        direct = self._direct
        while done < stop and done % PART_ALIGNMENT == 0 and direct is not None:
            try:
                count = read_into(direct.fileno(), into[done:], offset + done)
            except OSError as error:
                if error.errno not in NOT_SUPPORTED:
                    raise
                # Some file systems let a file be opened so and then refuse to read it.
                self._direct = None
                break
            if count == 0:
                break
            done += count
        # Direct reads stop at the unaligned end of the file, and where the file system refuses them. read() reads the
        # rest, and raises if the file is too short.
        self.read(into[done:stop], offset + done)

    def _open_direct(self) -> bool:
        """Open the file once more; return whether it is open for this reader alone."""
        number = open_direct(self._name, self._directory.fileno())
        if number is None:
            return False
        direct = Descriptor(number)
        try:
            # It is opened by name a second time, so it may be another file. The lock makes one reader of the machine
            # the only one that reads past the cache. Closing the descriptor releases it.
            if not self._is_same(os.fstat(number)) or not try_lock(number):
                return False
        except OSError:
            # Without locks, this reader may be one of many.
            return False
        self._direct = direct
        return True

    def read(self, into: Buffer, offset: int, update: Callable[[Buffer], object] | None = None) -> None:
        """Fill a buffer.

        Args:
            into: What is filled.
            offset: Where in the file its first byte is.
            update: Called with each half mebibyte once it was read: the core has it in its cache then.

        Raises:
            CheckpointCorruptError: If the file ends before the buffer is full.
            OSError: If the file cannot be read.
        """
        while into:
            count = read_into(self._number, into[:_READ_BYTES], offset)
            if count == 0:
                raise CheckpointCorruptError(f"it ends at byte {offset}; more was expected.", path=self.path)
            if update is not None:
                update(into[:count])
            into, offset = into[count:], offset + count


def _fault_in(memory: Buffer) -> None:
    """Write to each page of new memory. Blocks, mostly without the GIL.

    A direct read that has to fault in what it reads into keeps the address space locked meanwhile. The next ``mmap`` of
    any thread waits for that, with the GIL. A write to a page takes no such lock.
    """
    pages = np.frombuffer(memory, np.uint8)
    for start in range(0, len(pages), _FAULTED_BYTES):
        pages[start : start + _FAULTED_BYTES : PAGE_BYTES] = 0
        yield_core()


class PartBuffers:
    """Memory for parts that are gathered from many places. It is used again when nothing refers to a part in it.

    Args:
        part_bytes: Size of each buffer.
    """

    def __init__(self, part_bytes: int) -> None:
        self.part_bytes = part_bytes
        self._free: list[np.ndarray[Any, Any]] = []

    def take(self) -> np.ndarray[Any, Any]:
        """Return uninitialized memory. May be called from any thread."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = aligned_memory(self.part_bytes)
        # A new array over the memory. Everything that is made from it keeps it alive, and nothing else does.
        lent: np.ndarray[Any, Any] = np.frombuffer(memory.data, np.uint8)
        # The last reference may go in any thread. append() of a list is one operation, so it needs no lock.
        Finalizer(lent, self._free.append, memory)
        return lent


_log = logging.getLogger("aiostage")


def open_directory(path: str, *, follow_link: bool = True) -> Descriptor:
    """Open a directory. Blocks.

    Args:
        path: The path of the directory.
        follow_link: Whether the path may be a link to one. What is about to be removed or renamed must not be.

    Raises:
        NotADirectoryError: If it is something else, or a link that must not be followed.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        return Descriptor(os.open(path, flags if follow_link else flags | os.O_NOFOLLOW))
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from error
        raise


def is_current(directory: Descriptor, path: str) -> bool:
    """Return whether a path still names an open directory. Blocks."""
    try:
        return os.path.samestat(os.fstat(directory.fileno()), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def is_empty_directory(path: str) -> bool:
    """Return whether a path names a directory with nothing in it. Blocks."""
    try:
        return not os.listdir(path)
    except NotADirectoryError:
        return False


def make_parents(path: str) -> None:
    """Make missing directories so that they outlast a power failure. Blocks."""
    missing = []
    # From the bottom up, to know which names are new: their parents are synced.
    while not os.path.isdir(path):
        if os.path.lexists(path) and not os.path.isdir(path):
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory", path)
        missing.append(path)
        path = os.path.dirname(path)
    for new in reversed(missing):
        # Another process may be making the same ones.
        os.makedirs(new, exist_ok=True)
        sync_directory(os.path.dirname(new))


def sync_directory(path: str) -> None:
    """Wait until the names in a directory are on the disk. Blocks."""
    directory = open_directory(path)
    try:
        sync(directory.fileno())
    finally:
        directory.close()


def try_lock_directory(directory: Descriptor) -> bool | None:
    """Lock a directory; return False if it is locked already, None where the file system has no locks. Blocks."""
    try:
        return try_lock(directory.fileno())
    except OSError:
        # Without locks no process can tell stale files from those of living writers, so none is removed.
        return None


_LOCK_SECONDS = 10.0
"""A guess: far longer than a small file takes to write, and short enough for a writer to be told of it."""


@contextmanager
def locked_directory(path: str) -> Iterator[bool]:
    """Hold the lock of a directory for some small files' time; give False where the file system has no locks. Blocks.

    Raises:
        FileNotFoundError: If there is no such directory.
        TimeoutError: If another process holds the lock and does not give it back, say because it is suspended.
    """
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        # A link and what it leads to have one lock.
        resolved = os.path.realpath(path)
        with open_directory(resolved) as directory:
            locked = try_lock_directory(directory)
            if locked is None:
                yield False
                return
            if locked:
                try:
                    # Of a directory that was removed and made again, others lock the new one.
                    if is_current(directory, resolved):
                        yield True
                        return
                finally:
                    # Closing would not do: a process that was forked meanwhile has the descriptor too.
                    unlock(directory.fileno())
        if time.monotonic() > deadline:
            raise TimeoutError(
                errno.ETIMEDOUT, f"another process has held its lock for {_LOCK_SECONDS:.0f} seconds", path
            )
        time.sleep(0.001)


def remove(path: str) -> None:
    """Remove a directory, or a link but never what it leads to. Blocks.

    What cannot be removed is logged and left to the next save.
    """
    try:
        if os.path.islink(path):
            os.unlink(path)
        else:
            shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        _log.warning("could not remove %s: %s", path, error)


def exchange(first: str, second: str) -> bool:
    """Exchange what two paths name, in one step; return False where that is not possible. Blocks."""
    return _rename(first, second, exchange=True)


def move(source: str, target: str) -> None:
    """Rename a directory to a name that must be free. Blocks.

    Raises:
        FileExistsError: If it is not.
    """
    if _rename(source, target, exchange=False):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from error
        raise
