"""Files and descriptors: direct I/O, space, locks, and what is renamed in one step and kept on the disk."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from typing import Any

from aiostage._platform.system import HAS_PROC, NOT_SUPPORTED, c_library, find

__all__ = [
    "DESCRIPTORS",
    "lock",
    "open_direct",
    "read_into",
    "rename",
    "reserve_file",
    "set_direct",
    "sync",
    "try_lock",
    "unlock",
]

DESCRIPTORS = "/proc/self/fd" if HAS_PROC else "/dev/fd"
"""The directory of this process's open descriptors; where there is no /proc, it does not tell what they refer to."""

_O_DIRECT: int = getattr(os, "O_DIRECT", 0)


def set_direct(descriptor: int, on: bool) -> bool:
    """Switch direct I/O; return whether it is on now.

    Raises:
        OSError: If it cannot be switched for another reason than that there is none.
    """
    if not _O_DIRECT:
        return False
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _O_DIRECT if on else flags & ~_O_DIRECT)
    except OSError as error:
        if not on or error.errno not in NOT_SUPPORTED:
            raise
        return False
    return on


_NO_SECOND_TIME = NOT_SUPPORTED | {errno.EMFILE, errno.ENFILE, errno.ELOOP, errno.ENXIO, errno.EACCES}
"""Why a file that is open cannot be opened again, although it can be read."""


def open_direct(name: str, directory: int) -> int | None:
    """Open a file to read it past the page cache, and return its descriptor; None where that is not possible.

    That is so as well where no more files can be open, and where a link or what may not be read has its name by now.
    The file is open already, and can be read without this.

    Args:
        name: The name of the file. A link is not followed, and a FIFO not waited for.
        directory: The descriptor of the directory that it is in.

    Raises:
        OSError: If the file cannot be opened for another reason.
    """
    if not _O_DIRECT:
        return None
    try:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW | _O_DIRECT
        return os.open(name, flags, dir_fd=directory)
    except OSError as error:
        if error.errno not in _NO_SECOND_TIME:
            raise
        return None


def reserve_file(descriptor: int, nbytes: int) -> None:
    """Reserve the space of a new file, where the file system can.

    Raises:
        OSError: If the disk is full.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise


_HAS_PREADV = hasattr(os, "preadv")


def read_into(descriptor: int, into: Any, offset: int) -> int:
    """Read as much as one call gives into a writable buffer of bytes; return how much that was, 0 at the end."""
    if _HAS_PREADV:
        return os.preadv(descriptor, [into], offset)
    data = os.pread(descriptor, len(into), offset)
    into[: len(data)] = data
    return len(data)


def sync(descriptor: int) -> None:
    """Wait until a file or a directory is on the disk, and not only in the disk's cache. Blocks."""
    full: int | None = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        try:
            fcntl.fcntl(descriptor, full)
        except OSError as error:
            # Not every file system of macOS has it.
            if error.errno not in NOT_SUPPORTED:
                raise
        else:
            return
    os.fsync(descriptor)


def lock(descriptor: int) -> None:
    """Take a shared lock on an open file, which the kernel drops with the last descriptor of its opening. Blocks."""
    fcntl.flock(descriptor, fcntl.LOCK_SH)


def try_lock(descriptor: int) -> bool:
    """Take an exclusive lock on an open file; return whether it was free.

    Raises:
        OSError: If the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(descriptor: int) -> None:
    """Give a lock back."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)


_AT_FDCWD = -100
_renameat2 = find("renameat2", c_library)
_RENAMEAT2_NOREPLACE, _RENAMEAT2_EXCHANGE = 1, 2
_renamex_np = find("renamex_np", c_library)
_RENAMEX_SWAP, _RENAMEX_EXCL = 2, 4


def rename(source: str, target: str, *, exchange: bool) -> bool:
    """Rename in one step with a condition; return False where the system or the file system cannot.

    Args:
        source: What is renamed.
        target: To what.
        exchange: Give what is at the target the name of the source. Otherwise there must be nothing.

    Raises:
        OSError: If it cannot be done.
    """
    old, new = os.fsencode(source), os.fsencode(target)
    if _renameat2 is not None:
        flag = _RENAMEAT2_EXCHANGE if exchange else _RENAMEAT2_NOREPLACE
        failed = _renameat2(_AT_FDCWD, old, _AT_FDCWD, new, flag)
    elif _renamex_np is not None:
        failed = _renamex_np(old, new, _RENAMEX_SWAP if exchange else _RENAMEX_EXCL)
    else:
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in NOT_SUPPORTED:
        return False
    raise OSError(number, os.strerror(number), source, None, target)
