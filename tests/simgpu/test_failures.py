"""Corrupt checkpoints and failed devices are told apart, and no step of the loop waits for a device."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import aiostage
from aiostage import AsyncStager, CheckpointCorruptError, StagingError

pytestmark = pytest.mark.asyncio

DEVICE = "simgpu:0"


def sparse_tree() -> dict[str, torch.Tensor]:
    return {"sparse": torch.eye(300).to_sparse(), "dense": torch.arange(5.0)}


class TestSparse:
    async def test_no_step_of_the_loop_waits_for_the_device(self, tmp_path: Path) -> None:
        await aiostage.save(sparse_tree(), tmp_path / "a")
        torch.ones(1, device=DEVICE)
        torch.simgpu.copy_delay(2000, 5000)  # type: ignore[attr-defined]
        torch.simgpu.sync_watch(2)  # type: ignore[attr-defined]
        loaded = await aiostage.load(tmp_path / "a", device=DEVICE)
        torch.simgpu.sync_watch(0)  # type: ignore[attr-defined]
        assert loaded["sparse"].device == torch.device(DEVICE)
        assert loaded["sparse"].is_coalesced()
        assert torch.equal(loaded["sparse"]._indices().cpu(), torch.eye(300).to_sparse().indices())
        assert torch.equal(loaded["sparse"]._values().cpu(), torch.ones(300))

    @pytest.mark.parametrize("device", [None, DEVICE])
    async def test_indices_beyond_its_shape_are_corrupt(self, tmp_path: Path, device: str | None) -> None:
        bad = torch.sparse_coo_tensor(torch.tensor([[0, 9]]), torch.ones(2), (3,), check_invariants=False)
        await aiostage.save({"sparse": bad}, tmp_path / "a")
        with pytest.raises(CheckpointCorruptError):
            await aiostage.load(tmp_path / "a", device=device)

    async def test_a_full_device_is_no_corrupt_checkpoint(self, tmp_path: Path) -> None:
        await aiostage.save(sparse_tree(), tmp_path / "a")
        torch.ones(1, device=DEVICE)
        torch.simgpu.memory_limit(0, torch.simgpu.in_use(0))  # type: ignore[attr-defined]
        try:
            with pytest.raises(torch.OutOfMemoryError):
                await aiostage.load(tmp_path / "a", device=DEVICE)
        finally:
            torch.simgpu.memory_limit(0, -1)  # type: ignore[attr-defined]

    async def test_a_kernel_that_failed_before_is_no_corrupt_checkpoint(self, tmp_path: Path) -> None:
        await aiostage.save(sparse_tree(), tmp_path / "a")
        torch.ones(1, device=DEVICE)
        torch.simgpu.fail_later(3000, 0)  # type: ignore[attr-defined]
        with pytest.raises(StagingError) as caught:
            await aiostage.load(tmp_path / "a", device=DEVICE)
        assert not isinstance(caught.value, CheckpointCorruptError)


class TestADeviceThatHasFailed:
    async def test_copies_no_more_when_it_works_again(self) -> None:
        """What it was to copy to is given back: it would write to memory that is gone, in the next test."""
        source, host = torch.ones(5000, device=DEVICE), torch.zeros(5000)
        gate = torch.simgpu.Gate(0)  # type: ignore[attr-defined]
        host.copy_(source, non_blocking=True)
        torch.simgpu.fail_device(True)  # type: ignore[attr-defined]
        torch.simgpu.fail_device(False)  # type: ignore[attr-defined]
        gate.release()
        torch.simgpu.drain()  # type: ignore[attr-defined]
        assert not host.any()

    async def test_order_before_says_so_in_our_words(self) -> None:
        live = {"a": torch.ones(5000, device=DEVICE)}
        async with AsyncStager() as stager, stager.snapshot(live) as snapshot:
            torch.simgpu.fail_device(True)  # type: ignore[attr-defined]
            with pytest.raises(StagingError, match="did not accept the copy"):
                snapshot.order_before()

    @pytest.mark.parametrize("into", ["load", "restore", "in place"])
    async def test_writing_to_it_is_a_staging_error(self, into: str, tmp_path: Path) -> None:
        live, values = {"a": torch.ones(5000, device=DEVICE)}, {"a": torch.zeros(5000)}
        await aiostage.save(values, tmp_path / "a")
        torch.simgpu.fail_device(True)  # type: ignore[attr-defined]
        async with AsyncStager() as stager:
            loading = aiostage.load(tmp_path / "a", into=live, in_place=into == "in place")
            restoring = stager.restore(values, into=live)
            with pytest.raises(StagingError):
                await (restoring if into == "restore" else loading)
            (loading if into == "restore" else restoring).close()


class Copied:
    """Copies itself by what it holds."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Copied:
        return Copied(copy.deepcopy(self.value, memo))


class Computed:
    """Shows what it holds through its own reduction only."""

    def __init__(self, value: Any) -> None:
        self.get = {"value": value}.__getitem__

    def __reduce__(self) -> Any:
        return Computed, (self.get("value"),)


@pytest.mark.parametrize(
    "hide",
    [lambda tensor: tensor.untyped_storage(), lambda tensor: Copied(Computed(tensor))],
    ids=["storage", "hidden"],
)
async def test_what_only_the_code_of_an_object_leads_to_does_not_stay_on_the_device(hide: Any) -> None:
    tensor = torch.ones(4, device=DEVICE)
    async with AsyncStager() as stager:
        with pytest.raises(aiostage.UnsupportedLeafError, match=r"state_dict\['hidden'\]"):
            await stager.stage({"hidden": hide(tensor)})
        staged = await stager.stage({"tensor": tensor, "known": Copied([tensor])})
        assert staged["known"].value[0] is staged["tensor"]
        assert staged["tensor"].tolist() == [1] * 4
