"""Files that were made or opened for nothing: none is left, and no descriptor."""

from __future__ import annotations

import errno
import os
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from aiostage.storage import LocalStorage, files, local
from aiostage.storage.files import InputFile, OutputFile
from tests.checkpoint.memory_storage import MANIFEST
from tests.patience import seconds
from tests.storage.buckets import save_small


def test_no_space_for_a_file_leaves_its_name_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files, "reserve_file", refuse)
        patch.setattr(files, "set_direct", lambda number, on: on)
        with pytest.raises(OSError, match="No space left"):
            OutputFile(str(tmp_path / "file.bin"), 1 << 20, direct=True)
    with OutputFile(str(tmp_path / "file.bin"), 0, direct=False):
        pass


@pytest.mark.asyncio
async def test_a_closed_reader_keeps_no_file_that_a_thread_was_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(tmp_path)
    await save_small(storage, "a")
    reader = await storage.read("a")
    assert isinstance(reader, local.LocalReader)
    opening, closed = threading.Event(), threading.Event()

    class Slow(InputFile):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            opening.set()
            assert closed.wait(seconds(30))
            super().__init__(*arguments, **options)
            opened.append(weakref.ref(self))

    opened: list[weakref.ref[InputFile]] = []
    monkeypatch.setattr(local, "InputFile", Slow)
    into = bytearray(1)
    thread = threading.Thread(target=reader.read_blocking, args=(MANIFEST, 0, memoryview(into)))
    thread.start()
    assert opening.wait(seconds(30))
    await reader.aclose()
    closed.set()
    thread.join()
    # The read that was under way has ended well, and nothing of it is left open.
    assert into != bytearray(1)
    assert [reference() for reference in opened] == [None]


@pytest.mark.asyncio
async def test_a_reader_is_closed_in_a_thread_that_is_looking_for_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector may close a coroutine anywhere, and that closes its reader."""
    storage = LocalStorage(tmp_path)
    await save_small(storage, "a")
    reader = await storage.read("a")
    assert isinstance(reader, local.LocalReader)
    closed = threading.Event()

    class Collected(InputFile):
        @property
        def descriptors(self) -> int:
            # Asked for with the reader's lock held.
            with suppress(StopIteration):
                reader.aclose().send(None)
            closed.set()
            return 1

    monkeypatch.setattr(local, "InputFile", Collected)
    into = bytearray(1)
    thread = threading.Thread(target=reader.read_blocking, args=(MANIFEST, 0, memoryview(into)), daemon=True)
    thread.start()
    assert closed.wait(seconds(10))
    thread.join()
    assert into != bytearray(1)
