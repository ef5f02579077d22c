"""The checkpoints of a run of many ranks."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from aiostage import CheckpointError, CheckpointNotFoundError, RankFailedError, UnsupportedLeafError, dcp
from aiostage.abc import MultiWriterCheckpoint
from aiostage.storage import LocalStorage
from tests.checkpoint.test_checkpointer import until
from tests.dcp.test_together import sharded
from tests.dcp.world import World
from tests.patience import seconds

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def state(number: int) -> dict[str, Any]:
    return {"w": torch.full((100,), float(number)), "step": number}


class Held(LocalStorage):
    """A storage in which no checkpoint begins before it is told to go."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.go = threading.Event()

    async def open(self, name: str, *, overwrite: bool = False) -> MultiWriterCheckpoint:
        await asyncio.to_thread(self.go.wait, seconds(30))
        return await super().open(name, overwrite=overwrite)


class HeldRemovals(LocalStorage):
    """A storage that removes nothing before it is told to go."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.go = anyio.Event()
        self.removals: list[str] = []

    async def delete(self, name: str) -> None:
        self.removals.append(name)
        await self.go.wait()
        await super().delete(name)


@pytest.mark.asyncio
class TestAlone:
    async def test_saves_keeps_and_restores(self, tmp_path: Path) -> None:
        async with dcp.Checkpointer(tmp_path, keep=2, keep_also=lambda step: step == 1) as checkpoints:
            assert await checkpoints.latest() is None
            with pytest.raises(CheckpointNotFoundError, match="no checkpoint of a run"):
                await checkpoints.restore(state(0))
            live = state(0)
            for number in range(5):
                live["w"].fill_(number)
                live["step"] = number
                handle = await checkpoints.save(number, live)
                live["w"].fill_(-1)
            await handle.committed()
        assert handle.done()
        checkpoints = dcp.Checkpointer(tmp_path)
        assert await checkpoints.steps() == [1, 3, 4]
        into = state(0)
        assert await checkpoints.restore(into) == 4
        assert (into["w"].unique().tolist(), into["step"]) == ([4], 4)
        assert await checkpoints.restore(into, 1) == 1
        assert into["w"].unique().tolist() == [1]
        with pytest.raises(RankFailedError, match="step-00000002"):
            await checkpoints.restore(into, 2)

    async def test_a_save_keeps_its_place_no_longer_than_until_it_is_committed(self, tmp_path: Path) -> None:
        storage = HeldRemovals(tmp_path)
        async with dcp.Checkpointer(storage, keep=1) as checkpoints:
            # One at once. If a save kept its place during removals, the third would wait for the removal of the first.
            try:
                with anyio.fail_after(seconds(20)):
                    for number in range(5):
                        handle = await checkpoints.save(number, state(number))
                        await handle.committed()
                await until(lambda: bool(storage.removals))
                assert storage.removals == ["step-00000000"], "one removal at a time"
                assert await checkpoints.steps() == [0, 1, 2, 3, 4]
            finally:
                storage.go.set()
        assert storage.removals == [f"step-{number:08}" for number in range(4)]
        assert await dcp.Checkpointer(storage).steps() == [4]

    async def test_saves_that_were_captured_before_end_first(self, tmp_path: Path) -> None:
        async with dcp.Checkpointer(tmp_path, max_in_flight=2) as checkpoints:
            await checkpoints.save(1, state(1))
            assert await checkpoints.latest() == 1
            await checkpoints.save(2, state(2))
            await checkpoints.save(3, state(3))
            into = state(0)
            assert await checkpoints.restore(into) == 3
            assert into["step"] == 3

    async def test_a_step_that_is_there_fails_and_is_reported_at_the_end(self, tmp_path: Path) -> None:
        async with dcp.Checkpointer(tmp_path) as checkpoints:
            await checkpoints.save(1, state(1))
        with pytest.raises(RankFailedError, match="CheckpointExistsError"):
            async with dcp.Checkpointer(tmp_path) as checkpoints:
                await checkpoints.save(1, state(2))
        async with dcp.Checkpointer(tmp_path) as checkpoints:
            handle = await checkpoints.save(1, state(2))
            with pytest.raises(RankFailedError):
                await handle.committed()
        into = state(0)
        await dcp.Checkpointer(tmp_path).restore(into)
        assert into["step"] == 1

    async def test_what_cannot_be_staged_frees_its_place(self, tmp_path: Path) -> None:
        async with dcp.Checkpointer(tmp_path) as checkpoints:
            with pytest.raises(UnsupportedLeafError):
                await checkpoints.save(1, {"w": torch.zeros(1, device="meta")})
            await checkpoints.save(1, state(1))
        assert await checkpoints.steps() == [1]

    async def test_a_save_that_is_cancelled_while_it_waits_for_its_turn(self, tmp_path: Path) -> None:
        storage = Held(tmp_path)
        async with dcp.Checkpointer(storage) as checkpoints:
            await checkpoints.save(1, state(1))
            waiting = asyncio.create_task(checkpoints.save(2, state(2)))
            for _ in range(5):
                await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            # It does not warn that it was dropped.
            del waiting
            gc.collect()
            storage.go.set()
            await (await checkpoints.save(3, state(3))).committed()
            assert await checkpoints.steps() == [1, 3]

    async def test_a_save_that_waits_for_its_turn_when_the_block_is_left(self, tmp_path: Path) -> None:
        storage = Held(tmp_path)
        async with dcp.Checkpointer(storage) as checkpoints:
            await checkpoints.save(1, state(1))
            waiting = asyncio.create_task(checkpoints.save(2, state(2)))
            for _ in range(5):
                await asyncio.sleep(0)
            asyncio.get_running_loop().call_later(0.05, storage.go.set)
        with pytest.raises(CheckpointError, match="was left"):
            await waiting
        del waiting
        gc.collect()
        assert await checkpoints.steps() == [1]

    async def test_opened_in_one_task_and_closed_in_another(self, tmp_path: Path) -> None:
        checkpoints = dcp.Checkpointer(tmp_path)
        await asyncio.create_task(checkpoints.open())
        with pytest.raises(CheckpointError, match="entered before"):
            await checkpoints.open()
        await asyncio.create_task(checkpoints.save(1, state(1)))
        await asyncio.create_task(checkpoints.save(1, state(2)))
        with pytest.raises(RankFailedError, match="CheckpointExistsError"):
            await asyncio.create_task(checkpoints.aclose())
        await checkpoints.aclose()
        assert await checkpoints.steps() == [1]

    async def test_closing_on_another_loop_is_refused(self, tmp_path: Path) -> None:
        checkpoints = dcp.Checkpointer(tmp_path)
        await checkpoints.open()
        with pytest.raises(CheckpointError, match="another event loop"):
            await asyncio.to_thread(asyncio.run, checkpoints.aclose())
        await checkpoints.save(1, state(1))
        await checkpoints.aclose()
        assert await checkpoints.steps() == [1]

    async def test_it_is_used_inside_its_block(self, tmp_path: Path) -> None:
        checkpoints = dcp.Checkpointer(tmp_path)
        with pytest.raises(CheckpointError, match="not entered"):
            checkpoints.save(1, state(1))
        async with checkpoints:
            pass
        with pytest.raises(CheckpointError, match="was left"):
            checkpoints.save(1, state(1))
        for wrong in ({"keep": 0}, {"max_in_flight": 0}, {"keep_also": bool}):
            with pytest.raises(ValueError, match=r"must be an integer of at least 1|goes with keep"):
                dcp.Checkpointer(tmp_path, **wrong)


async def a_run(path: str) -> tuple[list[int], int, bool]:
    async with dcp.Checkpointer(path, keep=2, timeout=30) as checkpoints:
        assert await checkpoints.latest() is None
        for number in range(4):
            live = {"w": sharded(number), "step": number}
            await checkpoints.save(number, live)
            live["w"].to_local().zero_()
    into = {"w": sharded(100), "step": -1}
    loaded = await dcp.Checkpointer(path, timeout=30).restore(into)
    dist.barrier()
    same = torch.equal(into["w"].to_local(), sharded(3).to_local()) and isinstance(into["w"], DTensor)
    return await dcp.Checkpointer(path).steps(), loaded, same and into["step"] == 3


def test_on_two_ranks(pair: World, tmp_path: Path) -> None:
    assert pair.run(a_run, str(tmp_path)) == [([2, 3], 3, True)] * 2


async def cancelled_on_one(path: str) -> str:
    storage = Held(Path(path))
    async with dcp.Checkpointer(storage, timeout=30) as checkpoints:
        await checkpoints.save(1, {"w": sharded(1)})
        second = asyncio.create_task(checkpoints.save(2, {"w": sharded(2)}))
        for _ in range(5):
            await asyncio.sleep(0)
        if dist.get_rank() == 1:
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
        storage.go.set()
        if dist.get_rank() == 1:
            return ""
        with pytest.raises(RankFailedError) as failed:
            await (await second).committed()
    return str(failed.value)


def test_a_save_that_is_cancelled_on_one_rank_while_it_waits_says_so_on_the_other(pair: World, tmp_path: Path) -> None:
    first, _ = pair.run(cancelled_on_one, str(tmp_path))
    assert "rank 1 failed: StagingError: the save was cancelled before the state was captured" in first
    assert [name for name in os.listdir(tmp_path) if name.startswith("step-")] == ["step-00000001"]


async def different_steps(path: str) -> str:
    checkpoints = dcp.Checkpointer(path, timeout=30)
    async with checkpoints:
        handle = await checkpoints.save(dist.get_rank(), {"w": sharded(1)})
        with pytest.raises(RankFailedError) as failed:
            await handle.committed()
    return str(failed.value)


def test_ranks_that_save_different_steps_get_an_error(pair: World, tmp_path: Path) -> None:
    for told in pair.run(different_steps, str(tmp_path)):
        assert "rank 1 failed" in told
        assert "step-00000001" in told
    assert not [name for name in os.listdir(tmp_path) if name.startswith("step-")]


async def preempted(path: str) -> list[int]:
    stopped = []
    async with dcp.Checkpointer(path, timeout=30, save_on_signals=[signal.SIGUSR1]) as checkpoints:
        for step in range(1, 100):
            if step == 3 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
                # The handler runs on the event loop.
                await checkpoints.preempted.wait()
            await asyncio.to_thread(dist.barrier)
            if await checkpoints.should_stop(step):
                stopped.append(step)
                await checkpoints.save(step, {"w": sharded(step)})
                break
    return stopped + await checkpoints.steps()


def test_one_rank_that_is_preempted_stops_all_at_the_same_step(pair: World, tmp_path: Path) -> None:
    assert pair.run(preempted, str(tmp_path)) == [[4, 4], [4, 4]]
