"""A committed checkpoint that is being read, and what tells one that was deleted from one that is damaged."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from aiostage._loop.workers import Workers
from aiostage.abc import Buffer, Reader, Storage
from aiostage.errors import CheckpointCorruptError, CheckpointNotFoundError
from aiostage.format.manifest import Manifest, read_manifest
from aiostage.format.placement import Placement
from aiostage.format.steps import removed_by_tombstone
from aiostage.incremental.reading import ReferencingReader, is_removed, placement_in
from aiostage.storage.commit import MANIFEST_NAME
from aiostage.storage.local import LocalReader

__all__ = ["OpenCheckpoint", "open_checkpoint"]

_REMOVED = "it was removed; what is left of it lies there for others that refer to it."


class OpenCheckpoint(Reader):
    """A reader of a checkpoint, which may refer to other checkpoints of the same storage.

    Args:
        storage: Where they are.
        name: Of the checkpoint.
        reader: Of the checkpoint; closed with this.
        refuses_removed: Whether one that was removed, and lies there for others, is not to be found.
    """

    def __init__(self, storage: Storage, name: str, reader: Reader, *, refuses_removed: bool = True) -> None:
        self._storage = storage
        self._name = name
        self._reader = reader
        self._refuses_removed = refuses_removed
        self._placement: Placement | None = None
        self._is_known = False

    @property
    def location(self) -> str:
        """Where the checkpoint is."""
        return self._reader.location

    @property
    def reads_at_once(self) -> int:
        """As many as the reader of the checkpoint likes."""
        return self._reader.reads_at_once

    async def manifest(self) -> Buffer:
        """Return the contents of the manifest, which need not be one.

        Raises:
            OSError: If the storage refuses.
        """
        return await self._reader.manifest()

    async def open(self, workers: Workers, add_node: Callable[[Any], object]) -> Manifest:
        """Read the manifest, and find out where the files lie. It is read and checked once.

        Args:
            workers: Do that.
            add_node: As for :func:`~aiostage.format.manifest.read_manifest`.

        Raises:
            CheckpointCorruptError: If it is anything but a manifest.
            CheckpointNotFoundError: If the checkpoint was removed, and lies there only because others refer to it.
            OSError: If the storage refuses.
        """
        async with self.deleted_or_corrupt():
            text = await self.manifest()
            reading = partial(read_manifest, text, path=self._path(MANIFEST_NAME), add_node=add_node)
            manifest = await workers.run(reading)
        await self._use(manifest.placement)
        return manifest

    async def placement(self) -> Placement | None:
        """Return where the files lie; None if each lies as a whole in the checkpoint. Raises as :meth:`open`."""
        if not self._is_known:
            async with self.deleted_or_corrupt():
                placement = await placement_in(self._reader)
            await self._use(placement)
        return self._placement

    async def _use(self, placement: Placement | None) -> None:
        # Only those that refer to others, or may be referred to, are ever removed in steps.
        if placement is not None and self._refuses_removed:
            await refuse_removed(self._storage, self._name, self.location)
        if not self._is_known:
            # Of several callers at once, one finds out.
            if placement is not None:
                self._reader = ReferencingReader(self._storage, self._reader, placement)
            self._placement, self._is_known = placement, True

    async def size(self, name: str) -> int:
        """Return how long a file is, in bytes. Raises as :meth:`read`."""
        await self.placement()
        async with self.deleted_or_corrupt():
            return await self._reader.size(name)

    async def read(self, name: str, offset: int, into: Buffer) -> None:
        """Fill a buffer with a range of a file, wherever it lies.

        Raises:
            CheckpointCorruptError: If there is no such file, it ends early, or what it refers to is missing.
            CheckpointNotFoundError: If the checkpoint was removed meanwhile.
            OSError: If the storage refuses.
        """
        await self.placement()
        async with self.deleted_or_corrupt():
            await self._reader.read(name, offset, into)

    async def blocking(self, name: str) -> Callable[[int, Buffer], None] | None:
        """Return what reads a range of a file in the calling thread, to be used within :meth:`deleted_or_corrupt`.

        None if only :meth:`read` can. Raises as :meth:`manifest`.
        """
        await self.placement()
        return partial(self._reader.read_blocking, name) if isinstance(self._reader, LocalReader) else None

    @asynccontextmanager
    async def deleted_or_corrupt(self) -> AsyncGenerator[None, None]:
        """Tell what was removed, with all that no other checkpoint referred to, from what is damaged."""
        try:
            yield
        except CheckpointCorruptError as error:
            if self._refuses_removed:
                try:
                    await (await open_checkpoint(self._storage, self._name)).aclose()
                    await refuse_removed(self._storage, self._name, self.location)
                except CheckpointNotFoundError as gone:
                    raise gone from error
            raise

    async def modified(self) -> float | None:
        """Return when the checkpoint was committed, if its storage knows."""
        return await self._reader.modified()

    async def aclose(self) -> None:
        """Close it, and the checkpoints that it refers to. May be called more than once."""
        await self._reader.aclose()

    def _path(self, name: str) -> str:
        return f"{self.location}/{name}"


async def open_checkpoint(storage: Storage, name: str) -> OpenCheckpoint:
    """Open a checkpoint, wherever its bytes lie.

    Whether it was removed is found out with its manifest: by :meth:`OpenCheckpoint.open` or ``placement``.

    Raises:
        CheckpointNotFoundError: If there is none.
        OSError: If the storage refuses.
    """
    if removed_by_tombstone(name.rpartition("/")[2]) is not None:
        raise CheckpointNotFoundError(_REMOVED, path=f"{storage.location}/{name}")
    return OpenCheckpoint(storage, name, await storage.read(name))


async def refuse_removed(storage: Storage, name: str, location: str) -> None:
    """Raise a CheckpointNotFoundError if a checkpoint was removed, and lies there only because others refer to it.

    Raises:
        CheckpointNotFoundError: If so.
        OSError: If the storage refuses.
    """
    if await is_removed(storage, name):
        raise CheckpointNotFoundError(_REMOVED, path=location)
