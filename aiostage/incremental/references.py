"""How a checkpoint is removed while others refer to its files, or are about to.

Such a removal has steps, and a process may die after each. First a tombstone is written beside the checkpoint, a tiny
checkpoint of its own. From then on readers that ask for steps do not find the checkpoint. Then the files are removed
that no remaining checkpoint refers to. Once those are all, the checkpoint is removed, and the tombstone last. A process
that finds a tombstone continues where another has stopped.

Several processes may do this at once, beside others that write and that may die at any moment. A writer that will refer
to a checkpoint first locks it, and then checks that it exists without a tombstone; if not, it chooses another. A
process that removes a checkpoint first writes the tombstone, and then looks for locks. If there is one, the checkpoint
is left for later, with all that it refers to. In either order one of the two sees the other. The lock is removed after
the commit of the checkpoint that it was made for, so a process that reads first the locks and then the checkpoints
finds one of the two. The lock of a dead writer is removed like all pending checkpoints of the dead. One that was only
suspended may have lost its lock and not the checkpoint that it writes, which was written to later. So a writer looks
after its commit whether what it refers to is still kept, and removes what it has committed if not.

All this holds if a listing shows what was there throughout it. (What refers to a file could still be missed if during
one listing another checkpoint came to refer to it too and the first was removed, with a name that had been passed.
Stores list by name, and later steps have later names.)
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from contextlib import aclosing, asynccontextmanager
from functools import partial

from aiostage._loop.coroutines import give_up
from aiostage._loop.workers import Workers
from aiostage.abc import Buffer, Reader, Storage
from aiostage.errors import CheckpointCorruptError, CheckpointNotFoundError
from aiostage.format.manifest import read_placement
from aiostage.format.placement import Placement
from aiostage.storage.commit import MANIFEST_NAME
from aiostage.storage.locate import exists, lock_of, locked_by, present, removed_by_tombstone, step_of, tombstone_of

__all__ = ["References", "is_kept", "locked", "placement_in", "placement_of"]

# The name of the file is part of what lies in storages; other versions of aiostage may write and remove it too.
_LOCK_FILE = "pin"
_LOCK_CONTENT = memoryview(b"A checkpoint that refers to this one is being written.\n")


@asynccontextmanager
async def locked(storage: Storage, name: str) -> AsyncGenerator[str, None]:
    """Keep a checkpoint, and what it refers to, from being removed.

    The lock is a pending checkpoint that is never committed, under a name that tells what it locks. So a storage treats
    it as every pending checkpoint: it has a heartbeat, and is removed when its writer has died.

    Args:
        storage: Where it is.
        name: What it is called. It may have been removed before; look for it inside the block.

    Yields:
        The name of the lock, for :func:`is_kept`.

    Raises:
        OSError: If the storage refuses.

    When cancelled, nothing is left behind.
    """
    lock = lock_of(name)
    pending = await storage.open(lock)
    try:
        # With a file, because a storage need not show a pending checkpoint that has none.
        async with aclosing(_lock_parts()) as parts:
            await pending.write(_LOCK_FILE, len(_LOCK_CONTENT), parts)
        yield lock
    except BaseException as error:
        await give_up(pending.abort(), error)
        raise
    await pending.abort()


async def is_kept(storage: Storage, name: str, lock: str) -> bool:
    """Return whether a checkpoint stays that was locked, once another one that refers to it is committed.

    Args:
        storage: Where it is.
        name: What it is called.
        lock: The lock that was taken before the other one was begun.

    Raises:
        OSError: If the storage refuses.
    """
    # The tombstone first. A removal deletes it last, so if there is none and the checkpoint exists, no removal was
    # under way at this look; and one that begins later finds the committed checkpoint that refers to this one.
    going = await exists(storage, tombstone_of(name))
    if not await exists(storage, name):
        return False
    # A removal that is under way leaves the checkpoint if it has found this lock. If it is still there, it was there
    # whenever the removal can have looked. A lock of another writer may have come after that.
    return not going or lock in await storage.pending()


async def _lock_parts() -> AsyncGenerator[Buffer, None]:
    yield _LOCK_CONTENT


class References:
    """Which checkpoints of a run refer to which files of others.

    Args:
        storage: Where they are.
        write_tombstone: Writes the tombstone of a checkpoint.
    """

    def __init__(self, storage: Storage, write_tombstone: Callable[[str], Awaitable[object]]) -> None:
        self._storage = storage
        self._write_tombstone = write_tombstone
        # By checkpoint, the files of others that it refers to; None if it was not saved incrementally, so that no
        # checkpoint ever refers to it. Checkpoints do not change, so each manifest is read once.
        self._needs: dict[str, Mapping[str, frozenset[str]] | None] = {}
        # By removed checkpoint, the files that were kept by the last removal, so that the same are not pruned again.
        self._left: dict[str, frozenset[str]] = {}

    def add(self, name: str, placement: Placement | None) -> None:
        """Say where the files of a new checkpoint lie; None if it was not saved incrementally."""
        self._needs[name] = placement.needs() if placement is not None else None

    async def may_be_referred_to(self, name: str) -> bool:
        """Return whether another may refer to a checkpoint, now or later.

        Raises:
            OSError: If the storage refuses.
        """
        try:
            return await self._needs_of(name) is not None
        except CheckpointNotFoundError:
            return False
        except CheckpointCorruptError:
            # Another checkpoint may have come to refer to it before it was damaged.
            return True

    async def needed(self, names: Collection[str]) -> dict[str, frozenset[str]]:
        """Return the files that checkpoints refer to, by the names of the checkpoints that have them.

        Raises:
            CheckpointCorruptError: If one is damaged.
            OSError: If the storage refuses.
        """
        # Names that are no longer listed are forgotten: another checkpoint of the same name may be saved later.
        self._needs = {name: needs for name, needs in self._needs.items() if name in names}
        needed: dict[str, frozenset[str]] = {}
        for name in names:
            try:
                needs = await self._needs_of(name)
            except CheckpointNotFoundError:
                # Another process has removed it.
                continue
            for source, files in (needs or {}).items():
                needed[source] = needed.get(source, frozenset()) | files
        return needed

    async def remove(self, names: Collection[str], going: Collection[str], referred: Collection[str]) -> None:
        """Remove checkpoints, and what is not needed any more of those that were removed before.

        Args:
            names: What the storage lists.
            going: Which ones to remove.
            referred: Those of them that others may refer to.

        Raises:
            CheckpointCorruptError: If one that stays is damaged, so that its needs are unknown; nothing is removed.
            OSError: If the storage refuses.

        When cancelled, each is there as a whole, or not there for any reader.
        """
        # Before anything is changed: if a checkpoint that stays is damaged, the files that it needs are unknown.
        await self.needed(present(names) - set(going))
        for name in sorted(set(going).difference(referred)):
            await self._storage.delete(name)
        # All tombstones before any file: from here on no reader and no writer begins to use one of these checkpoints. A
        # crash here leaves tombstones beside complete checkpoints, and the next removal goes on with them.
        for name in sorted(referred):
            await self._write_tombstone(name)
        await self._clear(
            {*referred, *(removed for name in names if (removed := removed_by_tombstone(name)) is not None)}
        )

    async def _clear(self, removed: Collection[str]) -> None:
        """Remove files that are not needed any more of checkpoints that were removed.

        Args:
            removed: Those that had their tombstones before this was called.
        """
        # Locks first, then checkpoints: a writer removes its lock after the commit, so one of the two shows what it
        # refers to. In the other order, a writer could commit and remove the lock between the two looks, and neither
        # would show it.
        in_use = locked_by(await self._storage.pending())
        names = await self._names()
        # Without its tombstone, a checkpoint was removed by another process since, and may be a new one of that name.
        removed = {name for name in removed if tombstone_of(name) in names and name not in in_use}
        needed = await self.needed({name for name in names if step_of(name) is not None} - removed)
        for name in sorted(removed):
            files = needed.get(name)
            if files is None:
                await self._storage.delete(name)
                # After the checkpoint. A crash in between leaves a tombstone alone, which the next removal deletes. The
                # other order would leave a checkpoint without some of its files that looks like a complete one.
                await self._storage.delete(tombstone_of(name))
            elif self._left.get(name) != files:
                await self._storage.prune_files(name, files)
                self._left[name] = files
        self._left = {name: files for name, files in self._left.items() if name in needed}

    async def _names(self) -> set[str]:
        """Return all that was there at one moment.

        A listing takes a while, and need not show what comes or goes meanwhile. Two that are alike show what was there
        between them.
        """
        # A name that was deleted and written again between the two listings is seen as one that stayed. That is
        # harmless here: names of steps are not used again while a removal is under way.
        names, before = set(await self._storage.list_level()), None
        while names != before:
            names, before = set(await self._storage.list_level()), names
        return names

    async def _needs_of(self, name: str) -> Mapping[str, frozenset[str]] | None:
        if name not in self._needs:
            self.add(name, await placement_of(self._storage, name))
        return self._needs[name]


async def placement_of(storage: Storage, name: str) -> Placement | None:
    """Return where the files of a checkpoint lie; None if each lies as a whole in the checkpoint.

    Raises:
        CheckpointNotFoundError: If there is no checkpoint.
        CheckpointCorruptError: If its manifest is damaged.
        OSError: If the storage refuses.
    """
    reader = await storage.read(name)
    try:
        return await _placement(reader.location, await reader.manifest())
    finally:
        await reader.aclose()


async def placement_in(reader: Reader) -> Placement | None:
    """Return where the files of an open checkpoint lie, as :func:`placement_of` does."""
    return await _placement(reader.location, await reader.manifest())


async def _placement(location: str, manifest: Buffer) -> Placement | None:
    workers = Workers(1, "aiostage-load")
    try:
        return await workers.run(partial(read_placement, manifest, path=f"{location}/{MANIFEST_NAME}"))
    finally:
        workers.stop()
