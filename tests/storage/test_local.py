"""LocalStorage through the suite for storages."""

from __future__ import annotations

import os
import signal
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import fsspec
import pytest
from obstore.store import MemoryStore

from aiostage import CheckpointCorruptError
from aiostage.abc import MultiWriterStorage, Storage
from aiostage.storage import FsspecStorage, LocalStorage, ObjectStorage
from aiostage.testing import StorageSuite
from tests.checkpoint.memory_storage import MANIFEST
from tests.forking import run_forking
from tests.storage.buckets import files_below, save_small
from tests.warm import PYTHON

KILLED = """
    import asyncio, os, signal, sys
    from aiostage.storage import LocalStorage

    async def parts():
        yield memoryview(bytes(5))

    async def main():
        pending = await LocalStorage(sys.argv[1]).open(sys.argv[2])
        await pending.write("file.bin", 5, parts())
        os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(main())
"""


class LocalSuite(StorageSuite):
    @pytest.fixture(autouse=True)
    def _root(self, tmp_path: Path) -> None:
        self.root = tmp_path / "root"

    def make_storage(self) -> Storage:
        return LocalStorage(self.root)

    async def leave_stale_files(self, storage: Storage, name: str) -> None:
        program = [*PYTHON, "-c", textwrap.dedent(KILLED), str(self.root), name]
        outcome = await anyio.run_process(program, check=False)
        assert outcome.returncode == -signal.SIGKILL, outcome.stderr

    async def count_stale_files(self, storage: Storage) -> int:
        directories = [Path(path) for path, _, _ in os.walk(self.root)]
        holders = {path for path in directories if (path / MANIFEST).exists()}
        above = {self.root, *(parent for path in holders for parent in path.parents)}
        return len([path for path in directories if path not in holders | above])


@pytest.mark.asyncio
class TestLocalStorage(LocalSuite):
    pass


@pytest.mark.anyio
class TestLocalStorageOnTrio(LocalSuite):
    pass


@pytest.mark.asyncio
async def test_a_root_in_bytes(tmp_path: Path) -> None:
    root: Any = os.fsencode(tmp_path)
    await save_small(LocalStorage(root), "a")
    assert await LocalStorage(tmp_path).list() == ["a"]


@pytest.mark.one_loop
@pytest.mark.asyncio
class TestLargeParts(LocalSuite):
    """Large enough for direct I/O, and for several parts to be under way."""

    part_bytes = 1 << 20


FORKING = """
from aiostage import CheckpointError
from aiostage.storage.commit import PendingDirectory
from aiostage.storage.files import open_directory, try_lock_directory

def is_free():
    with open_directory(pending.path) as directory:
        return try_lock_directory(directory)

def child():
    assert not is_free()
    try:
        pending.publish(overwrite=False)
    except CheckpointError as error:
        assert "does not own the files" in str(error)
    else:
        raise AssertionError("it was published")
    pending.discard()

pending = PendingDirectory("ROOT/target")
in_child(child)
assert os.path.isdir(pending.path) and not is_free()

runs, say = os.pipe()
end, go_on = os.pipe()
other = os.fork()
if other == 0:
    os.write(say, b".")
    os.read(end, 1)
    os._exit(0)
os.read(runs, 1)
# As if this process died, but not the other.
pending._directory.close()
free = is_free()
os.write(go_on, b".")
os.waitpid(other, 0)
assert free
"""


def test_a_pending_directory_belongs_to_the_process_that_made_it(tmp_path: Path) -> None:
    run_forking(FORKING.replace("ROOT", str(tmp_path)))


@pytest.mark.asyncio
async def test_removing_a_link_leaves_what_it_leads_to(tmp_path: Path) -> None:
    archive, run = LocalStorage(tmp_path / "archive"), LocalStorage(tmp_path / "run")
    await save_small(archive, "a", "b")
    await save_small(run, "c")
    (tmp_path / "run" / "a").symlink_to("../archive/a")
    (tmp_path / "run" / "twice").symlink_to("a")
    before = files_below(tmp_path / "archive")
    assert sorted(await run.list()) == ["a", "c", "twice"]
    await run.prune_files("a", [])
    await run.delete("twice")
    assert sorted(await run.list()) == ["a", "c"]
    await run.delete("a")
    assert await run.list() == ["c"]
    assert files_below(tmp_path / "archive") == before
    assert sorted(os.listdir(tmp_path / "run")) == ["c"]


@pytest.mark.asyncio
async def test_removing_through_a_root_that_is_a_link(tmp_path: Path) -> None:
    await save_small(LocalStorage(tmp_path / "real"), "a", "b")
    (tmp_path / "link").symlink_to("real")
    await LocalStorage(tmp_path / "link").delete("a")
    assert await LocalStorage(tmp_path / "real").list() == ["b"]
    assert (tmp_path / "link").is_symlink()


@pytest.mark.asyncio
async def test_links_named_like_drafts_are_not_followed(tmp_path: Path) -> None:
    archive, run = LocalStorage(tmp_path / "archive"), LocalStorage(tmp_path / "run")
    await save_small(archive, "a")
    await save_small(run, "c")
    before = files_below(tmp_path / "archive")
    for name in (".c.aiostage-0123456789abcdef", ".c.aiostage-0123456789abcdee.old", ".d.aiostage-0123456789abcdef"):
        (tmp_path / "run" / name).symlink_to("../archive/a")
    await run.clean_up()
    await save_small(run, "d")
    await run.delete("c")
    await run.clean_up()
    assert files_below(tmp_path / "archive") == before


@pytest.mark.asyncio
async def test_links_inside_a_checkpoint_are_removed_and_not_followed(tmp_path: Path) -> None:
    archive, run = LocalStorage(tmp_path / "archive"), LocalStorage(tmp_path / "run")
    await save_small(archive, "a")
    await save_small(run, "b", "c")
    before = files_below(tmp_path / "archive")
    for name in ("b", "c"):
        (tmp_path / "run" / name / "file").symlink_to("../../archive/a/file.bin")
        (tmp_path / "run" / name / "directory").symlink_to("../../archive/a")
        (tmp_path / "run" / name / "below").mkdir()
    await run.prune_files("b", [])
    assert sorted(os.listdir(tmp_path / "run" / "b")) == ["below", MANIFEST]
    await run.delete("b")
    await run.delete("c")
    assert os.listdir(tmp_path / "run") == []
    assert files_below(tmp_path / "archive") == before


@pytest.mark.asyncio
async def test_no_file_is_written_outside_of_a_checkpoint(tmp_path: Path) -> None:
    pending = await LocalStorage(tmp_path / "root").open("a")

    async def parts() -> AsyncIterator[memoryview]:
        yield memoryview(b"12345")

    names: list[Any] = ["../file.bin", str(tmp_path / "file.bin"), "", ".", "..", "a\0b", b"file.bin", None]
    for name in names:
        with pytest.raises(ValueError, match="is not a plain name for a file"):
            await pending.write(name, 5, parts())
    for nbytes, error in ((None, TypeError), ("5", TypeError), (5.0, TypeError), (-1, ValueError)):
        with pytest.raises(error, match="nbytes must be"):
            await pending.write("file.bin", nbytes, parts())  # type: ignore[arg-type]
    await pending.abort()
    assert files_below(tmp_path) == []


def test_wrong_arguments_of_remote_storages() -> None:
    wrong: Any
    for wrong in (None, "file", 3, type(fsspec.filesystem("memory"))):
        with pytest.raises(TypeError, match="filesystem must be a file system of fsspec, not "):
            FsspecStorage(wrong)
    for wrong in (None, 3, b"a"):
        with pytest.raises(TypeError, match="root must be a str, not "):
            FsspecStorage(fsspec.filesystem("memory"), wrong)
    for wrong in (None, 3, b"a", Path("a")):
        with pytest.raises(TypeError, match="prefix must be a str, not "):
            ObjectStorage(MemoryStore(), wrong)
        for kind in (FsspecStorage, ObjectStorage):
            with pytest.raises(TypeError, match="url must be a str, not "):
                kind.from_url(wrong)


@pytest.mark.asyncio
@pytest.mark.parametrize("make", [LocalStorage, lambda root: FsspecStorage(fsspec.filesystem("file"), str(root))])
async def test_wrong_arguments_change_nothing(make: Callable[[Path], MultiWriterStorage], tmp_path: Path) -> None:
    storage = make(tmp_path)
    await save_small(storage, "a")
    before = files_below(tmp_path)
    wrong: Any
    # As text it would be true, and replace the checkpoint.
    for wrong in ("false", None, 0):
        with pytest.raises(TypeError, match="overwrite must be True or False, not "):
            await storage.open("a", overwrite=wrong)
    # The name of one file as text: those whose names are not a part of it would be removed.
    for wrong in (MANIFEST, b"a", None, 3):
        with pytest.raises(TypeError, match="keep must be a collection of names, not "):
            await storage.prune_files("a", wrong)
    for wrong in (None, b"a", 3):
        with pytest.raises(TypeError, match="the name of a checkpoint is a str, not "):
            await storage.delete(wrong)
        with pytest.raises(ValueError, match="is not the token of a pending checkpoint"):
            await storage.attach("a", wrong)
    reader = await storage.read("a")
    for wrong in (None, b"a", ["a"]):
        with pytest.raises(CheckpointCorruptError, match="is not a plain name for a file"):
            await reader.size(wrong)
    await reader.aclose()
    assert files_below(tmp_path) == before


@pytest.mark.asyncio
async def test_a_name_with_a_null_byte_is_refused_by_name(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    for call in (storage.open, storage.read, storage.delete, storage.is_link):
        with pytest.raises(ValueError, match=r"'a\\x00b' is not a name of a checkpoint"):
            await call("a\0b")
