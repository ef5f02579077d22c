"""Several processes that write the files of one checkpoint, here as several storages of one process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from aiostage.abc import Buffer, SharedStorage
from aiostage.errors import CheckpointError
from aiostage.storage import LocalStorage, ObjectStorage

pytestmark = pytest.mark.asyncio


@pytest.fixture(params=["local", "objects"])
def storages(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], SharedStorage]:
    if request.param == "local":
        return lambda: LocalStorage(tmp_path)
    return lambda: ObjectStorage.from_url(f"memory://joining-{tmp_path.name}")


async def one(data: bytes) -> AsyncIterator[Buffer]:
    yield memoryview(data)


async def read(storage: SharedStorage, name: str, file: str) -> bytes:
    reader = await storage.read(name)
    data = memoryview(bytearray(await reader.size(file)))
    await reader.read(file, 0, data)
    await reader.aclose()
    return bytes(data)


async def test_files_of_all_appear_together(storages: Callable[[], SharedStorage]) -> None:
    first, second = storages(), storages()
    draft = await first.open("a/b")
    joined = await second.join("a/b", await draft.ticket())
    assert joined.location == draft.location
    await joined.write("theirs", 6, one(b"theirs"))
    await draft.write("ours", 4, one(b"ours"))
    await joined.abort()
    assert await first.list() == []
    await draft.commit(memoryview(b"{}"))
    assert await second.list() == ["a/b"]
    assert await read(second, "a/b", "ours") == b"ours"
    assert await read(first, "a/b", "theirs") == b"theirs"


async def test_only_who_has_opened_it_commits(storages: Callable[[], SharedStorage]) -> None:
    draft = await storages().open("a")
    joined = await storages().join("a", await draft.ticket())
    with pytest.raises(CheckpointError, match="only the process that has opened it"):
        await joined.commit(memoryview(b"{}"))
    await draft.abort()
    assert await storages().list() == []


async def test_what_others_wrote_is_removed_too(storages: Callable[[], SharedStorage], tmp_path: Path) -> None:
    draft = await storages().open("a")
    joined = await storages().join("a", await draft.ticket())
    await joined.write("theirs", 6, one(b"theirs"))
    await draft.abort()
    assert list(tmp_path.iterdir()) == []
    again = await storages().open("a")
    await again.commit(memoryview(b"{}"))
    with pytest.raises(CheckpointError):
        await read(storages(), "a", "theirs")


@pytest.mark.parametrize("ticket", ["", "..", "../x", "zz", "data-0123456789abcdef/..", "/etc"])
async def test_wrong_tickets(storages: Callable[[], SharedStorage], ticket: str) -> None:
    with pytest.raises(ValueError, match="is not the ticket of a draft"):
        await storages().join("a", ticket)


async def test_a_draft_that_is_gone(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    draft = await storage.open("a")
    ticket = await draft.ticket()
    await draft.abort()
    with pytest.raises(FileNotFoundError, match="the draft is gone"):
        await storage.join("a", ticket)
