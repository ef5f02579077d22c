"""How users write it; checked by mypy --strict, never run."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, assert_type

import torch
from torch.distributed.checkpoint.metadata import Metadata

import aiostage
import aiostage.dcp
import aiostage.testing
from aiostage.abc import Storage


class Mine(aiostage.CheckpointStager):
    async def stage(self, state_dict: Any) -> Any:
        return state_dict

    async def aclose(self) -> None:
        return None


class Fence:
    def query(self) -> bool:
        return True


async def main(model: torch.nn.Module) -> None:
    options = aiostage.StagingOptions(dtype=lambda path, tensor: torch.bfloat16 if path else None, max_host_bytes=2**30)
    async with aiostage.AsyncStager(options) as stager:
        state: dict[str, torch.Tensor] = dict(model.state_dict())
        assert_type(await stager.stage(state), dict[str, torch.Tensor])
        ordered: OrderedDict[str, torch.Tensor] = OrderedDict(state)
        async with stager.snapshot(ordered) as snapshot:
            assert_type(snapshot, aiostage.Snapshot[OrderedDict[str, torch.Tensor]])
            async for leaf in snapshot:
                assert_type(leaf, aiostage.StagedLeaf)
                assert_type(leaf.tensor, torch.Tensor)
            assert_type(await snapshot.result(), OrderedDict[str, torch.Tensor])
        assert_type(stager.statistics().leases, int)
        info = await aiostage.save(state, "checkpoint", stager=stager)
        assert_type(info, aiostage.CheckpointInfo)
    async with aiostage.Checkpointer("run", keep=2, keep_also=lambda step: step % 1000 == 0) as checkpoints:
        handle = await checkpoints.save(1, state)
        assert_type(handle, aiostage.SaveHandle)
        assert_type(await handle.committed(), aiostage.CheckpointInfo)
        assert_type(await checkpoints.steps(), list[int])
        assert_type(await checkpoints.latest(), int | None)
        await checkpoints.restore(state)
        await checkpoints.preempted.wait()
    async with aiostage.adapt(object()) as adapted:
        assert_type(await adapted.stage([1]), list[int])
    async with Mine() as mine:
        await mine.stage(state)
    assert_type(await aiostage.dcp.save({"model": model}, checkpoint_id="a"), Metadata)
    response = aiostage.dcp.start_save({"model": model}, storage_writer=aiostage.dcp.StorageWriter("s3://bucket/run"))
    assert_type(response, aiostage.dcp.AsyncSaveResponse)
    assert_type(await response.committed(), Metadata)
    await aiostage.dcp.load({"model": model}, storage_reader=aiostage.dcp.StorageReader("checkpoints"))
    fence: aiostage.SupportsQuery = Fence()
    assert_type(fence.query(), bool)
    await aiostage.wait_event(fence)
    await aiostage.load("checkpoint", into=state, verify=False)
    theirs = aiostage.StagingOptions.from_torch(object(), max_loop_hold=0.002)
    assert_type(theirs, aiostage.StagingOptions)


def told(error: aiostage.StagingError) -> tuple[str, ...]:
    if isinstance(error, aiostage.TornSnapshotError):
        return error.paths
    if isinstance(error, aiostage.CheckpointMismatchError):
        return error.missing + error.unexpected + error.mismatched
    assert_type(error.path, str | None)
    assert_type(error.remedy, str | None)
    return (error.reason,)


class TestMine(aiostage.testing.StagerSuite):
    def make_stager(self) -> aiostage.CheckpointStager:
        return Mine()


class TestStorage(aiostage.testing.StorageSuite):
    def make_storage(self) -> Storage:
        raise NotImplementedError


async def watch(stager: aiostage.AsyncStager) -> None:
    with aiostage.testing.LoopProbe(threshold=0.05, inside=lambda file: "mine" in file) as probe:
        await stager.stage([1])
    assert_type(probe.holds, list[aiostage.testing.LoopHold])
    leaks = aiostage.testing.LeakProbe(stager)
    assert_type(leaks.leftovers(), aiostage.testing.Leftovers)
    async for number in aiostage.testing.at_every_await(lambda: stager.aclose()):
        assert_type(number, int)
