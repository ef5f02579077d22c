"""FsspecStorage through the suite for storages: in local files and in memory."""

from __future__ import annotations

import os
import secrets
from datetime import UTC, datetime
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from aiostage.abc import Storage
from aiostage.storage import FsspecStorage
from aiostage.testing import StorageSuite
from tests.storage.buckets import is_pointer, some_bytes, strays, write


async def leave_behind(storage: Storage, name: str) -> str:
    """Leave a pending checkpoint whose writer goes away, and return where its folder is."""
    pending = await storage.open(name)
    await write(pending, "data", some_bytes(10))
    return f"{name}/data-{await pending.token()}"  # type: ignore[attr-defined]


@pytest.mark.asyncio
class TestLocalFiles(StorageSuite):
    @pytest.fixture(autouse=True)
    def _root(self, tmp_path: Path) -> None:
        self.root = tmp_path

    def make_storage(self) -> Storage:
        return FsspecStorage(LocalFileSystem(), str(self.root))

    async def count_stale_files(self, storage: Storage) -> int:
        paths = [str(path) for path in self.root.rglob("*") if path.is_file()]
        return len(strays(paths, {path: Path(path).read_bytes() for path in filter(is_pointer, paths)}))

    async def leave_stale_files(self, storage: Storage, name: str) -> None:
        for path in (self.root / await leave_behind(storage, name)).iterdir():
            os.utime(path, (0, 0))


@pytest.mark.asyncio
class TestMemory(StorageSuite):
    def make_storage(self) -> Storage:
        self.fs, self.root = MemoryFileSystem(), f"/{secrets.token_hex(4)}"
        return FsspecStorage(self.fs, self.root)

    async def count_stale_files(self, storage: Storage) -> int:
        paths = self.fs.find(self.root)
        return len(strays(paths, {path: self.fs.cat_file(path) for path in filter(is_pointer, paths)}))

    async def leave_stale_files(self, storage: Storage, name: str) -> None:
        for path in self.fs.find(f"{self.root}/{await leave_behind(storage, name)}"):
            self.fs.store[path].created = datetime.fromtimestamp(0, UTC)
