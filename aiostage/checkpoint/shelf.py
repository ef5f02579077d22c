"""The checkpoints of a run in their storage, and how one is removed while others still need its files.

Such a removal has steps, and a process may die after each. First a mark is written beside the checkpoint, a tiny
checkpoint of its own. From then on readers that ask for steps do not find the checkpoint. Then the files are removed
that no remaining checkpoint refers to. Once those are all, the checkpoint is removed, and the mark last. A process that
finds a mark continues where another has stopped.

Several processes may do this at once, beside others that write and that may die at any moment. A writer that will refer
to a checkpoint first pins it, and then checks that it exists unmarked; if not, it chooses another. A process that
removes a checkpoint first marks it, and then looks for pins. If there is one, the checkpoint is left for later, with
all that it refers to. In either order one of the two sees the other. The pin is removed after the commit of the
checkpoint that it was made for, so a process that reads first the pins and then the checkpoints finds one of the two.
The pin of a dead writer is removed like all drafts of the dead, and that writer can commit nothing afterwards.

All this holds if a listing shows what was there throughout it. (What refers to a file could still be missed if during
one listing another checkpoint came to refer to it too and the first was removed, with a name that had been passed.
Stores list by name, and later steps have later names.)
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping

from aiostage.abc import Storage
from aiostage.checkpoint.incremental import Base
from aiostage.checkpoint.resolving import exists, is_removed, placement_of
from aiostage.checkpoint.save import write_checkpoint
from aiostage.errors import CheckpointCorruptError, CheckpointExistsError, CheckpointNotFoundError
from aiostage.format.placement import Placement
from aiostage.format.steps import mark_of, name_of, pinned_by, removed_of, step_of

__all__ = ["Shelf"]

_log = logging.getLogger("aiostage")


class Shelf:
    """What there is of a run.

    Args:
        storage: Where.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        # Of each checkpoint which files of which others it refers to; None if nothing ever refers to it, nor it to
        # others. Checkpoints do not change, so each is read once.
        self._needs: dict[str, Mapping[str, frozenset[str]] | None] = {}
        # What was there at the beginning, or has been added since.
        self._known: set[str] = set()
        # Which files are left of those that were removed, so that each is asked for once.
        self._left: dict[str, frozenset[str]] = {}

    async def steps(self) -> list[int]:
        """Return the steps of all checkpoints that are there, in ascending order.

        Raises:
            OSError: If the storage refuses.
        """
        return sorted(step for name in _there(await self._storage.list_level()) if (step := step_of(name)) is not None)

    async def begin(self) -> None:
        """Look which there are, and finish what others have begun to remove. Raises as :meth:`remove`."""
        self._known = set(await self._storage.list_level())
        await self.remove()

    async def refuse(self, name: str, *, replace: bool = False) -> bool:
        """Refuse to save a checkpoint that was there at the beginning, or was added since.

        Args:
            name: What it is called.
            replace: Whether it may be replaced, unless others may need it.

        Returns:
            Whether one is there, to be replaced. What replaces it must not be incremental either: other processes
            remember of a checkpoint that none refers to it.

        Raises:
            CheckpointExistsError: If it is still there, and may not be replaced.
            OSError: If the storage refuses.
        """
        if not (replace or name in self._known) or not await exists(self._storage, name):
            return False
        path = f"{self._storage.location}/{name}"
        if await exists(self._storage, mark_of(name)):
            raise CheckpointExistsError(
                "it was removed, but others still refer to its files.", path=path, remedy="Save another step."
            )
        if not replace:
            raise CheckpointExistsError(
                "there is already a checkpoint of this step.",
                path=path,
                remedy="Pass replace=True, save another step, or delete() it first.",
            )
        if await self._storage.is_link(name):
            raise CheckpointExistsError(
                "it is a link to a checkpoint, which may be another run's and is not replaced.",
                path=path,
                remedy="delete() the step first, which removes the link only, or save another step.",
            )
        if await self._is_referred_to(name):
            raise CheckpointExistsError(
                "it was saved incrementally, so that others may refer to its files; it is not replaced.",
                path=path,
                remedy="delete() it and the later ones first, or save another step.",
            )
        return True

    async def _is_referred_to(self, name: str) -> bool:
        """Return whether another may refer to a checkpoint, now or while it is replaced."""
        try:
            return await placement_of(self._storage, name) is not None
        except CheckpointNotFoundError:
            return False
        except CheckpointCorruptError:
            # No save begins to refer to it any more.
            return name in await self._needed(_there(await self._storage.list_level()) - {name})

    def add(self, name: str, placement: Placement | None) -> None:
        """Say that a new checkpoint is there.

        Args:
            name: What it is called.
            placement: Where its files lie; None if it was not saved incrementally.
        """
        self._known.add(name)
        self._needs[name] = placement.needs() if placement is not None else None

    async def last(self, saved: str | None) -> str | None:
        """Return which checkpoint to compare a new one with; None if there is none.

        Args:
            saved: The one that was saved last; taken if it is there.

        Raises:
            OSError: If the storage refuses.
        """
        there = _there(await self._storage.list_level())
        if saved in there:
            return saved
        latest = max((step for name in there if (step := step_of(name)) is not None), default=None)
        return name_of(latest) if latest is not None else None

    async def base(self, name: str) -> Base | None:
        """Return a checkpoint to compare a new one with, which has to be pinned.

        Returns:
            The checkpoint; None if it was not saved incrementally, or is damaged.

        Raises:
            CheckpointNotFoundError: If it is not there, or no longer.
            OSError: If the storage refuses.
        """
        if await is_removed(self._storage, name):
            raise CheckpointNotFoundError("it was removed.", path=f"{self._storage.location}/{name}")
        try:
            placement = await placement_of(self._storage, name)
        except CheckpointCorruptError as error:
            _log.warning("nothing can be compared with the checkpoint %s: %s", name, error)
            return None
        return Base(name, placement) if placement is not None else None

    async def remove(self, steps: Iterable[int] = ()) -> None:
        """Remove checkpoints, and what is not needed any more of those that were removed before.

        Args:
            steps: Of which ones. One that is not there is no error.

        Raises:
            CheckpointCorruptError: If one that stays is damaged, so that its needs are unknown; nothing is removed.
            OSError: If the storage refuses.

        When cancelled, each is there as a whole, or not there for any reader.
        """
        names = await self._storage.list_level()
        asked = {name_of(step) for step in steps}
        going = asked & _there(names)
        for unlisted in sorted(asked.difference(names)):
            # Some storages read a linked checkpoint and do not list it.
            if await self._storage.is_link(unlisted):
                await self._storage.delete(unlisted)
        referred = {name for name in going if await self._may_be_referred_to(name)}
        marked = referred | {name for mark in names if (name := removed_of(mark)) is not None}
        if marked:
            # Before anything is changed, because it may fail.
            await self._needed(_there(names) - going)
        for name in sorted(going - referred):
            await self._storage.delete(name)
        for name in sorted(referred):
            await write_checkpoint({"removed": name}, (self._storage, mark_of(name)), overwrite=True)
        if marked:
            await self._clear(marked)

    async def _clear(self, marked: Collection[str]) -> None:
        """Remove files that are not needed any more of checkpoints that were removed.

        Args:
            marked: Those that had their marks before this was called.
        """
        # In this order: a writer that has removed its pin has committed what refers to the checkpoint.
        pinned = pinned_by(await self._storage.drafts())
        names = await self._names()
        # Those that others have marked since may have been pinned in between.
        removed = {name for name in marked if mark_of(name) in names and name not in pinned}
        needed = await self._needed({name for name in names if step_of(name) is not None} - removed)
        for name in sorted(removed):
            files = needed.get(name)
            if files is None:
                await self._storage.delete(name)
                await self._storage.delete(mark_of(name))
            elif self._left.get(name) != files:
                await self._storage.trim(name, files)
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

    async def _may_be_referred_to(self, name: str) -> bool:
        try:
            return await self._needs_of(name) is not None
        except CheckpointNotFoundError:
            return False
        except CheckpointCorruptError:
            # Somebody may have been about to before it was damaged.
            return True

    async def _needs_of(self, name: str) -> Mapping[str, frozenset[str]] | None:
        if name not in self._needs:
            placement = await placement_of(self._storage, name)
            self._needs[name] = placement.needs() if placement is not None else None
        return self._needs[name]

    async def _needed(self, names: Collection[str]) -> dict[str, frozenset[str]]:
        """Return the files that checkpoints refer to, by the names of the checkpoints that have them."""
        self._needs = {name: needs for name, needs in self._needs.items() if name in names}
        needed: dict[str, frozenset[str]] = {}
        for name in names:
            try:
                needs = await self._needs_of(name)
            except CheckpointNotFoundError:
                # Somebody else has removed it.
                continue
            for source, files in (needs or {}).items():
                needed[source] = needed.get(source, frozenset()) | files
        return needed


def _there(names: Iterable[str]) -> set[str]:
    """Return those of a run's checkpoints that were not removed."""
    names = set(names)
    return {name for name in names if step_of(name) is not None and mark_of(name) not in names}
