"""A task that is cancelled before its first turn leaves nothing behind, and Python warns of no coroutine in it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

import aiostage
from aiostage import AsyncStager, Checkpointer, CheckpointStager, dcp
from aiostage.weights import WeightPublisher

T = TypeVar("T")

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]


class OfAnother(CheckpointStager):
    """A stager of the user's."""

    def __init__(self, stager: AsyncStager) -> None:
        self._stager = stager

    async def stage(self, state_dict: T) -> T:
        return await self._stager.stage(state_dict)

    async def aclose(self) -> None:
        await self._stager.aclose()


async def cancelled_at_once(call: Callable[[], Coroutine[Any, Any, object]]) -> None:
    task = asyncio.create_task(call())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    # asyncio drops the error in its next turn.
    await asyncio.sleep(0)
    # A warning of a coroutine that was never awaited would come now, and fail the test.
    gc.collect()


async def test_what_a_stager_returns() -> None:
    state = {"a": torch.ones(3)}
    async with AsyncStager() as stager:
        await cancelled_at_once(lambda: stager.stage(state))
        await cancelled_at_once(lambda: stager.prewarm(state))
        await cancelled_at_once(lambda: stager.restore(state, state))
        assert (await stager.stage(state))["a"].tolist() == [1, 1, 1]
        assert stager.statistics().leases == 0


async def test_what_saves_return(tmp_path: Path) -> None:
    state = {"a": torch.ones(3)}
    async with AsyncStager() as inner:
        for stager in (None, inner, OfAnother(inner)):
            await cancelled_at_once(lambda stager=stager: aiostage.save(state, tmp_path / "a", stager=stager))
            async with Checkpointer(tmp_path / "run", stager) as checkpoints:
                await cancelled_at_once(lambda checkpoints=checkpoints: checkpoints.save(1, state))
                await cancelled_at_once(lambda checkpoints=checkpoints: checkpoints.restore())
        await cancelled_at_once(lambda: aiostage.load(tmp_path / "a"))
    assert list(tmp_path.glob("**/manifest.json")) == []


async def test_what_saves_of_many_ranks_return(tmp_path: Path) -> None:
    state = {"a": torch.ones(3)}
    await cancelled_at_once(lambda: dcp.save(state, checkpoint_id=tmp_path / "a", no_dist=True))
    await cancelled_at_once(lambda: dcp.load(state, checkpoint_id=tmp_path / "a", no_dist=True))
    async with dcp.Checkpointer(tmp_path / "run", no_dist=True) as checkpoints:
        await cancelled_at_once(lambda: checkpoints.save(1, state))
        await cancelled_at_once(lambda: checkpoints.restore(dict(state)))
        await cancelled_at_once(checkpoints.latest)
        # What was given up holds up nothing.
        await (await checkpoints.save(2, state)).committed()
        assert await checkpoints.steps() == [2]


async def test_what_a_publisher_returns(tmp_path: Path) -> None:
    weights = {"a": torch.ones(3)}
    for target in (tmp_path / "socket", f"file://{tmp_path}/weights"):
        async with WeightPublisher(target) as publisher:
            await cancelled_at_once(lambda publisher=publisher: publisher.publish(weights))
            assert publisher.versions == ()
            assert await publisher.publish(weights) == 1
