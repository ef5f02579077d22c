"""Several processes that write the files of one checkpoint, here as several storages of one process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from aiostage.abc import Buffer, MultiWriterStorage
from aiostage.errors import CheckpointError
from aiostage.storage import LocalStorage, ObjectStorage

pytestmark = pytest.mark.asyncio


@pytest.fixture(params=["local", "objects"])
def storages(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], MultiWriterStorage]:
    if request.param == "local":
        return lambda: LocalStorage(tmp_path)
    return lambda: ObjectStorage.from_url(f"memory://joining-{tmp_path.name}")


async def one(data: bytes) -> AsyncIterator[Buffer]:
    yield memoryview(data)


async def read(storage: MultiWriterStorage, name: str, file: str) -> bytes:
    reader = await storage.read(name)
    data = memoryview(bytearray(await reader.size(file)))
    await reader.read(file, 0, data)
    await reader.aclose()
    return bytes(data)


async def test_files_of_all_appear_together(storages: Callable[[], MultiWriterStorage]) -> None:
    first, second = storages(), storages()
    pending = await first.open("a/b")
    attached = await second.attach("a/b", await pending.token())
    assert attached.location == pending.location
    await attached.write("theirs", 6, one(b"theirs"))
    await pending.write("ours", 4, one(b"ours"))
    await attached.abort()
    assert await first.list() == []
    await pending.commit(memoryview(b"{}"))
    assert await second.list() == ["a/b"]
    assert await read(second, "a/b", "ours") == b"ours"
    assert await read(first, "a/b", "theirs") == b"theirs"


async def test_only_the_process_that_has_opened_it_commits(storages: Callable[[], MultiWriterStorage]) -> None:
    pending = await storages().open("a")
    attached = await storages().attach("a", await pending.token())
    with pytest.raises(CheckpointError, match="only the process that has opened it"):
        await attached.commit(memoryview(b"{}"))
    await pending.abort()
    assert await storages().list() == []


async def test_what_others_wrote_is_removed_too(storages: Callable[[], MultiWriterStorage], tmp_path: Path) -> None:
    pending = await storages().open("a")
    attached = await storages().attach("a", await pending.token())
    await attached.write("theirs", 6, one(b"theirs"))
    await pending.abort()
    assert list(tmp_path.iterdir()) == []
    again = await storages().open("a")
    await again.commit(memoryview(b"{}"))
    with pytest.raises(CheckpointError):
        await read(storages(), "a", "theirs")


@pytest.mark.parametrize("token", ["", "..", "../x", "zz", "data-0123456789abcdef/..", "/etc"])
async def test_wrong_tickets(storages: Callable[[], MultiWriterStorage], token: str) -> None:
    with pytest.raises(ValueError, match="is not the token of a pending checkpoint"):
        await storages().attach("a", token)


async def test_a_draft_that_is_gone(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    pending = await storage.open("a")
    token = await pending.token()
    await pending.abort()
    with pytest.raises(FileNotFoundError, match="the pending checkpoint is gone"):
        await storage.attach("a", token)
