"""Who does not save incrementally does not pay for it: a load opens one checkpoint, and reads its manifest once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

import aiostage
from aiostage import Checkpointer, CheckpointNotFoundError
from aiostage.abc import Reader, Storage
from aiostage.storage import LocalStorage
from tests.checkpoint.comparing import assert_same
from tests.checkpoint.memory_storage import MemoryStorage
from tests.checkpoint.names import name_of
from tests.checkpoint.test_checkpointer import tree

READS: dict[str, Callable[[Storage], Awaitable[Any]]] = {
    "load": lambda storage: aiostage.load((storage, name_of(2))),
    "load into": lambda storage: aiostage.load((storage, name_of(2)), into=tree(0)),
    "load without checksums": lambda storage: aiostage.load((storage, name_of(2)), verify=False),
    "restore": lambda storage: Checkpointer(storage).restore(),
    "restore a step": lambda storage: Checkpointer(storage).restore(step=2),
    "restore into": lambda storage: Checkpointer(storage).restore(tree(0), step=2),
}


class Disk(LocalStorage):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.opened: list[str] = []

    async def read(self, name: str) -> Reader:
        self.opened.append(name)
        return await super().read(name)


class Memory(MemoryStorage):
    def __init__(self, root: Path) -> None:
        super().__init__()
        self.opened: list[str] = []

    async def read(self, name: str) -> Reader:
        self.opened.append(name)
        return await super().read(name)


@pytest.mark.asyncio
@pytest.mark.parametrize("how", READS)
@pytest.mark.parametrize("kind", [Disk, Memory])
async def test_one_checkpoint_is_opened_and_one_manifest_hashed(
    kind: Callable[[Path], Any], how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = kind(tmp_path)
    async with Checkpointer(storage) as checkpoints:
        for step in (1, 2):
            await checkpoints.save(step, tree(step))
    storage.opened.clear()
    hashed: list[bytes] = []
    digest = xxhash.xxh3_64_hexdigest

    def noted(data: Any) -> str:
        hashed.append(bytes(data[:20]))
        return digest(data)

    monkeypatch.setattr(xxhash, "xxh3_64_hexdigest", noted)
    assert_same(tree(2), await READS[how](storage))
    assert storage.opened == [name_of(2)]
    assert len([begin for begin in hashed if begin.startswith(b'{"format":"aiostage"')]) == 1


@pytest.mark.asyncio
async def test_a_missing_step_is_reported_with_those_that_are_there(tmp_path: Path) -> None:
    async with Checkpointer(tmp_path) as checkpoints:
        await checkpoints.save(1, tree(1))
    # A file of another program is not a checkpoint of the run.
    torch.save(tree(3), tmp_path / name_of(3))
    for step in (2, 3):
        with pytest.raises(CheckpointNotFoundError, match=rf"no checkpoint of step {step}\. There is one of 1\."):
            await Checkpointer(tmp_path).restore(step=step)


@pytest.mark.asyncio
async def test_a_removed_step_is_still_not_there() -> None:
    storage = MemoryStorage()
    async with Checkpointer(storage, incremental=True) as checkpoints:
        for step in (1, 2):
            await (await checkpoints.save(step, {"large": torch.ones(1 << 19)})).committed()
        await checkpoints.delete(1)
        assert name_of(1) in storage.checkpoints
        with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint of step 1\. There is one of 2\."):
            await checkpoints.restore(step=1)
