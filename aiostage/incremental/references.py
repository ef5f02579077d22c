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

_LOCK_FILE = "pin"
_LOCK_CONTENT = memoryview(b"A checkpoint that refers to this one is being written.\n")


@asynccontextmanager
async def locked(storage: Storage, name: str) -> AsyncGenerator[None, None]:
    """Keep a checkpoint, and what it refers to, from being removed.

    The lock is a pending checkpoint that is never committed, under a name that tells what it locks. So a storage knows
    of it what it
    knows of every pending checkpoint: whether its writer lives, and what to do if not.

    Args:
        storage: Where it is.
        name: What it is called. It may have been removed before; look for it inside the block.

    Raises:
        OSError: If the storage refuses.

    When cancelled, nothing is left behind.
    """
    pending = await storage.open(lock_of(name))
    try:
        async with aclosing(_lock_parts()) as parts:
            await pending.write(_LOCK_FILE, len(_LOCK_CONTENT), parts)
        yield
    except BaseException as error:
        await give_up(pending.abort(), error)
        raise
    await pending.abort()


async def is_kept(storage: Storage, name: str) -> bool:
    """Return whether a checkpoint stays, which was locked and to which another one refers that is committed.

    Raises:
        OSError: If the storage refuses.
    """
    # In this order: a removal ends with the tombstone, and one that begins after this look sees the other checkpoint.
    going = await exists(storage, tombstone_of(name))
    if not await exists(storage, name):
        return False
    # A removal that finds the lock, now or before, leaves the checkpoint.
    return not going or name in locked_by(await storage.pending())


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
        # Of each checkpoint which files of which others it refers to; None if nothing ever refers to it, nor it to
        # others. Checkpoints do not change, so each is read once.
        self._needs: dict[str, Mapping[str, frozenset[str]] | None] = {}
        # Which files are left of those that were removed, so that each is asked for once.
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
            # A save may have been about to before it was damaged.
            return True

    async def needed(self, names: Collection[str]) -> dict[str, frozenset[str]]:
        """Return the files that checkpoints refer to, by the names of the checkpoints that have them.

        Raises:
            CheckpointCorruptError: If one is damaged.
            OSError: If the storage refuses.
        """
        # What is not listed any more may come again as another checkpoint of the same name.
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
        # Before anything is changed, because it may fail.
        await self.needed(present(names) - set(going))
        for name in sorted(set(going).difference(referred)):
            await self._storage.delete(name)
        # All tombstones before any of their files goes: from here on no reader and no writer begins with one of them.
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
        # In this order: a writer that has removed its lock has committed what refers to the checkpoint.
        in_use = locked_by(await self._storage.pending())
        names = await self._names()
        # Those that others have removed since may have been locked in between.
        removed = {name for name in removed if tombstone_of(name) in names and name not in in_use}
        needed = await self.needed({name for name in names if step_of(name) is not None} - removed)
        for name in sorted(removed):
            files = needed.get(name)
            if files is None:
                await self._storage.delete(name)
                # After the checkpoint: a process that dies in between leaves a tombstone without one, which the next
                # removal takes away.
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
