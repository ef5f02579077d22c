"""Pointers on disks are compared and replaced under the lock of their directory."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
from fsspec.implementations.local import LocalFileSystem

from aiostage import StorageError
from aiostage.storage import FsspecStorage
from aiostage.storage import files as module
from tests.storage.buckets import content, save, some_bytes

pytestmark = pytest.mark.asyncio


async def test_a_lock_that_is_held_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a process that was suspended in the wrong moment, say."""
    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.01)
    bucket = FsspecStorage(LocalFileSystem(), str(tmp_path))._bucket
    await bucket.put("a/pointer", memoryview(b"first"))
    seen = (await bucket.get("a/pointer", at_most=10)).version
    holder = module.locked_directory(str(tmp_path / "a"))
    assert await anyio.to_thread.run_sync(holder.__enter__)
    with pytest.raises(StorageError, match="another process has held its lock"):
        await bucket.replace("a/pointer", memoryview(b"second"), seen)
    await anyio.to_thread.run_sync(holder.__exit__, None, None, None)
    await bucket.replace("a/pointer", memoryview(b"second"), seen)


async def test_a_disk_without_locks_cannot_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "try_lock_directory", lambda _: None)
    storage = FsspecStorage(LocalFileSystem(), str(tmp_path))
    await storage._bucket.put("a/pointer", memoryview(b"first"))
    seen = (await storage._bucket.get("a/pointer", at_most=10)).version
    with pytest.raises(NotImplementedError):
        await storage._bucket.replace("a/pointer", memoryview(b"second"), seen)
    assert (tmp_path / "a/pointer").read_bytes() == b"first"
    for seed in range(2):
        await save(storage, "b", some_bytes(1000, seed), overwrite=True)
    assert (await content(storage, "b"))[1] == bytes(some_bytes(1000, 1))
