"""Our stager passes the suite that every stager has to pass, beside a device that is in use and slow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import aiostage
from aiostage import AsyncStager, StagingOptions
from aiostage.testing import StagerSuite


@pytest.fixture(autouse=True)
def _trees_on_the_device() -> Iterator[None]:
    """Let the suite's trees be made on the device."""
    torch.simgpu.copy_delay(100, 500)  # type: ignore[attr-defined]
    torch.set_default_device("simgpu:0")
    yield
    torch.set_default_device(None)


@pytest.mark.asyncio
class TestOnADevice(StagerSuite):
    def make_stager(self) -> AsyncStager:
        return AsyncStager()


@pytest.mark.asyncio
class TestFewBytesInFlight(StagerSuite):
    def make_stager(self) -> AsyncStager:
        return AsyncStager(StagingOptions(max_bytes_in_flight=64))


@pytest.mark.asyncio
async def test_a_checkpoint_there_and_back(tmp_path: Path) -> None:
    tree = {
        "weight": torch.arange(12.0).view(3, 4).t(),
        "sparse": torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.ones(2), (3,), check_invariants=False),
        "array": np.arange(3),
        "empty": torch.zeros(0),
        "bytes": b"abc",
        "conj": torch.complex(torch.arange(3.0), torch.ones(3)).conj(),
    }
    await aiostage.save(tree, tmp_path / "a")
    loaded = await aiostage.load(tmp_path / "a")
    live = {"weight": torch.zeros(3, 4).t(), "conj": torch.zeros(3, dtype=torch.complex64)}
    await aiostage.load(tmp_path / "a", into=live, only=["weight", "conj"], in_place=True)
    for name, tensor in loaded.items():
        assert not isinstance(tensor, torch.Tensor) or tensor.is_cpu, name
    for found in (loaded, live):
        assert torch.equal(found["weight"].cpu(), tree["weight"].cpu())  # type: ignore[attr-defined]
        assert torch.equal(found["conj"].cpu().resolve_conj(), tree["conj"].cpu().resolve_conj())  # type: ignore[attr-defined]
    assert torch.equal(loaded["sparse"]._indices(), torch.tensor([[0, 2]], device="cpu"))
    assert loaded["array"].tolist() == [0, 1, 2]
