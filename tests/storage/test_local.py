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
