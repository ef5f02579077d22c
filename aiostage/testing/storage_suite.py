"""The tests that every storage has to pass, to run on a storage of your own. Used like the suite for stagers."""

from __future__ import annotations

import unittest
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Collection, Coroutine, Mapping
from functools import partial
from typing import Any

import anyio
import numpy
from anyio.lowlevel import checkpoint

from aiostage.abc import PendingCheckpoint, Reader, Storage
from aiostage.errors import CheckpointCorruptError, CheckpointExistsError, CheckpointNotFoundError, shown
from aiostage.testing.cancelling import at_every_await
from aiostage.testing.stager_suite import check_holds, require_asyncio

__all__ = ["StorageSuite"]


def _content(nbytes: int, seed: int = 1) -> bytes:
    """Return bytes that differ between offsets and between seeds."""
    # They repeat after 251 * 256 bytes, so one period is computed and the rest copied. No usual size of a part is a
    # multiple of that, so bytes at a wrong offset show.
    places = numpy.arange(min(nbytes, 251 * 256))
    period = ((seed * 37 + places * 11 + places // 251) % 256).astype(numpy.uint8)
    return numpy.resize(period, nbytes).tobytes()


class StorageSuite(ABC):
    """What a :class:`~aiostage.abc.Storage` promises, as tests.

    Attributes:
        part_bytes: Size of the parts that files are written in, a multiple of 4096. Make it so large that the storage
            sends a file of three parts in several requests.
        names: Names of the checkpoints that are written.
        longest_hold: How long the storage may keep the event loop from its other tasks, in seconds.
        prunes: Whether :meth:`~aiostage.abc.Storage.prune_files` removes anything.
    """

    part_bytes = 8192
    names: tuple[str, ...] = ("checkpoint", "runs/a/10", "with space-and_dots.v1", "checkpoint-2", "runs/a/1")
    longest_hold = 0.04
    prunes = True

    @abstractmethod
    def make_storage(self) -> Storage:
        """Return a storage with nothing in it. Called inside a coroutine, once for each test."""

    # What the tests are made of

    @property
    def files(self) -> dict[str, bytes]:
        """Files of every kind of size."""
        part = self.part_bytes
        sizes = {"empty.bin": 0, "one.bin": 1, "odd.bin": 4097, "part.bin": part, "parts.bin": 2 * part + 5}
        sizes["many.bin"] = 9 * part + 7
        return {name: _content(size, seed) for seed, (name, size) in enumerate(sizes.items())}

    async def _parts(self, content: bytes) -> AsyncIterator[memoryview]:
        for start in range(0, len(content), self.part_bytes):
            await checkpoint()
            yield memoryview(content)[start : start + self.part_bytes]

    async def _write(self, pending: PendingCheckpoint, files: Mapping[str, bytes]) -> None:
        for name, content in files.items():
            await pending.write(name, len(content), self._parts(content))

    async def _save(
        self, storage: Storage, name: str, files: Mapping[str, bytes], manifest: bytes, *, overwrite: bool = False
    ) -> None:
        pending = await storage.open(name, overwrite=overwrite)
        try:
            await self._write(pending, files)
            await pending.commit(memoryview(manifest))
        except BaseException:
            await pending.abort()
            raise

    async def _contents(self, reader: Reader, files: Mapping[str, bytes]) -> dict[str, bytes]:
        found = {}
        for name in files:
            into = bytearray(await reader.size(name))
            await reader.read(name, 0, memoryview(into))
            found[name] = bytes(into)
        return found

    async def _check(self, storage: Storage, name: str, files: Mapping[str, bytes], manifest: bytes) -> None:
        """Check that a checkpoint is there and whole."""
        reader = await storage.read(name)
        try:
            assert bytes(await reader.manifest()) == manifest
            assert await self._contents(reader, files) == files
        finally:
            await reader.aclose()

    async def _check_missing(self, storage: Storage, name: str) -> None:
        try:
            await (await storage.read(name)).aclose()
        except CheckpointNotFoundError:
            return
        raise AssertionError(f"there is a checkpoint {shown(name)} that should not be there")

    async def _check_raises(self, kind: type[Exception], coroutine: Coroutine[Any, Any, object]) -> None:
        try:
            await coroutine
        except kind:
            return
        raise AssertionError(f"this has to raise {kind.__name__}")

    # Writing and reading

    async def test_what_is_written_is_read(self) -> None:
        storage = self.make_storage()
        for number, name in enumerate(self.names):
            await self._save(storage, name, self.files, b"manifest %d" % number)
        for number, name in enumerate(self.names):
            await self._check(storage, name, self.files, b"manifest %d" % number)
        assert sorted(await storage.list()) == sorted(self.names)
        reader = await storage.read(self.names[0])
        modified = await reader.modified()
        assert modified is None or modified > 0
        await reader.aclose()

    async def test_manifests_of_any_length(self) -> None:
        storage = self.make_storage()
        for nbytes in (1, 65, 4097, 200_001):
            manifest = _content(nbytes, seed=nbytes)
            await self._save(storage, "a", {"file.bin": b"1"}, manifest, overwrite=True)
            await self._check(storage, "a", {"file.bin": b"1"}, manifest)

    async def test_a_file_is_as_long_as_was_announced(self) -> None:
        storage = self.make_storage()
        content = _content(2 * self.part_bytes + 5)
        pending = await storage.open("a")
        for nbytes in (len(content) + 1, 3 * self.part_bytes, len(content) - 1, self.part_bytes):
            await self._check_raises(Exception, pending.write("file.bin", nbytes, self._parts(content)))
        await pending.write("file.bin", len(content), self._parts(content))
        await pending.commit(memoryview(b"m"))
        await self._check(storage, "a", {"file.bin": content}, b"m")

    async def test_the_event_loop_gets_its_turn(self) -> None:
        storage = self.make_storage()
        files = {"file.bin": _content(3 * self.part_bytes)}

        async def use() -> None:
            await self._save(storage, "a", files, b"m", overwrite=True)
            await self._check(storage, "a", files, b"m")
            await storage.list()
            await storage.pending()
            await storage.prune_files("a", files)
            await storage.delete("a")
            await storage.clean_up()

        await check_holds(use, self.longest_hold)

    async def test_ranges(self) -> None:
        storage = self.make_storage()
        content = _content(2 * self.part_bytes + 5)
        await self._save(storage, "a", {"file.bin": content}, b"m")
        reader = await storage.read("a")
        assert await reader.size("file.bin") == len(content)
        for start, stop in ((0, 1), (1, 4096), (4095, 4097), (self.part_bytes - 1, len(content)), (7, 7)):
            into = bytearray(stop - start)
            await reader.read("file.bin", start, memoryview(into))
            assert bytes(into) == content[start:stop], (start, stop)
        await reader.aclose()

    async def test_files_at_once(self) -> None:
        storage = self.make_storage()
        pending = await storage.open("a")
        async with anyio.create_task_group() as tasks:
            for name, content in self.files.items():
                tasks.start_soon(pending.write, name, len(content), self._parts(content))
        await pending.commit(memoryview(b"m"))
        await self._check(storage, "a", self.files, b"m")
        reader = await storage.read("a")
        found = {name: bytearray(len(content)) for name, content in self.files.items()}
        async with anyio.create_task_group() as tasks:
            for name, into in found.items():
                tasks.start_soon(reader.read, name, 0, memoryview(into))
        await reader.aclose()
        assert found == self.files

    async def test_parts_are_let_go_of(self) -> None:
        storage = self.make_storage()
        memory = bytearray(_content(3 * self.part_bytes))

        async def parts() -> AsyncIterator[memoryview]:
            for start in range(0, len(memory), self.part_bytes):
                yield memoryview(memory)[start : start + self.part_bytes]

        pending = await storage.open("a")
        await pending.write("file.bin", len(memory), parts())
        # A bytearray with an exported buffer cannot change its size.
        memory.clear()
        await pending.abort()

    async def test_what_is_not_there(self) -> None:
        storage = self.make_storage()
        assert list(await storage.list()) == []
        await self._check_missing(storage, "a")
        await self._save(storage, "a", {"file.bin": b"12345"}, b"m")
        await self._check_missing(storage, "b")
        reader = await storage.read("a")
        await self._check_raises(CheckpointCorruptError, reader.size("other.bin"))
        await self._check_raises(CheckpointCorruptError, reader.read("other.bin", 0, memoryview(bytearray(1))))
        await self._check_raises(CheckpointCorruptError, reader.read("file.bin", 3, memoryview(bytearray(3))))
        # Names of files come from manifests, which may be hostile: none leads out of the checkpoint.
        await self._save(storage, "b", {"file.bin": b"12345"}, b"m")
        for name in ("../b/file.bin", "/etc/hostname", "", ".", "..", "a\0b"):
            await self._check_raises(CheckpointCorruptError, reader.read(name, 0, memoryview(bytearray(1))))
        await reader.aclose()
        await reader.aclose()

    async def test_a_file_that_was_given_up_can_be_written_again(self) -> None:
        require_asyncio()
        storage = self.make_storage()
        content = _content(2 * self.part_bytes + 5)
        pending = await storage.open("a")

        def write() -> Coroutine[Any, Any, None]:
            return pending.write("file.bin", len(content), self._parts(content))

        async for _ in at_every_await(write):
            await write()
            await pending.abort()
            pending = await storage.open("a")
        await pending.commit(memoryview(b"m"))
        await self._check(storage, "a", {"file.bin": content}, b"m")

    # Appearing and disappearing

    async def test_nothing_is_seen_before_it_is_committed(self) -> None:
        storage = self.make_storage()
        pending = await storage.open("a")
        await self._check_missing(storage, "a")
        await self._write(pending, self.files)
        await self._check_missing(storage, "a")
        assert list(await storage.list()) == []
        await pending.commit(memoryview(b"m"))
        await self._check(storage, "a", self.files, b"m")
        assert list(await storage.list()) == ["a"]
        await pending.abort()
        await self._check(storage, "a", self.files, b"m")

    async def test_nothing_is_left_of_what_is_aborted(self) -> None:
        storage = self.make_storage()
        pending = await storage.open("a")
        await self._write(pending, self.files)
        await pending.abort()
        await pending.abort()
        await self._check_missing(storage, "a")
        assert list(await storage.list()) == []
        await self._save(storage, "a", {"file.bin": b"1"}, b"m")
        await self._check(storage, "a", {"file.bin": b"1"}, b"m")

    async def test_pending_ones_are_known_from_their_first_file_to_their_end(self) -> None:
        storage = self.make_storage()
        assert list(await storage.pending()) == []
        await self._save(storage, "a", self.files, b"m")
        given_up, other, committed = await storage.open("b"), await storage.open("b"), await storage.open("c/d")
        for pending in (given_up, other, committed):
            await self._write(pending, {"file.bin": b"1"})
        assert set(await storage.pending()) == {"b", "c/d"}
        # They belong to a living writer.
        await storage.clean_up()
        await committed.commit(memoryview(b"m"))
        await given_up.abort()
        assert set(await storage.pending()) == {"b"}
        await other.abort()
        assert list(await storage.pending()) == []

    async def test_a_source_that_fails(self) -> None:
        storage = self.make_storage()

        async def parts() -> AsyncIterator[memoryview]:
            yield memoryview(_content(self.part_bytes))
            raise ZeroDivisionError

        pending = await storage.open("a")
        await self._check_raises(ZeroDivisionError, pending.write("file.bin", 2 * self.part_bytes, parts()))
        await self._write(pending, {"file.bin": b"again"})
        await pending.commit(memoryview(b"m"))
        await self._check(storage, "a", {"file.bin": b"again"}, b"m")

    async def test_replacing(self) -> None:
        storage = self.make_storage()
        await self._save(storage, "a", self.files, b"old")
        await self._check_raises(CheckpointExistsError, storage.open("a"))
        pending = await storage.open("a", overwrite=True)
        await self._write(pending, {"new.bin": b"new"})
        await self._check(storage, "a", self.files, b"old")
        await pending.commit(memoryview(b"new"))
        await self._check(storage, "a", {"new.bin": b"new"}, b"new")
        assert list(await storage.list()) == ["a"]

    async def test_a_revision_changes_when_a_checkpoint_is_replaced(self) -> None:
        storage = self.make_storage()
        assert await storage.revision("a") is None
        revisions = set()
        for number in range(3):
            await self._save(storage, "a", self.files, b"manifest %d" % number, overwrite=True)
            revision = await storage.revision("a")
            assert revision is not None
            assert revision == await storage.revision("a")
            revisions.add(revision)
        assert len(revisions) == 3
        await storage.delete("a")
        assert await storage.revision("a") is None

    async def test_replacing_is_given_up(self) -> None:
        storage = self.make_storage()
        await self._save(storage, "a", self.files, b"old")
        pending = await storage.open("a", overwrite=True)
        await self._write(pending, {"parts.bin": b"new"})
        await pending.abort()
        await self._check(storage, "a", self.files, b"old")

    async def test_deleting(self) -> None:
        storage = self.make_storage()
        for name in self.names:
            await self._save(storage, name, self.files, b"m")
        await storage.delete(self.names[0])
        await storage.delete(self.names[0])
        await storage.delete("never there")
        await self._check_missing(storage, self.names[0])
        assert sorted(await storage.list()) == sorted(self.names[1:])
        await self._save(storage, self.names[0], {"file.bin": b"1"}, b"again")
        await self._check(storage, self.names[0], {"file.bin": b"1"}, b"again")

    async def test_trimming(self) -> None:
        storage = self.make_storage()
        for name in self.names:
            await self._save(storage, name, self.files, b"m")
        await storage.prune_files("never there", [])
        keep = {"part.bin", "never there"}
        for _ in range(2):
            await storage.prune_files(self.names[0], keep)
            await self._check_trimmed(storage, self.names[0], keep)
        assert sorted(await storage.list()) == sorted(self.names)
        for name in self.names[1:]:
            await self._check(storage, name, self.files, b"m")
        await storage.delete(self.names[0])
        await self._check_missing(storage, self.names[0])

    async def _check_trimmed(self, storage: Storage, name: str, keep: Collection[str]) -> None:
        """Check that some files are there, and that each of the others either is or is not."""
        await self._check(storage, name, {file: self.files[file] for file in self.files if file in keep}, b"m")
        reader = await storage.read(name)
        try:
            for file, content in self.files.items():
                try:
                    assert await self._contents(reader, {file: b""}) == {file: content}
                except CheckpointCorruptError:
                    assert file not in keep
                else:
                    assert file in keep or not self.prunes
        finally:
            await reader.aclose()

    async def test_a_reader_is_not_disturbed(self) -> None:
        storage = self.make_storage()
        for disturb in ("replace", "delete"):
            await self._save(storage, "a", self.files, b"old", overwrite=True)
            reader = await storage.read("a")
            assert bytes(await reader.manifest()) == b"old"
            if disturb == "replace":
                await self._save(storage, "a", dict.fromkeys(self.files, b"new"), b"new", overwrite=True)
            else:
                await storage.delete("a")
            try:
                assert await self._contents(reader, self.files) == self.files
            except CheckpointNotFoundError:
                # It may raise this. It must not return other bytes.
                pass
            finally:
                await reader.aclose()

    # Several at once

    async def test_the_first_of_two_writers_wins(self) -> None:
        storage = self.make_storage()
        first, second = await storage.open("a"), await storage.open("a")
        await self._write(first, {"file.bin": b"first"})
        await self._write(second, {"file.bin": b"the second"})
        await first.commit(memoryview(b"1"))
        await self._check_raises(CheckpointExistsError, second.commit(memoryview(b"2")))
        await second.abort()
        await self._check(storage, "a", {"file.bin": b"first"}, b"1")

    async def test_the_last_of_two_writers_wins_if_it_may_replace(self) -> None:
        storage = self.make_storage()
        first, second = await storage.open("a", overwrite=True), await storage.open("a", overwrite=True)
        await self._write(first, {"file.bin": b"first"})
        await self._write(second, {"file.bin": b"the second"})
        await second.commit(memoryview(b"2"))
        await self._check(storage, "a", {"file.bin": b"the second"}, b"2")
        await first.commit(memoryview(b"1"))
        await self._check(storage, "a", {"file.bin": b"first"}, b"1")

    async def test_clean_up_leaves_running_writers_alone(self) -> None:
        storage = self.make_storage()
        await self._save(storage, "a", self.files, b"m")
        pending = await storage.open("b")
        await self._write(pending, {"file.bin": b"12"})
        await storage.clean_up()
        await self._write(pending, {"more.bin": b"34"})
        await pending.commit(memoryview(b"b"))
        await self._check(storage, "a", self.files, b"m")
        await self._check(storage, "b", {"file.bin": b"12", "more.bin": b"34"}, b"b")

    # Cancellation

    async def test_a_save_cancelled_at_every_await(self) -> None:
        require_asyncio()
        storage = self.make_storage()
        files = {"file.bin": _content(2 * self.part_bytes + 5)}
        async for _ in at_every_await(partial(self._save, storage, "a", files, b"m")):
            if list(await storage.list()) == ["a"]:
                # Cancelled after it was committed.
                await self._check(storage, "a", files, b"m")
                await storage.delete("a")
            await self._check_missing(storage, "a")
        await self._check(storage, "a", files, b"m")

    async def test_replacing_cancelled_at_every_await(self) -> None:
        require_asyncio()
        storage = self.make_storage()
        old, new = {"file.bin": b"old"}, {"file.bin": b"new!"}
        await self._save(storage, "a", old, b"1")
        async for _ in at_every_await(partial(self._save, storage, "a", new, b"2", overwrite=True)):
            reader = await storage.read("a")
            manifest = bytes(await reader.manifest())
            await reader.aclose()
            await self._check(storage, "a", old if manifest == b"1" else new, manifest)
            await self._save(storage, "a", old, b"1", overwrite=True)
        await self._check(storage, "a", new, b"2")

    async def test_reading_cancelled_at_every_await(self) -> None:
        require_asyncio()
        storage = self.make_storage()
        await self._save(storage, "a", self.files, b"m")
        async for _ in at_every_await(partial(self._check, storage, "a", self.files, b"m")):
            await self._check(storage, "a", self.files, b"m")

    async def test_deleting_cancelled_at_every_await(self) -> None:
        require_asyncio()
        storage = self.make_storage()
        files = {"file.bin": b"1"}
        await self._save(storage, "a", files, b"m")
        async for _ in at_every_await(partial(storage.delete, "a")):
            if list(await storage.list()) == ["a"]:
                await self._check(storage, "a", files, b"m")
            else:
                await self._check_missing(storage, "a")
            await self._save(storage, "a", files, b"m", overwrite=True)
        await self._check_missing(storage, "a")

    async def test_trimming_cancelled_at_every_await(self) -> None:
        require_asyncio()
        storage = self.make_storage()
        keep = {"odd.bin", "parts.bin"}
        await self._save(storage, "a", self.files, b"m")
        async for _ in at_every_await(partial(storage.prune_files, "a", keep)):
            kept = {file: self.files[file] for file in keep}
            await self._check(storage, "a", kept, b"m")
            await self._save(storage, "a", self.files, b"m", overwrite=True)
        await self._check_trimmed(storage, "a", keep)

    async def test_clean_up_cancelled_at_every_await(self) -> None:
        require_asyncio()
        storage = self.make_storage()
        await self._save(storage, "a", self.files, b"m")
        async for _ in at_every_await(storage.clean_up):
            await self._check(storage, "a", self.files, b"m")

    # Stale files

    async def leave_stale_files(self, storage: Storage, name: str) -> None:
        """Leave what a killed writer leaves. Override it if a test can do that."""
        raise unittest.SkipTest("leave_stale_files() is not implemented: it makes what a killed writer leaves here")

    async def count_stale_files(self, storage: Storage) -> int:
        """Return how many files or objects belong to no committed checkpoint."""
        raise unittest.SkipTest("count_stale_files() is not implemented: it counts the stale files here")

    async def test_clean_up_removes_the_files_of_killed_writers(self) -> None:
        storage = self.make_storage()
        await self._save(storage, "a", self.files, b"m")
        await self.leave_stale_files(storage, "b")
        assert await self.count_stale_files(storage)
        await storage.clean_up()
        assert await self.count_stale_files(storage) == 0
        await self._check(storage, "a", self.files, b"m")

    async def test_nothing_is_left_of_what_is_cancelled(self) -> None:
        require_asyncio()
        storage = self.make_storage()
        files = {"file.bin": _content(2 * self.part_bytes + 5)}
        async for _ in at_every_await(partial(self._save, storage, "a", files, b"m", overwrite=True)):
            assert await self.count_stale_files(storage) == 0
