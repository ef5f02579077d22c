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
from tests.dcp.test_together import groups
from tests.dcp.world import World

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
    deadline = time.monotonic() + TIMEOUT
    while len(list(Path(path).parent.glob("told-*"))) < 2:
        assert time.monotonic() < deadline, "the others wait for the one that hangs"
        time.sleep(0.01)


async def save_whole(path: str) -> None:
    await dcp.save({"a": torch.ones(5)}, checkpoint_id=path, timeout=TIMEOUT)


async def struck(path: str, how: str, timeout: float) -> tuple[dict[int, str], float, int]:
    # So that the test need not wait for long; it has to be longer than a busy machine takes to answer.
    barrier.GRACE = 2.5
    writer = Strikes(f"{path}-new", {"die": die, "hang": hang}[how])
    begin = time.monotonic()
    async with AsyncStager() as stager:
        with pytest.raises(RankFailedError) as raised:
            await dcp.save({"a": torch.zeros(5)}, storage_writer=writer, stager=stager, timeout=timeout)
        waited = time.monotonic() - begin
        if dist.get_rank() < 2:
            Path(path).with_name(f"told-{dist.get_rank()}").touch()
        leases = stager.statistics().leases
    assert raised.value.lost
    assert groups() == []
    assert not Path(f"{path}-new", ".metadata").exists()
    into = {"a": torch.zeros(5)}
    await dcp.load(into, checkpoint_id=path, no_dist=True)
    assert into["a"].sum() == 5
    return raised.value.failures, waited, leases


async def without_the_dead(path: str) -> dict[int, str]:
    with pytest.raises(RankFailedError) as raised:
        await dcp.save({"a": torch.ones(5)}, checkpoint_id=f"{path}-later", timeout=1.5)
    assert not raised.value.lost
    return raised.value.failures


async def without_the_store(path: str) -> tuple[dict[int, str], bool]:
    begin = time.monotonic()
    with pytest.raises(RankFailedError) as raised:
        await dcp.save({"a": torch.ones(5)}, checkpoint_id=f"{path}-later", timeout=TIMEOUT)
    assert time.monotonic() - begin < TIMEOUT / 2
    return raised.value.failures, raised.value.lost


def test_a_rank_that_hangs_and_one_that_is_killed(tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    with World(3) as world:
        world.run(save_whole, path)

        outcomes = world.run(struck, path, "hang", 2.0)
        for failures, _, leases in outcomes:
            assert failures == {2: "it keeps the others waiting"}
            assert leases == 0
        # It is back, and they find together again.
        world.run(save_whole, path)

        outcomes = world.run(struck, path, "die", TIMEOUT, answering=[0, 1])
        for failures, waited, leases in outcomes:
            assert failures == {2: "its process was lost"}
            assert waited < TIMEOUT / 2
            assert leases == 0
        for failures in world.run(without_the_dead, path, ranks=[0, 1]):
            assert failures == {2: "it did not arrive within 1.5 seconds"}

        world.lose_the_store()
        for failures, lost in world.run(without_the_store, path, ranks=[0, 1]):
            assert list(failures) == [0]
            assert failures[0].startswith("the store of the process group")
            assert lost
