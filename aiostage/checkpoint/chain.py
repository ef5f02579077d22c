"""The checkpoints of a run that refer to one another: each new one to where the bytes of the last one lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from functools import partial

import anyio

from aiostage._loop.cleanup import finish
from aiostage.abc import Storage
from aiostage.checkpoint.incremental import Base, IncrementalStorage
from aiostage.checkpoint.info import CheckpointInfo
from aiostage.checkpoint.shelf import Shelf
from aiostage.errors import CheckpointError
from aiostage.storage.locate import Target

__all__ = ["Chain"]


class Chain:
    """Writes checkpoints incrementally.

    Args:
        storage: Where to.
        shelf: What there is.
        removing: Held while checkpoints are removed, so that none is chosen to be compared with at that moment.
    """

    def __init__(self, storage: Storage, shelf: Shelf, removing: anyio.Lock) -> None:
        self._storage = storage
        self._shelf = shelf
        self._removing = removing
        self._last: Base | None = None
        self._in_use: Counter[str] = Counter()

    @property
    def in_use(self) -> Collection[str]:
        """The checkpoints that saves under way are compared with, which must not be removed."""
        return +self._in_use

    async def write(self, name: str, write: Callable[[Target], Awaitable[CheckpointInfo]]) -> CheckpointInfo:
        """Write a checkpoint.

        Args:
            name: What it is called.
            write: Writes it to a target, all of it.

        Returns:
            What was saved.

        Raises:
            CheckpointError: If somebody has removed what it refers to meanwhile; nothing of it is left.
            Exception: Whatever ``write`` raises.

        When cancelled, either it was committed, or nothing of it is left.
        """
        async with self._removing:
            base = await self._shelf.base(self._last)
            if base is not None:
                self._in_use[base.name] += 1
        try:
            storage = IncrementalStorage(self._storage, base, partial(self._check, name, base))
            info = await write((storage, name))
            if base is not None:
                # Also when cancelled: nobody would look again.
                await finish(partial(self._confirm, name, base))
        finally:
            if base is not None:
                self._in_use[base.name] -= 1
        if storage.placement is not None:
            info = replace(info, written_bytes=storage.written_bytes)
            self._last = Base(name, storage.placement)
            self._shelf.add(name, storage.placement)
        return info

    async def _check(self, name: str, base: Base | None) -> None:
        """Refuse to commit what refers to what is not there any more."""
        if base is not None and not await self._shelf.has(base.name):
            raise _gone(name, base)

    async def _confirm(self, name: str, base: Base) -> None:
        """Look once more, for whoever removes may have looked before the commit."""
        if not await self._shelf.has(base.name):
            await self._storage.delete(name)
            raise _gone(name, base)


def _gone(name: str, base: Base) -> CheckpointError:
    return CheckpointError(
        f"{base.name}, to which it referred, was removed meanwhile.", path=name, remedy="Save it again."
    )
