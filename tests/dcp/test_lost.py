"""Ranks that hang in the middle of a save, or are killed there. The functions above the tests run in the ranks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter

from aiostage import AsyncStager, RankFailedError, dcp
from aiostage.dcp import barrier
from tests.dcp.test_together import NEVER, groups
from tests.dcp.world import World
from tests.patience import seconds

TIMEOUT = 20.0


class Strikes(FileSystemWriter):
    """Does something on the last rank when it is to write."""

    def __init__(self, path: str, strike: Callable[[str], object]) -> None:
        super().__init__(path)
        self._strike = strike

    def write_data(self, plan: Any, planner: Any) -> Any:
        if dist.get_rank() == dist.get_world_size() - 1:
            self._strike(str(self.path))
        return super().write_data(plan, planner)


def die(path: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(path: str) -> None:
    """Hang until the other ranks are told that it does."""
    while len(list(Path(path).parent.glob("told-*"))) < 2:
        time.sleep(0.01)


async def save_whole(path: str) -> None:
    await dcp.save({"a": torch.ones(5)}, checkpoint_id=path, timeout=TIMEOUT)


async def struck(path: str, how: str, timeout: float, grace: float) -> tuple[dict[int, str], int]:
    barrier.GRACE = grace
    writer = Strikes(f"{path}-new", {"die": die, "hang": hang}[how])
    async with AsyncStager() as stager:
        with pytest.raises(RankFailedError) as raised:
            await dcp.save({"a": torch.zeros(5)}, storage_writer=writer, stager=stager, timeout=timeout)
        if dist.get_rank() < 2:
            Path(path).with_name(f"told-{dist.get_rank()}").touch()
        leases = stager.statistics().leases
    assert raised.value.lost
    assert groups() == []
    assert not Path(f"{path}-new", ".metadata").exists()
    into = {"a": torch.zeros(5)}
    await dcp.load(into, checkpoint_id=path, no_dist=True)
    assert into["a"].sum() == 5
    return raised.value.failures, leases


async def without_the_dead(path: str, timeout: float) -> dict[int, str]:
    with pytest.raises(RankFailedError) as raised:
        await dcp.save({"a": torch.ones(5)}, checkpoint_id=f"{path}-later", timeout=timeout)
    assert not raised.value.lost
    return raised.value.failures


async def without_the_store(path: str) -> tuple[dict[int, str], bool]:
    with pytest.raises(RankFailedError) as raised:
        await dcp.save({"a": torch.ones(5)}, checkpoint_id=f"{path}-later", timeout=NEVER)
    return raised.value.failures, raised.value.lost


def test_a_rank_that_hangs_and_one_that_is_killed(tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    # So that the test need not wait for long. They have to be longer than a busy machine takes to arrive and to answer.
    arrival, grace = seconds(0.4), seconds(0.6)
    with World(3) as world:
        world.run(save_whole, path)

        outcomes = world.run(struck, path, "hang", arrival, grace)
        for failures, leases in outcomes:
            assert failures == {2: "it keeps the others waiting"}
            assert leases == 0
        # It is back, and they find together again.
        world.run(save_whole, path)

        outcomes = world.run(struck, path, "die", NEVER, grace, answering=[0, 1])
        for failures, leases in outcomes:
            assert failures == {2: "its process was lost"}
            assert leases == 0
        for failures in world.run(without_the_dead, path, arrival, ranks=[0, 1]):
            assert failures == {2: f"it did not arrive within {arrival:g} seconds"}

        world.lose_the_store()
        for failures, lost in world.run(without_the_store, path, ranks=[0, 1]):
            assert list(failures) == [0]
            assert failures[0].startswith("the store of the process group")
            assert lost
