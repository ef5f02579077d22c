"""Links in stores that are directories: removing never follows one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem
from obstore.store import LocalStore

from aiostage.storage import FsspecStorage, ObjectStorage
from tests.storage.buckets import files_below, save_small


def storage_at(kind: str, root: Path) -> FsspecStorage | ObjectStorage:
    root.mkdir(exist_ok=True)
    return ObjectStorage(LocalStore(root)) if kind == "objects" else FsspecStorage(LocalFileSystem(), str(root))


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["objects", "fsspec"])
async def test_removing_a_link_leaves_what_it_leads_to(kind: str, tmp_path: Path) -> None:
    archive, run = storage_at(kind, tmp_path / "archive"), storage_at(kind, tmp_path / "run")
    await save_small(archive, "a")
    await save_small(archive, "b")
    before = files_below(tmp_path / "archive")
    # A checkpoint that is a link, and one whose folder is.
    (tmp_path / "run" / "a").symlink_to("../archive/a")
    (tmp_path / "run" / "b").mkdir()
    for entry in (tmp_path / "archive" / "b").iterdir():
        if entry.is_dir():
            (tmp_path / "run" / "b" / entry.name).symlink_to(f"../../archive/b/{entry.name}")
        else:
            (tmp_path / "run" / "b" / entry.name).write_bytes(entry.read_bytes())
    for name in ("a", "b"):
        into = bytearray(5)
        await (await run.read(name)).read("file.bin", 0, memoryview(into))
        assert into == b"12345"
        await run.prune_files(name, [])
        assert files_below(tmp_path / "archive") == before
        await run.delete(name)
    assert files_below(tmp_path / "archive") == before
    assert files_below(tmp_path / "run") == []
    assert not os.path.lexists(tmp_path / "run" / "a")
