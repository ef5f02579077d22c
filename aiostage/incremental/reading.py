"""Reading a checkpoint whose files lie in pieces, some of them in other checkpoints, as if they lay in itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager

import anyio

from aiostage._loop.coroutines import finish
from aiostage.abc import Buffer, Reader, Storage
from aiostage.errors import CheckpointCorruptError, CheckpointNotFoundError
from aiostage.format.placement import Extent, PlacedFile, Placement
from aiostage.storage.locate import exists, removed_by_tombstone, step_of, tombstone_of

__all__ = ["ReferencedFiles", "is_removed"]

_OPEN_OTHERS = 8
"""Other checkpoints that stay open while one is read. A guess: a run may have thousands, each with open files, and
consecutive parts mostly lie in a few of them."""


class ReferencedFiles:
    """The files of a checkpoint, read wherever they lie in it and in other checkpoints of the same storage.

    Args:
        storage: Where they are.
        reader: The reader of the checkpoint; closed with this.
        placement: Where its files lie.
    """

    def __init__(self, storage: Storage, reader: Reader, placement: Placement) -> None:
        self._storage = storage
        self._reader = reader
        self._placement = placement
        self._others: dict[str, Reader] = {}
        self._users: Counter[str] = Counter()
        self._opening = anyio.Lock()

    async def size(self, name: str) -> int:
        """Return how long a file is, in bytes.

        Raises:
            CheckpointCorruptError: If there is no such file.
        """
        return self._file(name).nbytes

    async def read(self, name: str, offset: int, into: Buffer) -> None:
        """Fill a buffer with a range of a file, wherever it lies.

        Raises:
            CheckpointCorruptError: If there is no such file, it ends early, or what it refers to is missing.
            OSError: If the storage refuses.
        """
        file = self._file(name)
        if offset + len(into) > file.nbytes:
            raise CheckpointCorruptError(
                f"it ends at byte {file.nbytes}; more was expected.", path=f"{self._reader.location}/{name}"
            )
        position = 0
        # One after the other, because a part has few pieces if little has changed, and the caller reads several parts
        # at once.
        for piece in file.located(offset, offset + len(into)):
            await self._read_piece(piece, into[position : position + piece.nbytes])
            position += piece.nbytes

    async def aclose(self) -> None:
        """Close it and the others. May be called more than once."""
        # The stack calls every one, also if one raises or is cancelled.
        async with AsyncExitStack() as stack:
            for reader in (self._reader, *self._others.values()):
                stack.push_async_callback(reader.aclose)

    def _file(self, name: str) -> PlacedFile:
        try:
            return self._placement.files[name]
        except KeyError:
            raise CheckpointCorruptError(
                "the manifest does not say where it lies.", path=f"{self._reader.location}/{name}"
            ) from None

    async def _read_piece(self, piece: Extent, into: Buffer) -> None:
        if piece.source is None:
            await self._reader.read(piece.file, piece.offset, into)
            return
        try:
            async with self._other(piece.source) as reader:
                await reader.read(piece.file, piece.offset, into)
        # For the caller the checkpoint that it asked for exists, and is not readable. Whether it was itself removed
        # meanwhile is found out by OpenCheckpoint.deleted_or_corrupt().
        except CheckpointNotFoundError as error:
            raise CheckpointCorruptError(
                f"it refers to the checkpoint {piece.source}, which is missing.", path=self._reader.location
            ) from error

    @asynccontextmanager
    async def _other(self, name: str) -> AsyncGenerator[Reader, None]:
        """Lend the reader of another checkpoint, of which only a few stay open."""
        # One at a time: if two opened the same checkpoint, one reader would never be closed. A cancellation at this
        # await leaves nothing: a reader that was open is popped and put back without one.
        async with self._opening:
            reader = self._others.pop(name, None) or await self._storage.read(name)
            # At the end of the dict, which is ordered by last use.
            self._others[name] = reader
            self._users[name] += 1
        try:
            yield reader
        finally:
            self._users[name] -= 1
        # Not after an error: aclose() then closes all of them soon. No lock is needed: a reader is taken out before it
        # is closed, and a call that needs it meanwhile opens a new one.
        while len(self._others) > _OPEN_OTHERS:
            idle = next((other for other in self._others if not self._users[other]), None)
            if idle is None:
                break
            await finish(self._others.pop(idle).aclose)


async def is_removed(storage: Storage, name: str) -> bool:
    """Return whether a checkpoint was removed, or is itself a tombstone.

    Raises:
        OSError: If the storage refuses.
    """
    last = name.rpartition("/")[2]
    return removed_by_tombstone(last) is not None or (
        step_of(last) is not None and await exists(storage, tombstone_of(name))
    )
