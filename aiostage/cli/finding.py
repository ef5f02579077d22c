"""What a path or a URL stands for on the command line: a checkpoint, or those that lie below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aiostage.abc import Storage
from aiostage.checkpoint.resolving import exists
from aiostage.errors import CheckpointNotFoundError
from aiostage.format.steps import sort_out
from aiostage.storage.locate import locate, storage_at

__all__ = ["Found", "find"]


@dataclass(frozen=True)
class Found:
    """Checkpoints below a path.

    Attributes:
        storage: Where.
        names: Of those that are there.
        removed: Names of those that were removed, and lie there because others refer to them.
    """

    storage: Storage
    names: Sequence[str]
    removed: Sequence[str]


async def find(source: str) -> Found | None:
    """Return the checkpoints below a path or a URL; None if it is that of a checkpoint.

    Raises:
        CheckpointNotFoundError: If it is none, and there are none below it.
        OSError: If the storage refuses.
    """
    storage, name = locate(source)
    if await exists(storage, name):
        return None
    root = storage_at(source)
    names, removed = sort_out(await root.list())
    if not names and not removed:
        raise CheckpointNotFoundError("there is no checkpoint, and none below it.", path=source)
    return Found(root, names, removed)
