"""What a path or a URL stands for on the command line: a checkpoint of some kind, or those that lie below it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from anyio.to_thread import run_sync

from aiostage.abc import Storage
from aiostage.checkpoint.foreign import Read, recognize
from aiostage.errors import CheckpointNotFoundError
from aiostage.format.manifest import is_dcp_manifest
from aiostage.format.steps import sort_out
from aiostage.storage.local import LocalStorage
from aiostage.storage.locate import locate, storage_at

__all__ = ["Place", "Run", "find", "place_of"]


@dataclass(frozen=True)
class Place:
    """Where one checkpoint is.

    Attributes:
        source: As the user wrote it.
        storage: Which one.
        name: Its name there.
        is_dcp: Whether :mod:`aiostage.dcp` has written it.
        read: What reads it if another program has written it.
    """

    source: str
    storage: Storage
    name: str
    is_dcp: bool = False
    read: Read | None = None


@dataclass(frozen=True)
class Run:
    """Checkpoints below a path.

    Attributes:
        source: As the user wrote it.
        storage: Where.
        names: Of those that are there.
        removed: Names of those that were removed, and lie there because others refer to them.
    """

    source: str
    storage: Storage
    names: Sequence[str]
    removed: Sequence[str]


async def find(source: str) -> Place | Run:
    """Return the checkpoint at a path or a URL, of whatever kind, or those below it.

    Raises:
        CheckpointNotFoundError: If it is none, and there are none below it.
        CheckpointError: If it is known, and cannot be read here.
        OSError: If the storage refuses.
    """
    storage, name = locate(source)
    try:
        return await place_of(source, storage, name)
    except CheckpointNotFoundError:
        pass
    path = os.path.join(storage.location, name) if isinstance(storage, LocalStorage) else None
    is_file = path is not None and await run_sync(os.path.isfile, path)
    if not is_file:
        root = storage_at(source)
        names, removed = sort_out(await root.list())
        if names or removed:
            return Run(source, root, names, removed)
    read = await run_sync(recognize, path) if path is not None else None
    if read is not None:
        return Place(source, storage, name, read=read)
    reason = "it is a file of no kind that is known here." if is_file else "there is no checkpoint, and none below it."
    raise CheckpointNotFoundError(reason, path=source)


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
