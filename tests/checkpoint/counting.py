"""A storage that counts what is read from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence

from aiostage.abc import Buffer, PendingCheckpoint, Reader, Storage


class CountingStorage(Storage):
    """Passes everything on to another storage.

    Attributes:
        read_bytes: Of each file, how many bytes were asked for.
        before: Awaited before each read, with the file and the offset.
        reads_at_once: As readers say; None for what those of the other storage say.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.read_bytes: Counter[str] = Counter()
        self.before: Callable[[str, int], Awaitable[None]] | None = None
        self.reads_at_once: int | None = None

    async def open(self, name: str, *, overwrite: bool = False) -> PendingCheckpoint:
        return await self._storage.open(name, overwrite=overwrite)

    async def read(self, name: str) -> Reader:
        return _CountingReader(await self._storage.read(name), self)

    async def list(self) -> Sequence[str]:
        return await self._storage.list()

    async def pending(self) -> Sequence[str]:
        return await self._storage.pending()

    async def delete(self, name: str) -> None:
        await self._storage.delete(name)

    async def prune_files(self, name: str, keep: Collection[str]) -> None:
        await self._storage.prune_files(name, keep)

    async def clean_up(self) -> None:
        await self._storage.clean_up()


class _CountingReader(Reader):
    def __init__(self, reader: Reader, storage: CountingStorage) -> None:
        self._reader = reader
        self._storage = storage

    @property
    def location(self) -> str:
        return self._reader.location

    @property
    def reads_at_once(self) -> int:
        return self._storage.reads_at_once or self._reader.reads_at_once

    async def manifest(self) -> Buffer:
        return await self._reader.manifest()

    async def size(self, name: str) -> int:
        return await self._reader.size(name)

    async def read(self, name: str, offset: int, into: Buffer) -> None:
        if self._storage.before is not None:
            await self._storage.before(name, offset)
        self._storage.read_bytes[name] += len(into)
        await self._reader.read(name, offset, into)

    async def aclose(self) -> None:
        await self._reader.aclose()
