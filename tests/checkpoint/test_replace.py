"""Saving a step again: what is replaced, and what must not be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from obstore.store import LocalStore

import aiostage
from aiostage import Checkpointer, CheckpointExistsError
from aiostage.abc import Storage
from aiostage.storage import FsspecStorage, LocalStorage, ObjectStorage
from aiostage.testing import at_every_await
from tests.checkpoint.comparing import assert_same
from tests.checkpoint.memory_storage import MemoryStorage
from tests.checkpoint.names import name_of
from tests.checkpoint.test_checkpointer import Gate, settled, tree, until

KINDS = ["local", "objects", "fsspec"]


def storage_at(kind: str, root: Path) -> Storage:
    root.mkdir(parents=True, exist_ok=True)
    if kind == "local":
        return LocalStorage(root)
    return ObjectStorage(LocalStore(root)) if kind == "objects" else FsspecStorage(LocalFileSystem(), str(root))


@pytest.mark.asyncio
@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_step_is_replaced(kind: str, incremental: bool, tmp_path: Path) -> None:
    storage = storage_at(kind, tmp_path)
    async with Checkpointer(storage) as checkpoints:
        for step in (1, 2):
            await checkpoints.save(step, tree(step))
    async with Checkpointer(storage, incremental=incremental) as checkpoints:
        with pytest.raises(CheckpointExistsError, match="replace=True"):
            await checkpoints.save(1, tree(7))
        await (await checkpoints.save(1, tree(7), replace=True)).committed()
        # Again, and one that is new.
        for step, value in ((1, 8), (3, 3)):
            await (await checkpoints.save(step, tree(value), replace=True)).committed()
        assert await checkpoints.steps() == [1, 2, 3]
        for step, value in ((1, 8), (2, 2), (3, 3)):
            assert_same(tree(value), await checkpoints.restore(step=step))
    assert await storage.pending() == []


@pytest.mark.asyncio
async def test_the_old_one_is_there_until_the_new_one_is() -> None:
    storage = MemoryStorage()
    async with Checkpointer(storage) as checkpoints:
        await (await checkpoints.save(1, tree(1))).committed()
        gate = Gate(storage)
        handle = await checkpoints.save(1, tree(2), replace=True)
        with pytest.raises(CheckpointExistsError, match="being saved already"):
            await checkpoints.save(1, tree(3), replace=True)
        await until(lambda: gate.waiting == 1)
        assert_same(tree(1), await checkpoints.restore())
        gate.refuse = True
        gate.open.set()
        with pytest.raises(OSError, match="No space left"):
            await handle.committed()
        assert_same(tree(1), await checkpoints.restore())


@pytest.mark.asyncio
async def test_cancelled_at_every_await_it_is_the_old_one_or_the_new() -> None:
    storage = MemoryStorage()
    async with Checkpointer(storage) as checkpoints:
        await (await checkpoints.save(1, tree(1))).committed()
        rounds = 0

        async def replace() -> None:
            await (await checkpoints.save(1, tree(2), replace=True)).committed()

        async for _ in at_every_await(replace):
            rounds += 1
            await settled(checkpoints)
            found = await checkpoints.restore()
            assert_same(tree(found["step"]), found)
            await (await checkpoints.save(1, tree(1), replace=True)).committed()
        assert rounds > 2
        assert_same(tree(2), await checkpoints.restore())


@pytest.mark.asyncio
@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_linked_step_is_not(kind: str, incremental: bool, tmp_path: Path) -> None:
    archive, run = storage_at(kind, tmp_path / "archive"), storage_at(kind, tmp_path / "run")
    async with Checkpointer(archive) as checkpoints:
        await checkpoints.save(1, tree(1))
    (tmp_path / "run" / name_of(1)).symlink_to(f"../archive/{name_of(1)}")
    async with Checkpointer(run, incremental=incremental) as checkpoints:
        with pytest.raises(CheckpointExistsError, match="a link to a checkpoint"):
            await checkpoints.save(1, tree(9), replace=True)
        assert_same(tree(1), await Checkpointer(archive).restore())
        # The way out.
        await checkpoints.delete(1)
        await checkpoints.save(1, tree(9), replace=True)
    assert not os.path.islink(tmp_path / "run" / name_of(1))
    assert_same(tree(9), await Checkpointer(run).restore())
    assert_same(tree(1), await Checkpointer(archive).restore())


@pytest.mark.asyncio
@pytest.mark.parametrize("incremental", [False, True])
async def test_what_others_refer_to_is_not(incremental: bool, tmp_path: Path) -> None:
    large = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))

    def state(step: int) -> dict[str, Any]:
        return {"step": step, "large": large}

    async with Checkpointer(tmp_path, incremental=True) as checkpoints:
        for step in (1, 2, 3):
            await (await checkpoints.save(step, state(step))).committed()
    async with Checkpointer(tmp_path, incremental=incremental) as checkpoints:
        for step in (1, 2, 3):
            with pytest.raises(CheckpointExistsError, match="saved incrementally"):
                await checkpoints.save(step, state(9), replace=True)
        for step in (1, 2, 3):
            assert_same(state(step), await checkpoints.restore(step=step))
        # The way out.
        await checkpoints.delete(3)
        await checkpoints.delete(2)
        await (await checkpoints.save(2, state(9), replace=True)).committed()
        assert_same(state(9), await checkpoints.restore())
        assert_same(state(1), await checkpoints.restore(step=1))


@pytest.mark.asyncio
@pytest.mark.parametrize("incremental", [False, True])
async def test_what_replaces_one_is_not_referred_to(incremental: bool, tmp_path: Path) -> None:
    """A process that has seen the first one remembers that no checkpoint refers to it, and removes all of it."""
    async with Checkpointer(tmp_path) as first, Checkpointer(tmp_path, incremental=incremental) as second:
        await (await first.save(1, tree(1))).committed()
        await first.delete(0)
        await (await second.save(1, tree(2), replace=True)).committed()
        await (await second.save(2, tree(2))).committed()
        await first.delete(1)
        assert_same(tree(2), await second.restore(step=2))
        assert await second.steps() == [2]


@pytest.mark.asyncio
async def test_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    async with Checkpointer(tmp_path, incremental=True) as checkpoints:
        await checkpoints.save(1, tree(1))
    (tmp_path / name_of(1) / "manifest.json").write_bytes(b"damaged")
    async with Checkpointer(tmp_path, incremental=True) as checkpoints:
        await checkpoints.save(1, tree(2), replace=True)
    assert_same(tree(2), await Checkpointer(tmp_path).restore())


@pytest.mark.asyncio
async def test_what_is_no_checkpoint_is_not(tmp_path: Path) -> None:
    (tmp_path / name_of(1)).mkdir()
    (tmp_path / name_of(1) / "notes").write_bytes(b"mine")
    async with Checkpointer(tmp_path) as checkpoints:
        handle = await checkpoints.save(1, tree(1), replace=True)
        with pytest.raises(CheckpointExistsError):
            await handle.committed()
    assert (tmp_path / name_of(1) / "notes").read_bytes() == b"mine"


@pytest.mark.asyncio
@pytest.mark.parametrize("behind", ["local", "remote"])
async def test_two_tiers_that_were_committed_by_halves_go_on(behind: str, tmp_path: Path) -> None:
    """A run that died between two commits starts again from what both have, and saves the steps after it again."""
    tiers = {
        "local": LocalStorage(tmp_path / "local"),
        "remote": ObjectStorage(LocalStore(tmp_path, mkdir=True), "far"),
    }

    async def save(step: int, value: int, names: list[str], **options: Any) -> None:
        for name in names:
            async with Checkpointer(tiers[name], keep=3) as checkpoints:
                await checkpoints.save(step, tree(value), **options)

    await save(1, 1, ["local", "remote"])
    await save(2, 2, [name for name in tiers if name != behind])
    common = set.intersection(*[set(await Checkpointer(tier).steps()) for tier in tiers.values()])
    start = max(common)
    assert start == 1
    assert_same(tree(1), await Checkpointer(tiers[behind]).restore(step=start))
    # The step is not the same as before the run died.
    for step in (2, 3):
        await save(step, 10 * step, ["local", "remote"], replace=True)
    for tier in tiers.values():
        checkpoints = Checkpointer(tier)
        assert await checkpoints.steps() == [1, 2, 3]
        assert_same(tree(20), await checkpoints.restore(step=2))
        assert_same(tree(30), await checkpoints.restore())


@pytest.mark.asyncio
async def test_replace_is_a_bool(tmp_path: Path) -> None:
    async with Checkpointer(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match="replace"):
            await checkpoints.save(1, tree(1), replace="no")  # type: ignore[arg-type]


def test_in_a_loop_without_coroutines(tmp_path: Path) -> None:
    with aiostage.blocking.Checkpointer(tmp_path) as checkpoints:
        for value in (1, 2):
            checkpoints.save(1, tree(value), replace=True).committed()
        assert_same(tree(2), checkpoints.restore())
