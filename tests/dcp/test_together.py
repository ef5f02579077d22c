"""Saves and loads of two ranks together. The functions above the tests run in the ranks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from aiostage import AsyncStager, CheckpointStager, RankFailedError, StagingError, UnsupportedLeafError, dcp
from aiostage.dcp import group_queue
from tests.dcp.world import World

TIMEOUT = 20.0

NEVER = 3600.0
"""For calls that may find out nothing by waiting: the test ends long before."""


def sharded(start: float = 0.0) -> DTensor:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return distribute_tensor(torch.arange(start, start + 64).reshape(8, 8), mesh, [Shard(0)])


class Counter:
    """A Stateful."""

    def __init__(self, count: int) -> None:
        self.count = torch.tensor(count)
        self.loaded = False

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]
        self.loaded = True


def groups() -> list[str]:
    return [name for name in dist.distributed_c10d._world.pg_names.values() if name.startswith("aiostage")]


async def round_trip(path: str) -> tuple[list[str], int]:
    counter = Counter(4)
    state = {"sharded": sharded(), "step": 3, "nested": {"list": [1, torch.ones(3)]}, "counter": counter}
    metadata = await dcp.save(state, checkpoint_id=path, timeout=TIMEOUT)
    fresh = Counter(0)
    into = {"sharded": sharded(100), "step": 0, "nested": {"list": [0, torch.zeros(3)]}, "counter": fresh}
    await dcp.load(into, checkpoint_id=path, timeout=TIMEOUT)
    assert torch.equal(into["sharded"].to_local(), state["sharded"].to_local())  # type: ignore[attr-defined]
    assert (into["step"], into["nested"]["list"][0]) == (3, 1)  # type: ignore[index]
    assert fresh.count == 4
    assert fresh.loaded
    # Plain DCP reads what we wrote, and the other way round.
    plain = {"sharded": sharded(100)}
    checkpoint.load(plain, checkpoint_id=path)
    assert torch.equal(plain["sharded"].to_local(), state["sharded"].to_local())
    checkpoint.save({"sharded": state["sharded"], "step": 7}, checkpoint_id=f"{path}-plain")
    into = {"sharded": sharded(100), "step": 0}
    await dcp.load(into, checkpoint_id=f"{path}-plain", timeout=TIMEOUT)
    assert torch.equal(into["sharded"].to_local(), state["sharded"].to_local())
    assert into["step"] == 7
    return sorted(metadata.state_dict_metadata), len(groups())


async def the_moment_is_the_call(path: str) -> list[float]:
    counter, tensor = Counter(1), sharded()
    saving = dcp.start_save({"counter": counter, "tensor": tensor}, checkpoint_id=path, timeout=TIMEOUT)
    counter.count = torch.tensor(2)
    await saving.captured()
    tensor.to_local().zero_()
    metadata = await saving.committed()
    assert metadata is await saving.committed()
    into = {"counter": Counter(0), "tensor": sharded(100)}
    await dcp.load(into, checkpoint_id=path, timeout=TIMEOUT)
    assert into["counter"].count == 1  # type: ignore[attr-defined]
    return list(into["tensor"].full_tensor().flatten().tolist())  # type: ignore[attr-defined]


async def beside_training(path: str) -> int:
    """Collectives of training go on in the same process, in another order on each rank, while three saves run."""
    stager = AsyncStager()
    savings = [
        dcp.start_save({"n": torch.full((1000,), n)}, checkpoint_id=f"{path}-{n}", stager=stager, timeout=TIMEOUT)
        for n in range(3)
    ]
    # Staged in one order here and in the other there; carried out in the order of the calls on both.
    for saving in savings if dist.get_rank() == 0 else reversed(savings):
        await saving.captured()

    def train() -> int:
        total = torch.ones(())
        for _ in range(50):
            dist.all_reduce(total)
        return int(total.log2())

    trained = await asyncio.to_thread(train)
    for n, saving in enumerate(savings):
        await saving.committed()
        into = {"n": torch.zeros(1000)}
        await dcp.load(into, checkpoint_id=f"{path}-{n}", timeout=TIMEOUT)
        assert into["n"].unique().tolist() == [n]
    savings.clear()
    await stager.aclose()
    return trained


async def the_group_is_made_once_and_closed(path: str) -> None:
    await dcp.save({"a": torch.ones(1)}, checkpoint_id=path, timeout=TIMEOUT)
    first = groups()
    await dcp.save({"a": torch.ones(1)}, checkpoint_id=f"{path}-2", timeout=TIMEOUT)
    assert groups() == first
    assert len(first) == 1
    await dcp.close()
    assert groups() == []
    await dcp.close()
    await dcp.save({"a": torch.ones(1)}, checkpoint_id=f"{path}-3", timeout=TIMEOUT)
    assert len(groups()) == 1
    assert groups() != first


async def many(path: str) -> list[tuple[int, int]]:
    """Descriptors and threads after a few saves and after many, some of which fail."""
    counts = []
    async with AsyncStager() as stager:
        for number in range(12):
            state = {"a": torch.ones(1, device="meta" if number % 3 == 1 and dist.get_rank() else "cpu")}
            with contextlib.suppress(RankFailedError, UnsupportedLeafError):
                await dcp.save(state, checkpoint_id=f"{path}-{number}", stager=stager, timeout=TIMEOUT)
            counts.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
        assert stager.statistics().leases == 0
    return [counts[3], counts[-1]]


async def with_debugging(path: str) -> None:
    """TORCH_DISTRIBUTED_DEBUG=DETAIL wraps every group that is made."""
    await dcp.close()
    level = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    try:
        await dcp.save({"a": torch.ones(1)}, checkpoint_id=path, timeout=TIMEOUT)
        await dcp.close()
    finally:
        dist.set_debug_level(level)


async def over_part_of_the_ranks(path: str) -> str:
    mine = dist.new_group([1])
    if dist.get_rank() != 1:
        with pytest.raises(ValueError, match="rank 0 is not in the process group"):
            dcp.save({}, checkpoint_id=path, process_group=mine)
        return ""
    await dcp.save({"a": torch.ones(2)}, checkpoint_id=path, process_group=mine, timeout=TIMEOUT)
    await dcp.close(mine)
    return ",".join(sorted(os.listdir(path)))


class Breaks(checkpoint.FileSystemWriter):
    """Fails to write on one rank."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        if dist.get_rank() == 1:
            raise OSError(28, "No space left on device")
        return super().write_data(plan, planner)


KINDS = (RankFailedError, CheckpointException, UnsupportedLeafError, ZeroDivisionError)


async def failing(path: str, how: str) -> tuple[list[str], str, dict[int, str]]:
    await dcp.save({"a": torch.ones(2)}, checkpoint_id=path, timeout=TIMEOUT)
    before, group = dist.get_rank(), groups()
    state: dict[str, Any] = {"a": torch.zeros(2)}
    writer = None
    bad = dist.get_rank() == 1
    if how == "leaf" and bad:
        state["bad"] = torch.empty(2, device="meta")
    elif how == "stateful" and bad:
        state["bad"] = Counter(0)
        state["bad"].state_dict = lambda: 1 / 0
    elif how == "writer":
        writer = Breaks(f"{path}-new")
    elif how == "setup" and bad:
        writer = checkpoint.FileSystemWriter(f"{path}-new")
        writer.reset = lambda checkpoint_id=None: 1 / 0  # type: ignore[method-assign]
    with pytest.raises((StagingError, ZeroDivisionError)) as raised:
        await dcp.save(state, checkpoint_id=f"{path}-new", storage_writer=writer, timeout=NEVER)
    assert not getattr(raised.value, "lost", False)
    kinds = [kind.__name__ for kind in KINDS if isinstance(raised.value, kind)]
    outcome = kinds, str(raised.value), getattr(raised.value, "failures", {})
    # The previous checkpoint is there, no half of a new one is, and the group works on.
    assert not Path(f"{path}-new", ".metadata").exists()
    into = {"a": torch.zeros(2)}
    await dcp.load(into, checkpoint_id=path, timeout=TIMEOUT)
    assert into["a"].tolist() == [1, 1]
    assert groups() == group
    assert before == dist.get_rank()
    return outcome


async def failing_load(path: str) -> dict[int, str]:
    """Rank 1 wants what the checkpoint does not have."""
    await dcp.save({"a": torch.ones(2)}, checkpoint_id=path, timeout=TIMEOUT)
    group = groups()
    with pytest.raises(RankFailedError) as raised:
        await dcp.load({"a" if dist.get_rank() == 0 else "b": torch.zeros(2)}, checkpoint_id=path, timeout=TIMEOUT)
    assert groups() == group
    into = {"a": torch.zeros(2)}
    await dcp.load(into, checkpoint_id=path, timeout=TIMEOUT)
    assert into["a"].sum() == 2
    return raised.value.failures


async def cancelled_load(path: str) -> str:
    """Rank 1 is cancelled before rank 0 comes; what rank 0 has is as it was."""
    await dcp.save({"a": torch.ones(2)}, checkpoint_id=path, timeout=TIMEOUT)
    into = {"a": torch.zeros(2)}
    load = dcp.load(into, checkpoint_id=path, timeout=TIMEOUT)
    if dist.get_rank() == 1:
        task = asyncio.ensure_future(load)
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        dist.barrier()
        return ""
    dist.barrier()
    with pytest.raises(RankFailedError) as raised:
        await load
    assert into["a"].sum() == 0
    return str(raised.value)


class TellsWhenStaged(CheckpointStager):
    def __init__(self) -> None:
        self.staged = asyncio.Event()
        self._stager = AsyncStager()

    async def stage(self, state_dict: Any) -> Any:
        staged = await self._stager.stage(state_dict)
        self.staged.set()
        return staged

    async def aclose(self) -> None:
        await self._stager.aclose()


async def cancelled_while_waiting(path: str) -> str:
    """Rank 1 is cancelled before rank 0 comes."""
    async with TellsWhenStaged() as stager:
        call = dcp.save({"a": torch.ones(2)}, checkpoint_id=path, stager=stager, timeout=TIMEOUT)
        if dist.get_rank() == 1:
            task = asyncio.ensure_future(call)
            await stager.staged.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            outcome = "cancelled"
            dist.barrier()
        else:
            dist.barrier()
            with pytest.raises(RankFailedError) as raised:
                await call
            outcome = str(raised.value)
    await dcp.save({"a": torch.ones(2)}, checkpoint_id=path, timeout=TIMEOUT)
    return outcome


async def dropped(path: str) -> str:
    """Rank 1 never awaits its save."""
    saving = dcp.start_save({"a": torch.ones(2)}, checkpoint_id=path, timeout=TIMEOUT)
    if dist.get_rank() == 1:
        with pytest.warns(RuntimeWarning, match="dropped before"):
            del saving
        outcome = ""
    else:
        with pytest.raises(RankFailedError) as raised:
            await saving.committed()
        outcome = str(raised.value)
    await dcp.save({"a": torch.ones(2)}, checkpoint_id=path, timeout=TIMEOUT)
    return outcome


async def absent(path: str) -> list[str]:
    """Rank 1 does not come in time; when it does it gets the reason why the others have stopped waiting."""
    outcomes = []
    if dist.get_rank() == 1:
        dist.barrier()
    with pytest.raises(RankFailedError) as raised:
        await dcp.save({"a": torch.ones(2)}, checkpoint_id=path, timeout=0.5)
    outcomes.append(str(raised.value))
    if dist.get_rank() == 0:
        dist.barrier()
    await dcp.save({"a": torch.ones(2)}, checkpoint_id=path, timeout=TIMEOUT)
    return outcomes


async def keys_in_the_store(path: str) -> tuple[int, int]:
    store = dist.group.WORLD.get_group_store()  # type: ignore[union-attr]

    def ours() -> int:
        return sum("aiostage/" in key for key in store.list_keys())

    counts = []
    for number in range(6):
        await dcp.save({"a": torch.ones(2)}, checkpoint_id=f"{path}-{number}", timeout=TIMEOUT)
        dist.barrier()
        # A thread beside the save deletes the keys of the one before: those of one save remain.
        deadline = time.monotonic() + TIMEOUT
        while ours() > 6 and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        counts.append(ours())
        dist.barrier()
    return counts[2], counts[5]


class CountingStore:
    """A connection to a store that notes what is asked of it."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.asked.append(name)
        return getattr(self.store, name)


async def messages_before_the_collectives(path: str) -> list[list[str]]:
    """What the thread of saves and loads asks the store for, in a second and a third operation."""
    await dcp.save({"a": torch.ones(2)}, checkpoint_id=path, timeout=TIMEOUT)
    queue = group_queue._queue_of(None)
    found = []
    for _ in range(2):
        counting = CountingStore(queue._own_store)
        queue._own_store = counting
        await dcp.load({"a": torch.zeros(2)}, checkpoint_id=path, timeout=TIMEOUT)
        queue._own_store = counting.store
        found.append(counting.asked)
    return found


class TestTogether:
    def test_round_trip(self, pair: World, tmp_path: Path) -> None:
        names = ["counter.count", "nested.list.0", "nested.list.1", "sharded", "step"]
        assert pair.run(round_trip, str(tmp_path / "a")) == [(names, 1)] * 2

    def test_the_moment_is_the_call(self, pair: World, tmp_path: Path) -> None:
        assert pair.run(the_moment_is_the_call, str(tmp_path / "a")) == [list(range(64))] * 2

    def test_saves_are_carried_out_in_order_beside_training(self, pair: World, tmp_path: Path) -> None:
        assert pair.run(beside_training, str(tmp_path / "a")) == [50, 50]

    def test_the_group_is_made_once_and_can_be_closed(self, pair: World, tmp_path: Path) -> None:
        pair.run(the_group_is_made_once_and_closed, str(tmp_path / "a"))

    def test_nothing_grows(self, pair: World, tmp_path: Path) -> None:
        for few, many_ in pair.run(many, str(tmp_path / "a")):
            assert many_[0] <= few[0]
            # Two messengers may be needed at once, or have been idle for long enough to end.
            assert many_[1] <= few[1] + 2

    def test_with_debugging(self, pair: World, tmp_path: Path) -> None:
        pair.run(with_debugging, str(tmp_path / "a"))

    def test_over_part_of_the_ranks(self, pair: World, tmp_path: Path) -> None:
        assert pair.run(over_part_of_the_ranks, str(tmp_path / "a")) == ["", ".metadata,__0_0.distcp"]

    def test_the_store_does_not_fill_up(self, pair: World, tmp_path: Path) -> None:
        early, late = pair.run(keys_in_the_store, str(tmp_path / "a"))[0]
        assert early == late > 0

    def test_nothing_is_deleted_before_the_collectives(self, pair: World, tmp_path: Path) -> None:
        """Every message that is answered is a round trip for which all ranks wait."""
        for asked in chain(*pair.run(messages_before_the_collectives, str(tmp_path / "a"))):
            # The last to come decides at once; the others wait for that. A set is not answered.
            assert [name for name in asked if name != "set"] in (["add", "compare_set"], ["add", "wait", "compare_set"])


class TestOneRankFails:
    @pytest.mark.parametrize(
        ("how", "raised", "reason"),
        [
            ("leaf", UnsupportedLeafError, "UnsupportedLeafError: state_dict['bad']"),
            ("stateful", ZeroDivisionError, "ZeroDivisionError: division by zero"),
            ("setup", ZeroDivisionError, "ZeroDivisionError: division by zero"),
            ("writer", RankFailedError, "OSError: [Errno 28] No space left on device"),
        ],
    )
    def test_every_rank_gets_the_error(
        self, pair: World, tmp_path: Path, how: str, raised: type[Exception], reason: str
    ) -> None:
        others, own = pair.run(failing, str(tmp_path / "a"), how)
        # One of both kinds: users catch it as a RankFailedError, or as CheckpointException.
        assert others[0] == ["RankFailedError", "CheckpointException"]
        assert others[1].startswith(f"rank 1 failed: {reason}")
        assert list(others[2]) == [1]
        assert own[0] == (others[0] if raised is RankFailedError else [raised.__name__])

    def test_a_load(self, pair: World, tmp_path: Path) -> None:
        for failures in pair.run(failing_load, str(tmp_path / "a")):
            assert list(failures) == [1]
            assert "Missing key in checkpoint state_dict: b" in failures[1]

    def test_a_cancelled_load(self, pair: World, tmp_path: Path) -> None:
        outcomes = pair.run(cancelled_load, str(tmp_path / "a"))
        assert outcomes[0].startswith("rank 1 failed: it was cancelled.")

    def test_cancelled_while_waiting(self, pair: World, tmp_path: Path) -> None:
        outcomes = pair.run(cancelled_while_waiting, str(tmp_path / "a"))
        assert outcomes[0].startswith("rank 1 failed: it was cancelled.")
        assert outcomes[1] == "cancelled"

    def test_never_awaited(self, pair: World, tmp_path: Path) -> None:
        assert pair.run(dropped, str(tmp_path / "a"))[0].startswith("rank 1 failed: its save or load was dropped")

    def test_absent(self, pair: World, tmp_path: Path) -> None:
        on_time, late = pair.run(absent, str(tmp_path / "a"))
        assert on_time[0].startswith("rank 1 failed: it did not arrive within 0.5 seconds.")
        assert late == on_time
