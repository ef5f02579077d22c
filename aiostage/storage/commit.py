"""Directories that appear whole or not at all: written beside their place, then moved there in one step.

A pending checkpoint is a sibling of the target. Its name says which target it is for. Its writer holds an ``flock`` on
it, which the kernel releases however the writer ends. The next save to the same target removes pending checkpoints
without a lock. Where the kernel can exchange two directories, one step replaces a checkpoint. Elsewhere the old one is
moved aside first. A reader that finds the target missing then reads the one that was moved aside.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress

from aiostage._loop.forks import register_after_fork
from aiostage._platform.files import sync
from aiostage.errors import CheckpointError, CheckpointExistsError, CheckpointNotFoundError, shown
from aiostage.storage.files import (
    Descriptor,
    exchange,
    is_current,
    is_empty_directory,
    make_parents,
    move,
    open_directory,
    remove,
    sync_directory,
    try_lock_directory,
)

__all__ = [
    "MANIFEST_NAME",
    "PendingDirectory",
    "attached_path",
    "check_target",
    "clean_up_below",
    "committed_below",
    "delete_committed",
    "open_committed",
    "pending_below",
    "prune_committed",
]

MANIFEST_NAME = "manifest.json"
"""Every checkpoint has it, and no other directory."""

_log = logging.getLogger("aiostage")

# Processes of other versions look for these names too, to clean up or to read what was moved aside.
_INFIX = ".aiostage-"
_ASIDE = ".old"

_SHORTENED = "~"
"""The first character of a digest that stands for a long name."""

_LONGEST_NAME = 255
"""Bytes of one name, on all file systems of Linux."""

_TOKEN_BYTES = 8
"""64 random bits: no two writers choose one name."""

_ATTEMPTS = 100
"""How often a race with another process is retried before it is an error. An attempt only fails if that of another
process has succeeded."""


def check_target(target: str, *, overwrite: bool) -> None:
    """Refuse a target that must not be written to. Blocks.

    Raises:
        CheckpointExistsError: If something is there, and it may not be or is not a checkpoint.
    """
    # A checkpoint that was moved aside counts as there: its writer may have died before the new one got the name.
    if not os.path.lexists(target) and (overwrite or next(_set_aside(target), None) is None):
        return
    is_there = os.path.lexists(target)
    if is_there and not _has_manifest(target) and not is_empty_directory(target):
        raise CheckpointExistsError(
            f"it is not a checkpoint (it has no {MANIFEST_NAME}), so it is not replaced.",
            path=target,
            remedy="Choose another target, or remove what is there.",
        )
    if not overwrite:
        raise CheckpointExistsError(
            "the target exists already.", path=target, remedy="Choose another target or pass overwrite=True."
        )


class PendingDirectory:
    """A directory that is being written beside its place. Everything here blocks.

    Args:
        target: Resolved path of the checkpoint to be. Missing parents are made.
        exchanging: Exchanges two directories in one step; returns False where the file system cannot.

    Raises:
        OSError: If the directory cannot be made.
    """

    def __init__(self, target: str, *, exchanging: Callable[[str, str], bool] = exchange) -> None:
        self.target = target
        self._exchange = exchanging
        make_parents(os.path.dirname(target))
        # Disk space first: a writer that died may have left as much as this one is about to write.
        _clean_up(target)
        for _ in range(_ATTEMPTS):
            # A new name for each attempt: the old one may be a directory that a clean-up is removing right now.
            self.path = _new_path(target)
            os.mkdir(self.path)
            # Between mkdir and the lock a clean-up may take the directory for a stale one. Then try again with another.
            lock = self._lock()
            if lock is not None:
                self._directory = lock
                register_after_fork(self)
                return
        raise CheckpointError("another process removed the files during each attempt to write them.", path=target)

    def _lock(self) -> Descriptor | None:
        """Lock the new directory; return None if another process took it for stale files before that."""
        try:
            directory = open_directory(self.path, follow_link=False)
        except FileNotFoundError:
            return None
        # The lock alone says nothing about the path: a clean-up that held it before may have removed the directory in
        # between. None means that there are no locks here. Then no clean-up removes anything.
        if try_lock_directory(directory) is False or not is_current(directory, self.path):
            directory.close()
            return None
        return directory

    def after_fork_in_child(self) -> None:
        """Leave the pending checkpoint to the parent."""
        # The child's copy of the descriptor would hold the lock until the child ends.
        self._directory.close()

    def publish(self, *, overwrite: bool) -> None:
        """Make the pending checkpoint the target. Once this returns, it will be there also after a power failure.

        Raises:
            CheckpointError: If it was published or discarded before, or is of the process that has forked this one.
            CheckpointExistsError: If there is something at the target and it must not be replaced.
            OSError: If the file system refuses.
        """
        if self._directory.closed:
            raise CheckpointError(
                "this process does not own the files that were written here, or no longer.", path=self.target
            )
        # The order is the promise. Its entries are on the disk before it gets its name; the name is on the disk before
        # the lock is released and this returns; only then the old checkpoint goes. A crash between two of these steps
        # leaves the old checkpoint or the new one under the name, and the other as a stale directory without a lock.
        sync(self._directory.fileno())
        old = self._take_place(overwrite)
        sync_directory(os.path.dirname(self.target))
        self._directory.close()
        # After the lock is released: the old directory has no lock of this writer, and if this process dies here it is
        # a stale one like any other.
        if old is not None:
            remove(old)

    def discard(self) -> None:
        """Remove what was written, unless it was published. May be called more than once."""
        if self._directory.closed:
            return
        # After a failure half-way through publishing, the path may name the old checkpoint.
        if is_current(self._directory, self.path):
            remove(self.path)
        # With the lock until here, so that no clean-up removes the same files at the same time.
        self._directory.close()

    def _take_place(self, overwrite: bool) -> str | None:
        """Move the pending checkpoint to the target; return where the old checkpoint is now, if there was one."""
        for _ in range(_ATTEMPTS):
            try:
                # Refuses to replace: of two writers that may not overwrite, one wins.
                move(self.path, self.target)
                return None
            except FileExistsError:
                # Checked again at each attempt: another writer may have published since this save began.
                check_target(self.target, overwrite=overwrite)
            try:
                if self._exchange(self.path, self.target):
                    # The old checkpoint has this name now. It has no lock, so a crash here leaves a stale directory.
                    return self.path
                # Without an atomic exchange there is a moment without a checkpoint under the name. Readers look at the
                # name with this suffix too (`_set_aside`), and a clean-up moves it back if the process dies here.
                aside = self.path + _ASIDE
                os.rename(self.target, aside)
            except FileNotFoundError:
                continue
            try:
                move(self.path, self.target)
                return aside
            except FileExistsError:
                # Another writer was faster. Its checkpoint is newer than what was moved aside; or a clean-up has moved
                # that back, and there is nothing to remove.
                remove(aside)
        raise CheckpointError("other writers replaced it during each attempt.", path=self.target)


def open_committed(source: str, *, follow_link: bool = True) -> Descriptor:
    """Open the directory of a checkpoint. Blocks.

    What is opened stays the same directory, even if the checkpoint is replaced meanwhile.

    Args:
        source: Path of the checkpoint.
        follow_link: Whether it may be a link to one.

    Raises:
        CheckpointNotFoundError: If there is no checkpoint.
    """
    for _ in range(_ATTEMPTS):
        # In this order: while a writer without an atomic exchange is between its two moves, the name is missing and the
        # old checkpoint is beside it.
        for path in (source, *_set_aside(source)):
            try:
                directory = open_directory(path, follow_link=follow_link and path == source)
            except (FileNotFoundError, NotADirectoryError):
                continue
            if _has_manifest(directory=directory):
                return directory
            # No manifest: it never had one, or a deletion has begun in the directory that was just opened. Compare
            # before the descriptor is closed, because its inode may be used again then.
            replaced = not is_current(directory, path)
            directory.close()
            if not replaced and path == source:
                raise CheckpointNotFoundError(
                    f"the directory has no {MANIFEST_NAME}, so it is not a checkpoint.", path=source
                )
        if not os.path.lexists(source) and next(_set_aside(source), None) is None:
            raise CheckpointNotFoundError("there is no checkpoint.", path=source)
        if os.path.lexists(source) and (not os.path.isdir(source) or (os.path.islink(source) and not follow_link)):
            raise CheckpointNotFoundError("it is not a directory, so it is not a checkpoint.", path=source)
    raise CheckpointError("another process replaced it during each attempt to open it.", path=source)


def delete_committed(target: str) -> None:
    """Remove a checkpoint: out of sight in one step, then from the disk. Blocks. Anything else is left alone.

    If the target is a link to a checkpoint, only the link is removed.

    Raises:
        OSError: If the file system refuses.
    """
    # First: the next clean-up would give a checkpoint that was moved aside its name back, and the deleted one would
    # seem to return.
    _clean_up(target)
    try:
        directory = open_directory(target, follow_link=False)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        if os.path.islink(target) and _has_manifest(target):
            with suppress(FileNotFoundError):
                os.unlink(target)
            sync_directory(os.path.dirname(target))
        return
    with directory:
        if not _has_manifest(directory=directory):
            return
        # Locked, so that no clean-up removes the same files at the same time. If another process has the lock, that
        # one is a clean-up or a deletion too.
        try_lock_directory(directory)
        path = _new_path(target)
        try:
            # The manifest goes out of sight with the directory, in one step; from here on it is a stale directory,
            # which the next clean-up finishes if this process dies.
            os.rename(target, path)
        except FileNotFoundError:
            return
        sync_directory(os.path.dirname(target))
        remove(path)


def prune_committed(target: str, keep: Collection[str]) -> None:
    """Remove files of a checkpoint that are not named. Blocks. What is not a checkpoint is left alone.

    So is a link to one: its owner may need all of it.

    Raises:
        OSError: If the file system refuses.
    """
    try:
        directory = open_committed(target, follow_link=False)
    except CheckpointNotFoundError:
        return
    with directory, os.scandir(directory.fileno()) as entries:
        for entry in entries:
            if entry.name != MANIFEST_NAME and entry.name not in keep and not entry.is_dir(follow_symlinks=False):
                # Another process may be doing the same.
                with suppress(FileNotFoundError):
                    os.unlink(entry.name, dir_fd=directory.fileno())


def committed_below(root: str, *, deep: bool = True) -> list[str]:
    """Return the paths of all checkpoints below a directory, relative to it. Blocks.

    Links to checkpoints count. Other links are not followed. Directories that cannot be read are left out.

    Args:
        root: The directory.
        deep: Whether to look at all levels, and not only at what the directory itself contains.
    """
    found: set[str] = set()
    for path, names in _directories(root, deep=deep):
        for name in names:
            target = _target(path, name)
            if target is None:
                target = os.path.join(path, name)
            # What was moved aside counts under its own name, as long as nothing has that name.
            elif not name.endswith(_ASIDE) or os.path.lexists(target):
                continue
            if _has_manifest(os.path.join(path, name)):
                found.add(os.path.relpath(target, root))
    return sorted(found)


def pending_below(root: str) -> list[str]:
    """Return the paths of all checkpoints that are being written below a directory, relative to it. Blocks.

    They include those that dead writers have left, and those that are being removed.
    """
    targets = [_target(path, name) for path, names in _directories(root) for name in names]
    return sorted({os.path.relpath(target, root) for target in targets if target is not None})


def clean_up_below(root: str) -> None:
    """Restore checkpoints that were moved aside and never replaced, and remove stale files in a directory. Blocks."""
    for path, names in _directories(root):
        for target in {target for name in names if (target := _target(path, name)) is not None}:
            _clean_up(target)


def attached_path(target: str, token: str) -> str:
    """Return the path of a pending checkpoint that another process writes for a target. Blocks.

    Args:
        target: Resolved path of the checkpoint to be.
        token: Name of the pending directory.

    Raises:
        ValueError: If the token is not one for this target.
        FileNotFoundError: If the directory is not there.
    """
    # The token comes from another process: it must not lead out of the directory, nor to another target's files.
    path = os.path.join(os.path.dirname(target), token) if isinstance(token, str) else ""
    if os.path.basename(path) != token or not path.startswith(_prefix(target)):
        raise ValueError(
            f"{shown(token)} is not the token of a pending checkpoint for {target}: pass what token() has returned"
        )
    if not os.path.isdir(path):
        raise FileNotFoundError(
            f"{path}: the pending checkpoint is gone, or on a file system that this machine does not share"
        )
    return path


def _has_manifest(path: str = "", *, directory: Descriptor | None = None) -> bool:
    """Return whether a directory, by its path or open, is a checkpoint: it has a manifest, which is no directory.

    A link or a FIFO of that name counts as one. Readers say what is wrong with it.
    """
    try:
        descriptor = directory.fileno() if directory is not None else None
        return not stat.S_ISDIR(os.lstat(os.path.join(path, MANIFEST_NAME), dir_fd=descriptor).st_mode)
    except OSError:
        return False


def _directories(root: str, *, deep: bool = True) -> Iterator[tuple[str, list[str]]]:
    """Iterate over directories that are not checkpoints, each with the names of the directories in it.

    Below the root, directories that cannot be read are left out: others may keep what they like there.
    """
    pending = [root]
    while pending:
        path = pending.pop()
        try:
            names, links = _subdirectories(path)
        except FileNotFoundError:
            continue
        except OSError:
            if path == root:
                raise
            continue
        yield path, names + links
        # Links are reported and not entered: they may form a circle, and what they lead to has other owners.
        for name in names if deep else ():
            below = os.path.join(path, name)
            if _target(path, name) is None and not _has_manifest(below):
                pending.append(below)


def _subdirectories(path: str) -> tuple[list[str], list[str]]:
    """Return the names of the directories in a directory, and of the links to directories."""
    names: list[str] = []
    links: list[str] = []
    with os.scandir(path) as entries:
        for entry in entries:
            if _is_directory(entry):
                (links if entry.is_symlink() else names).append(entry.name)
    return names, links


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link that leads in a circle, or to where this process may not look.
        return False


def _new_path(target: str) -> str:
    """Return a path for a new pending checkpoint for a target."""
    return f"{_prefix(target)}{secrets.token_hex(_TOKEN_BYTES)}"


def _prefix(target: str) -> str:
    """Return what the paths of all pending checkpoints for a target start with, and nothing else does."""
    parent, name = os.path.split(target)
    longest = _LONGEST_NAME - len(f".{_INFIX}{_ASIDE}") - 2 * _TOKEN_BYTES
    if len(os.fsencode(name)) > longest:
        # A digest stands for the name. It differs from those of other long names.
        name = _SHORTENED + hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()
    return os.path.join(parent, f".{name}{_INFIX}")


def _target(parent: str, name: str) -> str | None:
    """Return the target that a directory is a pending checkpoint for, or None if it is none.

    For a shortened name, this is a path with nothing there: the real one is not known.
    """
    stem, infix, token = name.removesuffix(_ASIDE).rpartition(_INFIX)
    if not infix or stem[:1] != "." or len(stem) == 1 or len(token) != 2 * _TOKEN_BYTES:
        return None
    return os.path.join(parent, stem[1:])


def _siblings(target: str) -> Iterator[str]:
    """Iterate over the paths of pending checkpoints for a target, of all writers."""
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
    # Renaming a directory changes its ctime, so this is when it was moved aside.
    yield from sorted(found, key=_change_time, reverse=True)


def _change_time(path: str) -> int:
    try:
        return os.stat(path).st_ctime_ns
    except FileNotFoundError:
        return 0


def _clean_up(target: str) -> None:
    """Bring a checkpoint back that was moved aside and never replaced, and remove what dead writers have left."""
    # clean_up_below() does not know the target of a shortened name, so it must not bring anything back to that.
    if not os.path.lexists(target) and not os.path.basename(target).startswith(_SHORTENED):
        for path in _set_aside(target):
            try:
                move(path, target)
                break
            except (FileExistsError, FileNotFoundError):
                continue
    for path in _siblings(target):
        try:
            directory = open_directory(path, follow_link=False)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            # Gone, a link, or of another user, whose own saves clean it up.
            continue
        try:
            # Locked until it is gone, so that one of several clean-ups removes it. A checkpoint that was moved aside
            # stays while there is nothing at the target: readers read it.
            if try_lock_directory(directory) and (not path.endswith(_ASIDE) or os.path.lexists(target)):
                _log.info("removing %s, left behind by a save that did not end", path)
                remove(path)
        finally:
            directory.close()
