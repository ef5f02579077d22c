"""Directories that appear whole or not at all: written beside their place, then moved there in one step.

A draft is a sibling of the target with a name that tells whose it is. Its writer holds an ``flock`` on it, which the
kernel lets go of however the writer ends; the next save to the same target removes drafts that nobody holds. Where
the kernel can exchange two directories, replacing a checkpoint is that one step. Elsewhere the old one is moved
aside first, and whoever finds the target missing then takes the one that was moved aside.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator

from aiostage.errors import CheckpointError, CheckpointExistsError, CheckpointNotFoundError
from aiostage.storage.files import Descriptor

__all__ = ["MANIFEST_NAME", "Draft", "check_target", "exchange", "is_current", "open_committed"]

MANIFEST_NAME = "manifest.json"
"""What every checkpoint has, and what tells one from other directories."""

_log = logging.getLogger("aiostage")

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2

_LONGEST_NAME = 255
_TOKEN_BYTES = 8
_ASIDE = ".old"
_ATTEMPTS = 100
"""How often a race with another process is retried before it is called an error. Each attempt can only fail when
somebody else's has succeeded."""


def check_target(target: str, *, overwrite: bool) -> None:
    """Refuse a target that must not be written to. Blocks.

    Raises:
        CheckpointExistsError: If something is there, and it may not be or is no checkpoint.
    """
    if not os.path.lexists(target) and (overwrite or next(_set_aside(target), None) is None):
        return
    if not overwrite:
        raise CheckpointExistsError(
            "there is already something.", path=target, remedy="Choose another target or pass overwrite=True."
        )
    if not os.path.lexists(os.path.join(target, MANIFEST_NAME)) and not _is_empty_directory(target):
        raise CheckpointExistsError(
            f"it is not a checkpoint (it has no {MANIFEST_NAME}), so it is not replaced.",
            path=target,
            remedy="Choose another target, or remove what is there.",
        )


def exchange(first: str, second: str) -> bool:
    """Exchange what two paths name, in one step; return False where that is not possible. Blocks."""
    return _rename(first, second, _RENAME_EXCHANGE)


class Draft:
    """A directory that is being written beside its place. Everything here blocks.

    Args:
        target: Resolved path of the checkpoint to be. Missing parents are made.
        exchanging: How two directories are exchanged; says False where that is not possible.

    Raises:
        OSError: If the directory cannot be made.
    """

    def __init__(self, target: str, *, exchanging: Callable[[str, str], bool] = exchange) -> None:
        self.target = target
        self._exchange = exchanging
        _make_parents(os.path.dirname(target))
        _sweep(target)
        for _ in range(_ATTEMPTS):
            self.path = f"{_prefix(target)}{secrets.token_hex(_TOKEN_BYTES)}"
            os.mkdir(self.path)
            lock = self._lock()
            if lock is not None:
                self._directory = lock
                return
        raise CheckpointError("another process keeps removing what is being written.", path=target)

    def _lock(self) -> Descriptor | None:
        """Lock the new directory; return None if somebody took it for debris before that."""
        try:
            directory = _open_directory(self.path)
        except FileNotFoundError:
            return None
        if _try_lock(directory) is False or not is_current(directory, self.path):
            directory.close()
            return None
        return directory

    def publish(self, *, overwrite: bool) -> None:
        """Make the draft the target. Once this returns, it will be there also after a power failure.

        Raises:
            CheckpointExistsError: If there is something at the target and it must not be replaced.
            OSError: If the file system refuses.
        """
        os.fsync(self._directory.fileno())
        old = self._take_place(overwrite)
        _sync_directory(os.path.dirname(self.target))
        self._directory.close()
        if old is not None:
            _remove(old)

    def discard(self) -> None:
        """Remove what was written, unless it was published. May be called more than once."""
        if self._directory.closed:
            return
        # After a failure half-way through publishing, the path may name the old checkpoint.
        if is_current(self._directory, self.path):
            _remove(self.path)
        self._directory.close()

    def _take_place(self, overwrite: bool) -> str | None:
        """Move the draft to the target; return where the old checkpoint is now, if there was one."""
        for _ in range(_ATTEMPTS):
            try:
                _move(self.path, self.target)
                return None
            except FileExistsError:
                check_target(self.target, overwrite=overwrite)
            try:
                if self._exchange(self.path, self.target):
                    return self.path
                aside = self.path + _ASIDE
                os.rename(self.target, aside)
            except FileNotFoundError:
                continue
            try:
                _move(self.path, self.target)
                return aside
            except FileExistsError:
                # Another writer was faster, and its checkpoint is as new as this one.
                _remove(aside)
        raise CheckpointError("other writers keep replacing it.", path=self.target)


def open_committed(source: str) -> Descriptor:
    """Open the directory of a checkpoint. Blocks.

    What is opened stays the same directory, even if the checkpoint is replaced meanwhile.

    Raises:
        CheckpointNotFoundError: If there is no checkpoint.
    """
    for _ in range(_ATTEMPTS):
        for path in (source, *_set_aside(source)):
            try:
                directory = _open_directory(path)
            except (FileNotFoundError, NotADirectoryError):
                continue
            if os.access(MANIFEST_NAME, os.F_OK, dir_fd=directory.fileno()):
                return directory
            replaced = not is_current(directory, path)
            directory.close()
            if not replaced and path == source:
                raise CheckpointNotFoundError(
                    f"the directory has no {MANIFEST_NAME}, so it is not a checkpoint.", path=source
                )
        if not os.path.lexists(source) and next(_set_aside(source), None) is None:
            raise CheckpointNotFoundError("there is no checkpoint.", path=source)
        if os.path.lexists(source) and not os.path.isdir(source):
            raise CheckpointNotFoundError("it is not a directory, so it is not a checkpoint.", path=source)
    raise CheckpointError("it keeps being replaced while it is opened.", path=source)


def is_current(directory: Descriptor, path: str) -> bool:
    """Return whether a path still names an open directory. Blocks."""
    try:
        return os.path.samestat(os.fstat(directory.fileno()), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _prefix(target: str) -> str:
    """Return what the paths of all drafts for a target start with, and nothing else does."""
    parent, name = os.path.split(target)
    room = _LONGEST_NAME - len(f"..aiostage-{_ASIDE}") - 2 * _TOKEN_BYTES
    if len(os.fsencode(name)) > room:
        # The name is shortened; a digest keeps it apart from other long ones.
        name = hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()
    return os.path.join(parent, f".{name}.aiostage-")


def _siblings(target: str) -> Iterator[str]:
    """Iterate over the paths of drafts for a target, whoever they belong to."""
    parent, start = os.path.split(_prefix(target))
    try:
        names = os.listdir(parent)
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        token = name.removeprefix(start).removesuffix(_ASIDE)
        if name.startswith(start) and len(token) == 2 * _TOKEN_BYTES:
            yield os.path.join(parent, name)


def _set_aside(target: str) -> Iterator[str]:
    """Iterate over checkpoints that were moved aside for a new one, latest first."""
    found = [path for path in _siblings(target) if path.endswith(_ASIDE)]
    yield from sorted(found, key=_change_time, reverse=True)


def _change_time(path: str) -> int:
    try:
        return os.stat(path).st_ctime_ns
    except FileNotFoundError:
        return 0


def _sweep(target: str) -> None:
    """Bring a checkpoint back that was moved aside and never replaced, and remove what dead writers have left."""
    if not os.path.lexists(target):
        for path in _set_aside(target):
            try:
                _move(path, target)
                break
            except (FileExistsError, FileNotFoundError):
                continue
    for path in _siblings(target):
        try:
            directory = _open_directory(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        try:
            if _try_lock(directory) and (not path.endswith(_ASIDE) or os.path.lexists(target)):
                _log.info("removing %s, left behind by a save that did not end", path)
                _remove(path)
        finally:
            directory.close()


def _make_parents(path: str) -> None:
    """Make missing directories so that they outlast a power failure."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for new in reversed(missing):
        os.makedirs(new, exist_ok=True)
        _sync_directory(os.path.dirname(new))


def _open_directory(path: str) -> Descriptor:
    return Descriptor(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))


def _sync_directory(path: str) -> None:
    directory = _open_directory(path)
    try:
        os.fsync(directory.fileno())
    finally:
        directory.close()


def _try_lock(directory: Descriptor) -> bool | None:
    """Lock a directory; return False if it is locked already, None where the file system has no locks."""
    try:
        fcntl.flock(directory.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # Without locks nobody can tell debris from work, so nothing is ever removed.
        return None
    return True


def _is_empty_directory(path: str) -> bool:
    try:
        return not os.listdir(path)
    except NotADirectoryError:
        return False


def _remove(path: str) -> None:
    """Remove a directory; what cannot be removed is logged and left to the next save."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        _log.warning("could not remove %s: %s", path, error)


def _move(source: str, target: str) -> None:
    """Rename a directory to a name that must be free.

    Raises:
        FileExistsError: If it is not.
    """
    if _rename(source, target, _RENAME_NOREPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from error
        raise


def _rename(source: str, target: str, flag: int) -> bool:
    """Call ``renameat2``; return False where the system or the file system does not have it."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), source, None, target)
