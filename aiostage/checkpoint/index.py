"""Which checkpoints of a run there are in its storage, which may be saved, and how one is removed.

The storage decides, since other processes may save and remove too. What is noted here only saves requests, or makes a
refusal come earlier.
"""

from __future__ import annotations

from collections.abc import Iterable

from aiostage.abc import Storage
from aiostage.checkpoint.save import write_checkpoint
from aiostage.errors import CheckpointCorruptError, CheckpointExistsError, CheckpointNotFoundError
from aiostage.format.placement import Placement
from aiostage.incremental.references import References, placement_of
from aiostage.storage.locate import exists, name_of, present, removed_by_tombstone, step_of, tombstone_of

__all__ = ["CheckpointIndex"]


class CheckpointIndex:
    """What there is of a run.

    Args:
        storage: Where.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._references = References(storage, self._write_tombstone)
        # Names that were there at the beginning, or were added since. For any other name the storage refuses in open().
        self._known: set[str] = set()

    async def steps(self) -> list[int]:
        """Return the steps of all checkpoints that are there, in ascending order.

        Raises:
            OSError: If the storage refuses.
        """
        names = present(await self._storage.list_level())
        return sorted(step for name in names if (step := step_of(name)) is not None)

    async def open(self) -> None:
        """Look which there are, and finish what others have begun to remove. Raises as :meth:`remove`."""
        self._known = set(await self._storage.list_level())
        await self.remove()

    def add(self, name: str, placement: Placement | None) -> None:
        """Say that a new checkpoint is there.

        Args:
            name: What it is called.
            placement: Where its files lie; None if it was not saved incrementally.
        """
        self._known.add(name)
        self._references.add(name, placement)

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
        # A known name is asked for again, because another process may have deleted it.
        if not (replace or name in self._known) or not await exists(self._storage, name):
            return False
        path = f"{self._storage.location}/{name}"
        if await exists(self._storage, tombstone_of(name)):
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
            # No save can begin to refer to it any more, so the checkpoints that exist say all.
            return name in await self._references.needed(present(await self._storage.list_level()) - {name})

    async def remove(self, steps: Iterable[int] = ()) -> None:
        """Remove checkpoints, and what is not needed any more of those that were removed before.

        Args:
            steps: The steps whose checkpoints to remove. A missing one is not an error.

        Raises:
            CheckpointCorruptError: If one that stays is damaged, so that its needs are unknown; nothing is removed.
            OSError: If the storage refuses.

        When cancelled, each is there as a whole, or not there for any reader.
        """
        names = await self._storage.list_level()
        asked = {name_of(step) for step in steps}
        going = asked & present(names)
        for unlisted in sorted(asked.difference(names)):
            # Some storages read a checkpoint that is a link, and do not list it.
            if await self._storage.is_link(unlisted):
                await self._storage.delete(unlisted)
        referred = {name for name in going if await self._references.may_be_referred_to(name)}
        # Runs without incremental checkpoints need no tombstones: one request for each, as before there were any.
        if referred or any(removed_by_tombstone(name) is not None for name in names):
            await self._references.remove(names, going, referred)
            return
        for name in sorted(going):
            await self._storage.delete(name)

    async def _write_tombstone(self, name: str) -> None:
        await write_checkpoint({"removed": name}, (self._storage, tombstone_of(name)), overwrite=True)
