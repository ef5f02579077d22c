"""The checkpoints of a run in their storage: which there are, and how one goes of which others still need parts.

Such a checkpoint is removed in two steps. A mark is put beside it, a tiny checkpoint of its own, and from then on it is
not there for anybody who asks for steps. It goes when no checkpoint that is left refers to it.

Several processes may do this at once. Whoever removes first marks, then looks who refers; whoever refers first commits,
then looks whether what it was compared with is still there unmarked. Whichever order that happens in, one of the two
sees the other.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable

from aiostage.abc import Storage
from aiostage.checkpoint.incremental import Base
from aiostage.checkpoint.resolving import placement_of
from aiostage.checkpoint.retention import mark_of, name_of, removed_of, step_of
from aiostage.checkpoint.save import write_checkpoint
from aiostage.errors import CheckpointCorruptError, CheckpointNotFoundError

__all__ = ["Shelf"]

_log = logging.getLogger("aiostage")


class Shelf:
    """What there is of a run.

    Args:
        storage: Where.
        marking: Whether removed checkpoints are marked even if nobody refers to any, because somebody may be about to.
    """

    def __init__(self, storage: Storage, *, marking: bool) -> None:
        self._storage = storage
        self._marking = marking
        # Checkpoints do not change, so that each is asked once.
        self._sources: dict[str, frozenset[str]] = {}

    async def steps(self) -> list[int]:
        """Return the steps of all checkpoints that are there, in ascending order.

        Raises:
            OSError: If the storage refuses.
        """
        return sorted(step for name in _there(await self._storage.list()) if (step := step_of(name)) is not None)

    async def has(self, name: str) -> bool:
        """Return whether a checkpoint is there.

        Raises:
            OSError: If the storage refuses.
        """
        return name in _there(await self._storage.list())

    def add(self, base: Base) -> None:
        """Say what a new checkpoint refers to."""
        self._sources[base.name] = base.placement.sources

    async def base(self, last: Base | None) -> Base | None:
        """Return what to compare a new checkpoint with.

        Args:
            last: The one that was saved last; taken if it is still there.

        Returns:
            The last, or else the latest that is there; None if that was not saved incrementally.

        Raises:
            OSError: If the storage refuses.
        """
        there = _there(await self._storage.list())
        if last is not None and last.name in there:
            return last
        latest = max((step for name in there if (step := step_of(name)) is not None), default=None)
        if latest is None:
            return None
        name = name_of(latest)
        try:
            placement = await placement_of(self._storage, name)
        except (CheckpointNotFoundError, CheckpointCorruptError) as error:
            _log.warning("nothing can be compared with the checkpoint %s: %s", name, error)
            return None
        return Base(name, placement) if placement is not None else None

    async def remove(self, steps: Iterable[int] = ()) -> None:
        """Remove checkpoints, and those that were removed before and are not needed any more.

        Args:
            steps: Of which ones. One that is not there is no error.

        Raises:
            CheckpointCorruptError: If one that stays is damaged, so that nobody knows what it needs; nothing is gone.
            OSError: If the storage refuses.

        When cancelled, each is there as a whole, or not there for anybody who asks.
        """
        names = await self._storage.list()
        going = {name_of(step) for step in steps} & _there(names)
        marked = any(removed_of(name) for name in names)
        if not going and not marked:
            return
        if not (self._marking or marked or await self._needed(_there(names) - going)):
            for name in sorted(going):
                await self._storage.delete(name)
            return
        for name in sorted(going):
            await write_checkpoint({"removed": name}, (self._storage, mark_of(name)), overwrite=True)
        # Again, for somebody may have committed before it saw the marks.
        names = await self._storage.list()
        needed = await self._needed(_there(names))
        for mark in sorted(names):
            removed = removed_of(mark)
            if removed is not None and removed not in needed:
                await self._storage.delete(removed)
                await self._storage.delete(mark)

    async def _needed(self, names: Collection[str]) -> set[str]:
        """Return what checkpoints refer to."""
        self._sources = {name: sources for name, sources in self._sources.items() if name in names}
        needed: set[str] = set()
        for name in names:
            if name not in self._sources:
                try:
                    placement = await placement_of(self._storage, name)
                except CheckpointNotFoundError:
                    # Somebody else has removed it.
                    continue
                self._sources[name] = placement.sources if placement is not None else frozenset()
            needed |= self._sources[name]
        return needed


def _there(names: Iterable[str]) -> set[str]:
    """Return those of a run's checkpoints that were not removed."""
    names = set(names)
    return {name for name in names if step_of(name) is not None and mark_of(name) not in names}
