"""Directories as the system has them: opened, locked, moved in one step, and made to outlast a power failure."""

from __future__ import annotations

import errno
import logging
import os
import shutil

from aiostage._platform import rename as _rename
from aiostage._platform import sync
from aiostage._platform import try_lock as _try_lock
from aiostage.storage.files import Descriptor

__all__ = [
    "exchange",
    "is_current",
    "is_empty_directory",
    "make_parents",
    "move",
    "open_directory",
    "remove",
    "sync_directory",
    "try_lock",
]

_log = logging.getLogger("aiostage")


def open_directory(path: str, *, follow_link: bool = True) -> Descriptor:
    """Open a directory. Blocks.

    Args:
        path: Of the directory.
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
    while not os.path.isdir(path):
        if os.path.lexists(path) and not os.path.isdir(path):
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory", path)
        missing.append(path)
        path = os.path.dirname(path)
    for new in reversed(missing):
        os.makedirs(new, exist_ok=True)
        sync_directory(os.path.dirname(new))


def sync_directory(path: str) -> None:
    """Wait until the names in a directory are on the disk. Blocks."""
    directory = open_directory(path)
    try:
        sync(directory.fileno())
    finally:
        directory.close()


def try_lock(directory: Descriptor) -> bool | None:
    """Lock a directory; return False if it is locked already, None where the file system has no locks. Blocks."""
    try:
        return _try_lock(directory.fileno())
    except OSError:
        # Without locks no process can tell stale files from work, so nothing is ever removed.
        return None


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
