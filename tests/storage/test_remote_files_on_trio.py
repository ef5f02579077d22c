"""Nothing about file systems of fsspec needs asyncio."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
from fsspec.implementations.local import LocalFileSystem

from aiostage.storage import FsspecStorage
from tests.storage.buckets import content, save, some_bytes, write


@pytest.mark.anyio
async def test_what_is_written_is_read(tmp_path: Path) -> None:
    storage = FsspecStorage(LocalFileSystem(), str(tmp_path))
    data = some_bytes(3 * 4096)
    await save(storage, "a", data)
    assert await content(storage, "a") == (bytes(data[:100]), bytes(data))
    await storage.clean_up()
    assert await storage.list() == ["a"]


@pytest.mark.anyio
@pytest.mark.parametrize("steps", range(0, 16, 2))
async def test_cancelled_at_any_await(tmp_path: Path, steps: int) -> None:
    storage = FsspecStorage(LocalFileSystem(), str(tmp_path))

    async def whole() -> None:
        pending = await storage.open("a")
        try:
            await write(pending, "data", some_bytes(2 * 4096), 4096)
            await pending.commit(some_bytes(100))
        except BaseException:
            await pending.abort()
            raise

    async with anyio.create_task_group() as group:
        group.start_soon(whole)
        for _ in range(steps):
            await anyio.sleep(0.0005)
        group.cancel_scope.cancel()
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not left or await storage.list() == ["a"]
