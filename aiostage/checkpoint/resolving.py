"""Reading a checkpoint whose files lie in pieces, some of them in other checkpoints, as if they lay in itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio

from aiostage._loop.cleanup import finish
from aiostage._loop.slices import in_turns
from aiostage._loop.workers import Workers
from aiostage.abc import Buffer, Reader, Storage
from aiostage.errors import CheckpointCorruptError, CheckpointNotFoundError
from aiostage.format.manifest import MAX_MANIFEST_BYTES, Manifest, read_manifest, read_placement
from aiostage.format.placement import Piece, PlacedFile, Placement
from aiostage.format.steps import mark_of, removed_of, step_of
from aiostage.storage.commit import MANIFEST_NAME
from aiostage.storage.local import LocalReader

__all__ = ["ResolvingReader", "exists", "is_removed", "open_checkpoint", "placement_of"]

_OPEN_OTHERS = 8
"""Checkpoints that one refers to and that stay open while it is read; a run may have thousands."""

_REMOVED = "it was removed; what is left of it lies there for others that refer to it."


class ResolvingReader(Reader):
    """A reader that follows references to other checkpoints of the same storage.

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
        self._others: dict[str, Reader] = {}
        self._users: Counter[str] = Counter()
        self._opening = anyio.Lock()
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
            CheckpointCorruptError: If it is longer than any manifest.
            OSError: If the storage refuses.
        """
        text = await self._reader.manifest()
        if len(text) > MAX_MANIFEST_BYTES:
            raise CheckpointCorruptError(
                f"it is {len(text)} bytes long, too long for a manifest.", path=self._path(MANIFEST_NAME)
            )
        return text

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
        async with self.told_apart():
            text = await self.manifest()
            reading = read_manifest(text, path=self._path(MANIFEST_NAME), add_node=add_node)
            manifest = await workers.run(partial(in_turns, reading))
        await self._use(manifest.placement)
        return manifest

    async def placement(self) -> Placement | None:
        """Return where the files lie; None if each lies as a whole in the checkpoint. Raises as :meth:`open`."""
        if not self._is_known:
            workers = Workers(1, "aiostage-load")
            try:
                async with self.told_apart():
                    text = await self.manifest()
                    placement = await workers.run(
                        partial(in_turns, read_placement(text, path=self._path(MANIFEST_NAME)))
                    )
            finally:
                workers.stop()
            await self._use(placement)
        return self._placement

    async def _use(self, placement: Placement | None) -> None:
        # Only those that refer to others, or may be referred to, are ever removed in steps.
        if placement is not None and self._refuses_removed:
            await refuse_removed(self._storage, self._name, self.location)
        self._placement, self._is_known = placement, True

    async def size(self, name: str) -> int:
        """Return how long a file is, in bytes. Raises as :meth:`read`."""
        file = await self._placed(name)
        if file is not None:
            return file.nbytes
        async with self.told_apart():
            return await self._reader.size(name)

    async def read(self, name: str, offset: int, into: Buffer) -> None:
        """Fill a buffer with a range of a file, wherever it lies.

        Raises:
            CheckpointCorruptError: If there is no such file, it ends early, or what it refers to is missing.
            CheckpointNotFoundError: If the checkpoint was removed meanwhile.
            OSError: If the storage refuses.
        """
        file = await self._placed(name)
        if file is None:
            async with self.told_apart():
                await self._reader.read(name, offset, into)
            return
        if offset + len(into) > file.nbytes:
            raise CheckpointCorruptError(f"it ends at byte {file.nbytes}; more was expected.", path=self._path(name))
        position = 0
        for piece in file.located(offset, offset + len(into)):
            async with self.told_apart():
                await self._read_piece(piece, into[position : position + piece.nbytes])
            position += piece.nbytes

    async def blocking(self, name: str) -> Callable[[int, Buffer], None] | None:
        """Return what reads a range of a file in the calling thread, to be used within :meth:`told_apart`.

        None if only :meth:`read` can. Raises as :meth:`manifest`.
        """
        if not isinstance(self._reader, LocalReader) or await self.placement() is not None:
            return None
        return partial(self._reader.read_blocking, name)

    @asynccontextmanager
    async def told_apart(self) -> AsyncGenerator[None, None]:
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

    async def aclose(self) -> None:
        """Close it and the others. May be called more than once."""
        for reader in (self._reader, *self._others.values()):
            await reader.aclose()

    def _path(self, name: str) -> str:
        return f"{self.location}/{name}"

    async def _placed(self, name: str) -> PlacedFile | None:
        placement = await self.placement()
        if placement is None:
            return None
        try:
            return placement.files[name]
        except KeyError:
            raise CheckpointCorruptError("the manifest does not say where it lies.", path=self._path(name)) from None

    async def _read_piece(self, piece: Piece, into: Buffer) -> None:
        if piece.source is None:
            await self._reader.read(piece.file, piece.offset, into)
            return
        try:
            async with self._other(piece.source) as reader:
                await reader.read(piece.file, piece.offset, into)
        except CheckpointNotFoundError as error:
            raise CheckpointCorruptError(
                f"it refers to the checkpoint {piece.source}, which is missing.", path=self.location
            ) from error

    @asynccontextmanager
    async def _other(self, name: str) -> AsyncGenerator[Reader, None]:
        """Lend the reader of another checkpoint, of which only a few stay open."""
        async with self._opening:
            reader = self._others.pop(name, None) or await self._storage.read(name)
            # At the end, as the one that was used last.
            self._others[name] = reader
            self._users[name] += 1
        try:
            yield reader
        finally:
            self._users[name] -= 1
        # After an error all are closed soon, with this.
        while len(self._others) > _OPEN_OTHERS:
            idle = next((other for other in self._others if not self._users[other]), None)
            if idle is None:
                break
            await finish(self._others.pop(idle).aclose)


async def open_checkpoint(storage: Storage, name: str) -> ResolvingReader:
    """Open a checkpoint, wherever its bytes lie.

    Whether it was removed is found out with its manifest: by :meth:`ResolvingReader.open` or ``placement``.

    Raises:
        CheckpointNotFoundError: If there is none.
        OSError: If the storage refuses.
    """
    if removed_of(name.rpartition("/")[2]) is not None:
        raise CheckpointNotFoundError(_REMOVED, path=f"{storage.location}/{name}")
    return ResolvingReader(storage, name, await storage.read(name))


async def refuse_removed(storage: Storage, name: str, location: str) -> None:
    """Raise a CheckpointNotFoundError if a checkpoint was removed, and lies there only because others refer to it.

    Raises:
        CheckpointNotFoundError: If so.
        OSError: If the storage refuses.
    """
    if await is_removed(storage, name):
        raise CheckpointNotFoundError(_REMOVED, path=location)


async def is_removed(storage: Storage, name: str) -> bool:
    """Return whether a checkpoint was removed, or is no more than the mark of one.

    Raises:
        OSError: If the storage refuses.
    """
    last = name.rpartition("/")[2]
    return removed_of(last) is not None or (step_of(last) is not None and await exists(storage, mark_of(name)))


async def exists(storage: Storage, name: str) -> bool:
    """Return whether there is a checkpoint, or a mark, of a name.

    Raises:
        OSError: If the storage refuses.
    """
    try:
        await (await storage.read(name)).aclose()
    except CheckpointNotFoundError:
        return False
    return True


async def placement_of(storage: Storage, name: str) -> Placement | None:
    """Return where the files of a checkpoint lie; None if each lies as a whole in the checkpoint.

    Raises:
        CheckpointNotFoundError: If there is no checkpoint.
        CheckpointCorruptError: If its manifest is damaged.
        OSError: If the storage refuses.
    """
    reader = ResolvingReader(storage, name, await storage.read(name), refuses_removed=False)
    try:
        return await reader.placement()
    finally:
        await reader.aclose()
