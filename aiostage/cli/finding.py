"""Finds what a path or a URL on the command line leads to: one checkpoint of any kind, or those below it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from anyio.to_thread import run_sync

from aiostage.abc import Storage
from aiostage.checkpoint.foreign import Read, recognize
from aiostage.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from aiostage.format.manifest import is_dcp_manifest
from aiostage.storage.local import LocalStorage
from aiostage.storage.locate import locate, sort_out, storage_at

__all__ = ["CheckpointRun", "Place", "find_checkpoints", "place_of"]


@dataclass(frozen=True)
class Place:
    """Where one checkpoint is.

    Attributes:
        source: Where it is, as the user wrote it.
        storage: The storage that has it.
        name: Its name there.
        is_dcp: Whether :mod:`aiostage.dcp` has written it.
        read: Reads it, if another program has written it.
    """

    source: str
    storage: Storage
    name: str
    is_dcp: bool = False
    read: Read | None = None


@dataclass(frozen=True)
class CheckpointRun:
    """Checkpoints below a path.

    Attributes:
        source: The path, as the user wrote it.
        storage: The storage that has them.
        names: Names of those that are there.
        removed: Names of those that were removed, and whose files are kept because others refer to them.
        foreign: For checkpoints of other programs, by name: a reader, or the error why there is none.
    """

    source: str
    storage: Storage
    names: Sequence[str]
    removed: Sequence[str] = ()
    foreign: Mapping[str, Read | CheckpointError] = field(default_factory=dict)

    async def place(self, name: str) -> Place:
        """Return the place of one of them.

        Raises:
            CheckpointNotFoundError: If it was removed meanwhile.
            CheckpointError: If it is known, and cannot be read here.
            OSError: If the storage refuses.
        """
        source, read = f"{self.source.rstrip('/')}/{name}", self.foreign.get(name)
        if isinstance(read, CheckpointError):
            raise read
        if read is not None:
            return Place(source, self.storage, name, read=read)
        return await place_of(source, self.storage, name)


async def find_checkpoints(source: str) -> Place | CheckpointRun:
    """Return the checkpoint at a path or a URL, of whatever kind, or those below it.

    Raises:
        CheckpointNotFoundError: If it is none, and there are none below it.
        CheckpointError: If it is known, and cannot be read here.
        OSError: If the storage refuses.
    """
    storage, name = locate(source)
    # Checkpoints of aiostage first, at the path and then below it: they are known by their manifest. Other programs'
    # files are recognized by their first bytes and their names, so a mistake is possible there.
    try:
        return await place_of(source, storage, name)
    except CheckpointNotFoundError:
        pass
    # Other programs' checkpoints are only read from local disks.
    path = os.path.join(storage.location, name) if isinstance(storage, LocalStorage) else None
    is_file = path is not None and await run_sync(os.path.isfile, path)
    if not is_file:
        root = storage_at(source)
        names, removed = sort_out(await root.list())
        if names or removed:
            return CheckpointRun(source, root, names, removed)
    read = await run_sync(recognize, path) if path is not None else None
    if read is not None:
        return Place(source, storage, name, read=read)
    if path is not None and not is_file and (foreign := await run_sync(_foreign_below, path)):
        return CheckpointRun(source, root, list(foreign), foreign=foreign)
    reason = "it is a file of no kind that is known here." if is_file else "there is no checkpoint, and none below it."
    raise CheckpointNotFoundError(reason, path=source)


def _foreign_below(path: str) -> dict[str, Read | CheckpointError]:
    """Return what reads the checkpoints of other programs right below a directory, in the order of their numbers."""
    found: dict[str, Read | CheckpointError] = {}
    for name in sorted(os.listdir(path) if os.path.isdir(path) else (), key=_by_number):
        below = os.path.join(path, name)
        try:
            read = recognize(below)
        except CheckpointError as error:
            # Files of all kinds may be beside checkpoints. A directory that is recognized is a checkpoint all the same,
            # for example one whose save did not end.
            if os.path.isdir(below) or isinstance(error, CheckpointCorruptError):
                found[name] = error
            continue
        if read is not None:
            found[name] = read
    return found


def _by_number(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts step-2 before step-10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


async def place_of(source: str, storage: Storage, name: str) -> Place:
    """Return the place of a checkpoint that one of aiostage's programs has written.

    Raises:
        CheckpointNotFoundError: If there is none.
        OSError: If the storage refuses.
    """
    reader = await storage.read(name)
    try:
        return Place(source, storage, name, is_dcp=is_dcp_manifest(await reader.manifest()))
    finally:
        await reader.aclose()
