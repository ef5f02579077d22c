"""The suite for storages: a storage in memory passes, broken ones do not. Ours run through it in tests/storage."""

from __future__ import annotations

from collections.abc import AsyncIterable, Sequence
from typing import ClassVar

import pytest
from anyio.lowlevel import checkpoint

from aiostage import CheckpointCorruptError, CheckpointExistsError, CheckpointNotFoundError
from aiostage.abc import Buffer, Draft, Reader, Storage
from aiostage.testing import StorageSuite


class MemoryStorage(Storage):
    """Keeps checkpoints in a dict; the smallest storage that is right."""

    def __init__(self) -> None:
        self.committed: dict[str, dict[str, bytes]] = {}

    async def open(self, name: str, *, overwrite: bool = False) -> Draft:
        await checkpoint()
        if name in self.committed and not overwrite:
            raise CheckpointExistsError("there is one.", path=name)
        return MemoryDraft(self, name, overwrite)

    async def read(self, name: str) -> Reader:
        await checkpoint()
        if name not in self.committed:
            raise CheckpointNotFoundError("there is none.", path=name)
        return MemoryReader(name, self.committed[name])

    async def list(self) -> Sequence[str]:
        await checkpoint()
        return list(self.committed)

    async def delete(self, name: str) -> None:
        await checkpoint()
        self.committed.pop(name, None)

    async def sweep(self) -> None:
        await checkpoint()


class MemoryDraft(Draft):
    def __init__(self, storage: MemoryStorage, name: str, overwrite: bool) -> None:
        self.storage, self.name, self.overwrite = storage, name, overwrite
        self.files: dict[str, bytes] = {}

    @property
    def location(self) -> str:
        return self.name

    async def write(self, name: str, nbytes: int, parts: AsyncIterable[Buffer]) -> None:
        content = bytearray()
        async for part in parts:
            content += part
            del part
        assert len(content) == nbytes
        self.files[name] = bytes(content)
        await checkpoint()

    async def commit(self, manifest: Buffer) -> None:
        await checkpoint()
        if self.name in self.storage.committed and not self.overwrite:
            raise CheckpointExistsError("another writer was faster.", path=self.name)
        self.storage.committed[self.name] = self.files | {"": bytes(manifest)}

    async def abort(self) -> None:
        self.files = {}


class MemoryReader(Reader):
    def __init__(self, name: str, files: dict[str, bytes]) -> None:
        self.name, self.files = name, files

    @property
    def location(self) -> str:
        return self.name

    async def manifest(self) -> Buffer:
        await checkpoint()
        return memoryview(self.files[""])

    async def size(self, name: str) -> int:
        return len(self._file(name))

    async def read(self, name: str, offset: int, into: Buffer) -> None:
        await checkpoint()
        content = self._file(name)[offset : offset + len(into)]
        if len(content) < len(into):
            raise CheckpointCorruptError("it ends too early.", path=name)
        into[:] = content

    async def aclose(self) -> None:
        return

    def _file(self, name: str) -> bytes:
        if name not in self.files:
            raise CheckpointCorruptError("there is no such file.", path=name)
        return self.files[name]


@pytest.mark.asyncio
class TestMemoryStorage(StorageSuite):
    def make_storage(self) -> Storage:
        return MemoryStorage()


@pytest.mark.anyio
class TestMemoryStorageOnTrio(StorageSuite):
    def make_storage(self) -> Storage:
        return MemoryStorage()


class SeenTooEarly(MemoryDraft):
    async def write(self, name: str, nbytes: int, parts: AsyncIterable[Buffer]) -> None:
        await super().write(name, nbytes, parts)
        self.storage.committed[self.name] = self.files | {"": b""}


class KeepsParts(MemoryDraft):
    kept: ClassVar[list[Buffer]] = []

    async def write(self, name: str, nbytes: int, parts: AsyncIterable[Buffer]) -> None:
        self.kept += [part async for part in parts]


class Overtakes(MemoryDraft):
    async def commit(self, manifest: Buffer) -> None:
        self.overwrite = True
        await super().commit(manifest)


class Halves(MemoryDraft):
    """Commits in two steps."""

    async def commit(self, manifest: Buffer) -> None:
        self.storage.committed[self.name] = {"": bytes(manifest)}
        await checkpoint()
        self.storage.committed[self.name] |= self.files


class AbortsTheCommitted(MemoryDraft):
    async def abort(self) -> None:
        self.storage.committed.pop(self.name, None)


class Truncates(MemoryDraft):
    async def write(self, name: str, nbytes: int, parts: AsyncIterable[Buffer]) -> None:
        await super().write(name, nbytes, parts)
        self.files[name] = self.files[name][:8192]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("draft", "test"),
    [
        (SeenTooEarly, "test_nothing_is_seen_before_it_is_committed"),
        (KeepsParts, "test_parts_are_let_go_of"),
        (Overtakes, "test_the_first_of_two_writers_wins"),
        (Halves, "test_a_save_cancelled_at_every_await"),
        (Halves, "test_replacing_cancelled_at_every_await"),
        (AbortsTheCommitted, "test_nothing_is_seen_before_it_is_committed"),
        (Truncates, "test_what_is_written_is_read"),
    ],
)
async def test_the_suite_finds_what_is_wrong(draft: type[MemoryDraft], test: str) -> None:
    class Broken(MemoryStorage):
        async def open(self, name: str, *, overwrite: bool = False) -> Draft:
            await super().open(name, overwrite=overwrite)
            return draft(self, name, overwrite)

    class Suite(StorageSuite):
        def make_storage(self) -> Storage:
            return Broken()

    with pytest.raises((AssertionError, BufferError, CheckpointCorruptError, CheckpointNotFoundError)):
        await getattr(Suite(), test)()
