"""The suite for storages: a storage in memory passes, broken ones do not. Ours run through it in tests/storage."""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, AsyncIterator, Collection, Sequence
from typing import ClassVar

import pytest
from anyio.lowlevel import checkpoint

from aiostage import CheckpointCorruptError, CheckpointNotFoundError
from aiostage.abc import Buffer, PendingCheckpoint, Storage
from aiostage.testing import StorageSuite
from tests.checkpoint.memory_storage import MANIFEST, MemoryCheckpoint, MemoryStorage


@pytest.mark.asyncio
class TestMemoryStorage(StorageSuite):
    def make_storage(self) -> Storage:
        return MemoryStorage()


@pytest.mark.anyio
class TestMemoryStorageOnTrio(StorageSuite):
    def make_storage(self) -> Storage:
        return MemoryStorage()


class SeenTooEarly(MemoryCheckpoint):
    async def write(self, name: str, nbytes: int, parts: AsyncIterable[Buffer]) -> None:
        await super().write(name, nbytes, parts)
        self.storage.checkpoints[self.name] = self.files | {MANIFEST: b""}


class KeepsParts(MemoryCheckpoint):
    kept: ClassVar[list[Buffer]] = []

    async def write(self, name: str, nbytes: int, parts: AsyncIterable[Buffer]) -> None:
        self.kept += [part async for part in parts]


class Overtakes(MemoryCheckpoint):
    async def commit(self, manifest: Buffer) -> None:
        self.overwrite = True
        await super().commit(manifest)


class Halves(MemoryCheckpoint):
    """Commits in two steps."""

    async def commit(self, manifest: Buffer) -> None:
        self.storage.checkpoints[self.name] = {MANIFEST: bytes(manifest)}
        await checkpoint()
        self.storage.checkpoints[self.name] |= self.files


class AbortsTheCommitted(MemoryCheckpoint):
    async def abort(self) -> None:
        self.storage.checkpoints.pop(self.name, None)


class Truncates(MemoryCheckpoint):
    async def write(self, name: str, nbytes: int, parts: AsyncIterable[Buffer]) -> None:
        await super().write(name, nbytes, parts)
        self.files[name] = self.files[name][:8192]


class TakesFewer(MemoryCheckpoint):
    """Believes what was announced."""

    async def write(self, name: str, nbytes: int, parts: AsyncIterable[Buffer]) -> None:
        await super().write(name, nbytes, _padded(parts, nbytes))


async def _padded(parts: AsyncIterable[Buffer], nbytes: int) -> AsyncIterator[Buffer]:
    sent = 0
    async for part in parts:
        part = part[: nbytes - sent]
        sent += len(part)
        yield part
        del part
    if sent < nbytes:
        yield memoryview(bytes(nbytes - sent))


class FourParts(MemoryCheckpoint):
    async def write(self, name: str, nbytes: int, parts: AsyncIterable[Buffer]) -> None:
        await super().write(name, nbytes, parts)
        self.files[name] = self.files[name][: 4 * StorageSuite.part_bytes]


class CutsManifests(MemoryCheckpoint):
    async def commit(self, manifest: Buffer) -> None:
        await super().commit(manifest[:64])


class Blocks(MemoryCheckpoint):
    async def write(self, name: str, nbytes: int, parts: AsyncIterable[Buffer]) -> None:
        time.sleep(0.05)
        await super().write(name, nbytes, parts)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("pending", "test"),
    [
        (SeenTooEarly, "test_nothing_is_seen_before_it_is_committed"),
        (KeepsParts, "test_parts_are_let_go_of"),
        (Overtakes, "test_the_first_of_two_writers_wins"),
        (Halves, "test_a_save_cancelled_at_every_await"),
        (Halves, "test_replacing_cancelled_at_every_await"),
        (AbortsTheCommitted, "test_nothing_is_seen_before_it_is_committed"),
        (Truncates, "test_what_is_written_is_read"),
        (TakesFewer, "test_a_file_is_as_long_as_was_announced"),
        (FourParts, "test_what_is_written_is_read"),
        (CutsManifests, "test_manifests_of_any_length"),
        (Blocks, "test_the_event_loop_gets_its_turn"),
    ],
)
async def test_the_suite_finds_what_is_wrong(pending: type[MemoryCheckpoint], test: str) -> None:
    class Broken(MemoryStorage):
        async def open(self, name: str, *, overwrite: bool = False) -> PendingCheckpoint:
            made = await super().open(name, overwrite=overwrite)
            made.__class__ = pending
            return made

    class Suite(StorageSuite):
        # Far below what the blocking one takes: on a busy machine the time that is counted may be short of it.
        longest_hold = 0.01

        def make_storage(self) -> Storage:
            return Broken()

    with pytest.raises((AssertionError, BufferError, CheckpointCorruptError, CheckpointNotFoundError)):
        await getattr(Suite(), test)()


class DeletesTooMuch(MemoryStorage):
    async def delete(self, name: str) -> None:
        for other in [other for other in self.checkpoints if other.startswith(name)]:
            await super().delete(other)


class BlocksWhenListing(MemoryStorage):
    async def list(self) -> Sequence[str]:
        time.sleep(0.05)
        return await super().list()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("storage", "test"),
    [(DeletesTooMuch, "test_deleting"), (BlocksWhenListing, "test_the_event_loop_gets_its_turn")],
)
async def test_the_suite_finds_what_is_wrong_with_storages(storage: type[MemoryStorage], test: str) -> None:
    class Suite(StorageSuite):
        longest_hold = 0.01

        def make_storage(self) -> Storage:
            return storage()

    with pytest.raises(AssertionError):
        await getattr(Suite(), test)()


class TrimsTooMuch(MemoryStorage):
    async def prune_files(self, name: str, keep: Collection[str]) -> None:
        await super().prune_files(name, ())


class TrimsNothing(MemoryStorage):
    prune_files = Storage.prune_files


class TrimsTheManifest(MemoryStorage):
    async def prune_files(self, name: str, keep: Collection[str]) -> None:
        await super().prune_files(name, keep)
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
        prunes = False

        def make_storage(self) -> Storage:
            return TrimsNothing()

    await Suite().test_trimming()
