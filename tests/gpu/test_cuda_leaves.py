"""Leaves on CUDA devices that are not plain: conjugate, negative, expanded, sparse; and live ones that are restored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import aiostage
from aiostage import AsyncStager, CheckpointMismatchError

pytestmark = [pytest.mark.gpu, pytest.mark.asyncio]

DEVICE = "cuda"
SIZE = 50_000
CYCLES_OF_A_LONG_KERNEL = 100_000_000


@pytest.mark.parametrize("kind", ["conj", "neg", "expanded"])
async def test_a_staged_view_is_not_written_to(kind: str) -> None:
    """PyTorch's record_stream writes old values of conjugate and negative leaves over new ones, and beyond them."""
    live = torch.full((SIZE,), 1 + 1j, device=DEVICE)
    leaf = {"conj": live.conj(), "neg": live.conj().imag, "expanded": live[:1].expand(SIZE)}[kind]
    torch.cuda.synchronize()
    async with AsyncStager() as stager:
        for _ in range(3):
            staging = stager.stage({"leaf": leaf})
            # What a thread does on its own streams is not ordered before the trainer's.
            torch.cuda._sleep(CYCLES_OF_A_LONG_KERNEL)
            staged = await staging
            with torch.cuda.stream(torch.cuda.Stream()):
                live.fill_(7 + 7j)
            torch.cuda.synchronize()
            assert bool((live.cpu() == 7 + 7j).all())
            assert bool((staged["leaf"] == {"conj": 1 - 1j, "neg": -1, "expanded": 1 + 1j}[kind]).all())
            live.fill_(1 + 1j)


async def test_conjugate_and_negative_live_tensors_are_restored() -> None:
    conj, neg = (torch.zeros(SIZE, dtype=torch.complex64, device=DEVICE) for _ in range(2))
    values = {"conj": torch.full((SIZE,), 1 + 2j), "neg": torch.full((SIZE,), 3.0)}
    async with AsyncStager() as stager:
        await stager.restore(values, into={"conj": conj.conj(), "neg": neg.conj().imag})
    assert bool((conj.cpu() == 1 - 2j).all())
    assert bool((neg.cpu().imag == -3).all())


async def test_a_restore_that_cannot_be_made_changes_nothing() -> None:
    first, expanded = torch.ones(4, device=DEVICE), torch.zeros(1, device=DEVICE).expand(4)
    async with AsyncStager() as stager:
        with pytest.raises(CheckpointMismatchError, match="expanded"):
            await stager.restore({"a": torch.zeros(4), "b": torch.arange(4.0)}, into={"a": first, "b": expanded})
    assert first.tolist() == [1] * 4


@pytest.mark.parametrize("target", ["cpu", DEVICE])
async def test_values_on_the_device_are_restored_after_a_late_write(target: str) -> None:
    values, live = torch.ones(SIZE, device=DEVICE), torch.zeros(SIZE, device=target)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    async with AsyncStager() as stager:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(CYCLES_OF_A_LONG_KERNEL)
            values.fill_(7)
            restoring = stager.restore({"a": values}, into={"a": live})
        await restoring
    assert bool((live.cpu() == 7).all())


@pytest.mark.parametrize("in_place", [False, True])
async def test_a_load_comes_after_a_late_write_on_the_stream_of_the_call(tmp_path: Path, in_place: bool) -> None:
    await aiostage.save({"a": torch.full((SIZE,), 3.0)}, tmp_path / "a")
    live = torch.zeros(SIZE, device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES_OF_A_LONG_KERNEL)
        live.fill_(7)
        loading = aiostage.load(tmp_path / "a", into={"a": live}, in_place=in_place)
    await loading
    torch.cuda.synchronize()
    assert bool((live.cpu() == 3).all())


async def test_sparse_leaves_are_staged_after_a_late_write_and_restored() -> None:
    live = torch.sparse_coo_tensor(
        torch.arange(SIZE)[None].to(DEVICE), torch.ones(SIZE, device=DEVICE), (SIZE,), check_invariants=False
    )
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    async with AsyncStager() as stager:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(CYCLES_OF_A_LONG_KERNEL)
            live._values().fill_(7)
            staging = stager.stage({"sparse": live})
        staged = await staging
        assert staged["sparse"].is_sparse
        assert not staged["sparse"].is_cuda
        assert bool((staged["sparse"]._values() == 7).all())
        assert torch.equal(staged["sparse"]._indices(), torch.arange(SIZE)[None])
        live._values().fill_(9)
        await stager.restore(staged, into={"sparse": live})
    torch.cuda.synchronize()
    assert bool((live._values().cpu() == 7).all())


async def test_sparse_on_a_full_device_is_no_corrupt_checkpoint(tmp_path: Path) -> None:
    values = torch.ones(4 << 20)
    sparse = torch.sparse_coo_tensor(torch.arange(4 << 20)[None], values, (4 << 20,), check_invariants=True)
    await aiostage.save({"sparse": sparse}, tmp_path / "a")
    # The limit is on what the allocator asks for, and not on what it has kept of earlier tests.
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0001)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            await aiostage.load(tmp_path / "a", device=DEVICE)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
