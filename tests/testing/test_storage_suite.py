"""The suite for storages: a storage in memory passes, broken ones do not. Ours run through it in tests/storage."""

from __future__ import annotations

from collections.abc import AsyncIterable, Collection
from typing import ClassVar

import pytest
from anyio.lowlevel import checkpoint

from aiostage import CheckpointCorruptError, CheckpointNotFoundError
from aiostage.abc import Buffer, Draft, Storage
from aiostage.testing import StorageSuite
from tests.checkpoint.memory_storage import MANIFEST, MemoryDraft, MemoryStorage


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
        self.storage.checkpoints[self.name] = self.files | {MANIFEST: b""}


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
        self.storage.checkpoints[self.name] = {MANIFEST: bytes(manifest)}
        await checkpoint()
        self.storage.checkpoints[self.name] |= self.files


class AbortsTheCommitted(MemoryDraft):
    async def abort(self) -> None:
        self.storage.checkpoints.pop(self.name, None)


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
            made = await super().open(name, overwrite=overwrite)
            made.__class__ = draft
            return made

    class Suite(StorageSuite):
        def make_storage(self) -> Storage:
            return Broken()

    with pytest.raises((AssertionError, BufferError, CheckpointCorruptError, CheckpointNotFoundError)):
        await getattr(Suite(), test)()


class TrimsTooMuch(MemoryStorage):
    async def trim(self, name: str, keep: Collection[str]) -> None:
        await super().trim(name, ())


class TrimsNothing(MemoryStorage):
    trim = Storage.trim


class TrimsTheManifest(MemoryStorage):
    async def trim(self, name: str, keep: Collection[str]) -> None:
        await super().trim(name, keep)
        self.checkpoints.get(name, {})[MANIFEST] = b""


@pytest.mark.asyncio
@pytest.mark.parametrize("storage", [TrimsTooMuch, TrimsNothing, TrimsTheManifest])
async def test_the_suite_finds_what_is_wrong_with_trimming(storage: type[MemoryStorage]) -> None:
    class Suite(StorageSuite):
        def make_storage(self) -> Storage:
            return storage()

    with pytest.raises((AssertionError, CheckpointCorruptError)):
        await Suite().test_trimming()


@pytest.mark.asyncio
async def test_a_storage_may_do_without_trimming() -> None:
    class Suite(StorageSuite):
        trims = False

        def make_storage(self) -> Storage:
            return TrimsNothing()

    await Suite().test_trimming()
