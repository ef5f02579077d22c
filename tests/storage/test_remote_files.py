"""Checkpoints in file systems of fsspec: local files and memory, on all event loops."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from aiostage import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    StorageError,
)
from aiostage.storage import FsspecStorage, locate
from tests.storage.buckets import PART, content, parts_of, save, some_bytes, write

pytestmark = pytest.mark.asyncio


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> FsspecStorage:
    if request.param == "local":
        return FsspecStorage(LocalFileSystem(), str(tmp_path / "runs"))
    return FsspecStorage(MemoryFileSystem(), f"/{secrets.token_hex(4)}")


async def test_a_root_that_is_a_path(tmp_path: Path) -> None:
    await save(FsspecStorage(LocalFileSystem(), tmp_path / "runs"), "a", some_bytes(10))
    assert await FsspecStorage(LocalFileSystem(), str(tmp_path / "runs")).list() == ["a"]


def files(storage: Any) -> list[str]:
    fs, root = storage._bucket._filesystem()
    return sorted(path.removeprefix(root) for path in fs.find(root)) if fs.exists(root) else []


WITHDRAWN = b'{"format": "aiostage", "version": 1, "data": null}'
"""The pointer of a checkpoint whose commit was taken back."""


class WithoutSizes(MemoryFileSystem):
    def find(self, *arguments: Any, **options: Any) -> Any:
        found = super().find(*arguments, **options)
        return {name: {key: value for key, value in info.items() if key != "size"} for name, info in found.items()}


async def test_a_file_system_need_not_say_how_long_files_are() -> None:
    storage = FsspecStorage(WithoutSizes(), f"/{secrets.token_hex(4)}")
    await save(storage, "a", some_bytes(10))
    await save(storage, "b", some_bytes(10))
    await storage._bucket.put("b/checkpoint.json", memoryview(WITHDRAWN))
    assert await storage.list() == ["a"]


@pytest.mark.parametrize("nbytes", [0, 1, 3 * PART + 5])
async def test_what_is_written_is_read(storage: FsspecStorage, nbytes: int) -> None:
    data = some_bytes(nbytes)
    assert await storage.list() == []
    await save(storage, "a/b", data)
    assert await storage.list() == ["a/b"]
    assert await content(storage, "a/b") == (bytes(data[:100]), bytes(data))
    with pytest.raises(CheckpointExistsError):
        await storage.open("a/b")
    await save(storage, "a/b", some_bytes(10), overwrite=True)
    assert (await content(storage, "a/b"))[1] == bytes(some_bytes(10))
    assert len(files(storage)) == 4
    await storage.delete("a/b")
    assert files(storage) == []
    with pytest.raises(CheckpointNotFoundError):
        await storage.read("a/b")


async def test_of_two_writers_one_wins(storage: FsspecStorage) -> None:
    won: list[bytes] = []

    async def writer(seed: int) -> None:
        data = some_bytes(1000, seed)
        pending = await storage.open("a")
        await write(pending, "data", data)
        await anyio.lowlevel.checkpoint()
        try:
            await pending.commit(data[:100])
            won.append(bytes(data))
        except CheckpointExistsError:
            await pending.abort()

    pending = await storage.open("a")
    async with anyio.create_task_group() as group:
        for seed in range(3):
            group.start_soon(writer, seed)
    with pytest.raises(CheckpointExistsError):
        await pending.commit(memoryview(b"{}"))
    await pending.abort()
    if isinstance(storage._bucket._filesystem()[0], LocalFileSystem):  # type: ignore[attr-defined]
        assert len(won) == 1
        assert (await content(storage, "a"))[1] == won[0]
        assert len(files(storage)) == 4


@pytest.mark.parametrize("links", [True, False])
async def test_local_pointers_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """However the calls of two writers fall, both having seen that there is none."""

    def without_links(source: str, target: str) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), target)

    if not links:
        monkeypatch.setattr(os, "link", without_links)
    monkeypatch.setattr(LocalFileSystem, "exists", lambda fs, path: False)
    bucket = FsspecStorage(LocalFileSystem(), str(tmp_path))._bucket
    await bucket.create("a/pointer", memoryview(b"first"))
    with pytest.raises(FileExistsError):
        await bucket.create("a/pointer", memoryview(b"second"))
    assert (await bucket.get("a/pointer", at_most=10)).data == b"first"
    assert os.listdir(tmp_path / "a") == ["pointer"]


async def test_a_local_file_is_replaced_whole(tmp_path: Path) -> None:
    bucket = FsspecStorage(LocalFileSystem(), str(tmp_path))._bucket
    await bucket.put("a/pointer", memoryview(b"first"))
    with (tmp_path / "a/pointer").open("rb") as seen:
        await bucket.put("a/pointer", memoryview(b"second"))
        assert seen.read() == b"first"
    assert (tmp_path / "a/pointer").read_bytes() == b"second"
    assert os.listdir(tmp_path / "a") == ["pointer"]


async def test_a_local_file_is_replaced_only_in_the_state_that_was_seen(tmp_path: Path) -> None:
    bucket = FsspecStorage(LocalFileSystem(), str(tmp_path))._bucket
    await bucket.put("a/pointer", memoryview(b"first"))
    seen = (await bucket.get("a/pointer", at_most=10)).version
    await bucket.replace("a/pointer", memoryview(b"second"), seen)
    with pytest.raises(FileExistsError):
        await bucket.replace("a/pointer", memoryview(b"third"), seen)
    assert (tmp_path / "a/pointer").read_bytes() == b"second"
    await bucket.delete(["a/pointer"])
    with pytest.raises(FileExistsError):
        await bucket.replace("a/pointer", memoryview(b"third"), seen)
    assert os.listdir(tmp_path / "a") == []
    with pytest.raises(FileExistsError):
        await bucket.replace("b/pointer", memoryview(b"third"), seen)


async def test_parts_that_fail(storage: FsspecStorage) -> None:
    async def failing() -> AsyncIterator[memoryview]:
        yield some_bytes(4096)
        raise OSError("no more")

    pending = await storage.open("a")
    with pytest.raises(OSError, match=r"^no more$"):
        await pending.write("data", 8192, failing())
    with pytest.raises(CheckpointError, match="expected 5 bytes, but its parts have"):
        await pending.write("other", 5, parts_of(some_bytes(4)))
    await pending.abort()
    assert files(storage) == []


def grow_old(storage: Any, name: str, seconds: float) -> None:
    """Let the files of a checkpoint have been changed so long ago."""
    fs, root = storage._bucket._filesystem()
    then = datetime.now(UTC) - timedelta(seconds=seconds)
    for path in fs.find(f"{root}/{name}"):
        if isinstance(fs, LocalFileSystem):
            os.utime(path, (then.timestamp(), then.timestamp()))
        else:
            fs.store[path].created = then


async def test_stale_files_go_once_its_lease_is_over(storage: FsspecStorage) -> None:
    await save(storage, "a", some_bytes(10))
    await write(await storage.open("b"), "data", some_bytes(10))
    await storage.clean_up()
    assert len(files(storage)) == 6
    for name in ("a", "b"):
        grow_old(storage, name, 3500)
    await storage.clean_up()
    assert len(files(storage)) == 6
    for name in ("a", "b"):
        grow_old(storage, name, 3605)
    await storage.clean_up()
    assert len(files(storage)) == 4
    assert await storage.list() == ["a"]


async def test_without_a_lease_there_is_no_heartbeat(storage: FsspecStorage) -> None:
    pending = await storage.open("a")
    bucket, (lease,) = storage._bucket, [file for file in files(storage) if file.endswith("lease.json")]
    path = lease[lease.index("a/data-") :]
    beat = partial(bucket.touch, path.replace("lease", "heartbeat"), b"{}", beside=path)
    await anyio.to_thread.run_sync(beat)
    assert len(files(storage)) == 2
    await bucket.delete([path, path.replace("lease", "heartbeat")])
    with pytest.raises(FileNotFoundError):
        await anyio.to_thread.run_sync(beat)
    assert files(storage) == []
    await pending.abort()


async def test_where_writing_is_not_allowed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    storage = FsspecStorage(LocalFileSystem(), str(tmp_path / "file"))
    with pytest.raises(StorageError, match=f"file://{tmp_path}/file/a/"):
        await storage.open("a")


async def test_urls(tmp_path: Path) -> None:
    storage, name = locate(f"fsspec+file://{tmp_path}/runs/7")
    assert (repr(storage), name) == (f"FsspecStorage('file://{tmp_path}/runs')", "7")
    await save(storage, name, some_bytes(10))
    assert os.listdir(tmp_path / "runs/7")
    storage, _ = locate("nonsense://host/a")
    with pytest.raises(StorageError, match="nonsense://host: there is no file system for nonsense://"):
        await storage.list()


class TellsTimes(MemoryFileSystem):
    """Tells in a way of its own when files were changed. All are old but the one that tells a clean-up the time."""

    cachable = False
    age = timedelta(0)

    def __init__(self, tell: Callable[[datetime], dict[str, Any]]) -> None:
        super().__init__()
        self.tell = tell

    def find(self, path: str, *arguments: Any, detail: bool = False, **options: Any) -> Any:
        found = super().find(path, *arguments, detail=True, **options)
        now = datetime.now(UTC)
        for name, info in found.items():
            del info["created"]
            info |= {"mtime": now.timestamp()} if "clock" in name else self.tell(now - self.age)
        return found if detail else list(found)


@pytest.mark.parametrize(
    ("tell", "understood"),
    [
        (lambda time: {"mtime": time.timestamp()}, True),
        (lambda time: {"LastModified": time}, True),
        (lambda time: {"last_modified": time.astimezone(timezone(timedelta(hours=9)))}, True),
        (lambda time: {"updated": time.isoformat().replace("+00:00", "Z")}, True),
        (lambda time: {"created": time.replace(tzinfo=None)}, True),
        (lambda time: {"updated": "yesterday"}, False),
        (lambda time: {}, False),
    ],
    ids=["seconds", "datetime", "another zone", "text", "no zone", "words", "nothing"],
)
async def test_file_systems_tell_in_many_ways_when_a_file_was_changed(
    tell: Callable[[datetime], dict[str, Any]], understood: bool
) -> None:
    fs = TellsTimes(tell)
    storage = FsspecStorage(fs, f"/{secrets.token_hex(4)}")
    await write(await storage.open("b"), "data", some_bytes(10))
    before = files(storage)
    for fs.age, removed in ((timedelta(seconds=3500), False), (timedelta(seconds=3605), understood)):
        await storage.clean_up()
        assert files(storage) == ([] if removed else before)


class WithoutEmptyRanges(MemoryFileSystem):
    """Like a server that speaks HTTP, which has no bytes 0 to N of an empty file."""

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        if start is not None and start >= self.info(path)["size"]:
            raise OSError("416 Range Not Satisfiable")
        return super().cat_file(path, start, end, **kwargs)


async def test_what_is_empty_is_read_where_no_range_of_it_can_be() -> None:
    fs, root = WithoutEmptyRanges(), f"/{secrets.token_hex(4)}"
    storage = FsspecStorage(fs, root)
    await save(storage, "a", some_bytes(0))
    assert await content(storage, "a") == (b"", b"")
    fs.pipe_file(f"{root}/b/checkpoint.json", b"")
    with pytest.raises(CheckpointCorruptError, match=r"b/checkpoint.json: it is not the pointer of a checkpoint"):
        await storage.read("b")
