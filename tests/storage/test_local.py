"""LocalStorage through the suite for storages."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
from pathlib import Path

import anyio
import pytest

from aiostage.abc import Storage
from aiostage.storage.commit import MANIFEST_NAME
from aiostage.storage.local import LocalStorage
from aiostage.testing import StorageSuite
from tests.forking import run_forking

KILLED = """
    import asyncio, os, signal, sys
    from aiostage.storage.local import LocalStorage

    async def parts():
        yield memoryview(bytes(5))

    async def main():
        draft = await LocalStorage(sys.argv[1]).open(sys.argv[2])
        await draft.write("file.bin", 5, parts())
        os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(main())
"""


class LocalSuite(StorageSuite):
    @pytest.fixture(autouse=True)
    def _root(self, tmp_path: Path) -> None:
        self.root = tmp_path / "root"

    def make_storage(self) -> Storage:
        return LocalStorage(self.root)

    async def leave_debris(self, storage: Storage, name: str) -> None:
        program = [sys.executable, "-c", textwrap.dedent(KILLED), str(self.root), name]
        outcome = await anyio.run_process(program, check=False)
        assert outcome.returncode == -signal.SIGKILL, outcome.stderr

    async def count_debris(self, storage: Storage) -> int:
        directories = [Path(path) for path, _, _ in os.walk(self.root)]
        holders = {path for path in directories if (path / MANIFEST_NAME).exists()}
        above = {self.root, *(parent for path in holders for parent in path.parents)}
        return len([path for path in directories if path not in holders | above])


@pytest.mark.asyncio
class TestLocalStorage(LocalSuite):
    pass


@pytest.mark.anyio
class TestLocalStorageOnTrio(LocalSuite):
    pass


@pytest.mark.asyncio
class TestLargeParts(LocalSuite):
    """Large enough for direct I/O, and for several parts to be under way."""

    part_bytes = 1 << 20


FORKING = """
from aiostage import CheckpointError
from aiostage.storage.commit import DraftDirectory
from aiostage.storage.directories import open_directory, try_lock

def is_free():
    with open_directory(draft.path) as directory:
        return try_lock(directory)

def child():
    assert not is_free()
    try:
        draft.publish(overwrite=False)
    except CheckpointError as error:
        assert "this process's" in str(error)
    else:
        raise AssertionError("it was published")
    draft.discard()

draft = DraftDirectory("ROOT/target")
in_child(child)
assert os.path.isdir(draft.path) and not is_free()

runs, say = os.pipe()
end, go_on = os.pipe()
other = os.fork()
if other == 0:
    os.write(say, b".")
    os.read(end, 1)
    os._exit(0)
os.read(runs, 1)
# As if this process died, but not the other.
draft._directory.close()
free = is_free()
os.write(go_on, b".")
os.waitpid(other, 0)
assert free
"""


def test_a_draft_is_that_of_the_process_that_has_made_it(tmp_path: Path) -> None:
    run_forking(FORKING.replace("ROOT", str(tmp_path)))
