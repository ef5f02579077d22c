"""The checkpoints of a run that refer to one another: each new one to where the bytes of the last one lie."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

from aiostage.abc import Storage
from aiostage.checkpoint.incremental import Base, IncrementalStorage
from aiostage.checkpoint.pin import pinned
from aiostage.checkpoint.shelf import Shelf
from aiostage.checkpoint.writer import CheckpointInfo
from aiostage.errors import CheckpointNotFoundError
from aiostage.storage.locate import Target

__all__ = ["Chain"]

_ATTEMPTS = 10
"""How many that others remove, just when they were chosen, are given up before everything is written."""


class Chain:
    """Writes checkpoints incrementally.

    Args:
        storage: Where to.
        shelf: What there is.
    """

    def __init__(self, storage: Storage, shelf: Shelf) -> None:
        self._storage = storage
        self._shelf = shelf
        self._last: str | None = None

    async def write(self, name: str, write: Callable[[Target], Awaitable[CheckpointInfo]]) -> CheckpointInfo:
        """Write a checkpoint.

        Args:
            name: What it is called.
            write: Writes it to a target, all of it.

        Returns:
            What was saved.

        Raises:
            Exception: Whatever ``write`` raises.
            OSError: If the storage refuses.

        When cancelled, either it was committed, or nothing of it is left.
        """
        async with self._base() as base:
            storage = IncrementalStorage(self._storage, base)
            info = await write((storage, name))
        if storage.placement is not None:
            info = replace(info, written_bytes=storage.written_bytes)
            self._last = name
            self._shelf.add(name, storage.placement)
        return info

    @asynccontextmanager
    async def _base(self) -> AsyncGenerator[Base | None, None]:
        """Choose what to compare a checkpoint with, and keep it from being removed before that is committed."""
        for _ in range(_ATTEMPTS):
            name = await self._shelf.last(self._last)
            if name is None:
                break
            async with pinned(self._storage, name):
                try:
                    # Not before it is pinned: it may just be going, or be another of the same name.
                    base = await self._shelf.base(name)
                except CheckpointNotFoundError:
                    continue
                yield base
                return
        yield None
