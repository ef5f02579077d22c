"""Loading straight onto a real CUDA device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import aiostage
from tests.patience import seconds

pytestmark = pytest.mark.gpu

MIB = 2**20


def tree() -> dict[str, object]:
    shared = torch.arange(3 * MIB, dtype=torch.float32)
    return {
        "tied": [shared, shared[1:7]],
        "turned": torch.arange(6.0 * MIB).view(3, -1).t(),
        "parameter": torch.nn.Parameter(torch.ones(5)),
        "sparse": torch.eye(3).to_sparse(),
        "bfloat16": torch.full((MIB,), 3.0, dtype=torch.bfloat16),
        "step": 3,
    }


@pytest.mark.asyncio
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 0), lambda path, like: "cuda"])
async def test_a_new_tree(tmp_path: Path, device: object) -> None:
    saved = tree()
    await aiostage.save(saved, tmp_path / "checkpoint")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        loaded = await aiostage.load(tmp_path / "checkpoint", device=device)  # type: ignore[arg-type]
        for name in ("turned", "parameter", "bfloat16"):
            assert loaded[name].is_cuda
            assert torch.equal(loaded[name].cpu(), saved[name])  # type: ignore[arg-type]
            assert loaded[name].stride() == saved[name].stride()  # type: ignore[attr-defined]
        assert torch.equal(loaded["sparse"].cpu().to_dense(), torch.eye(3))
        loaded["tied"][0].fill_(7)
        assert loaded["tied"][1].tolist() == [7] * 6
    assert loaded["step"] == 3


@pytest.mark.asyncio
async def test_memory_that_the_callers_stream_still_uses(tmp_path: Path) -> None:
    await aiostage.save({"a": torch.full((4 * MIB,), 2.0)}, tmp_path / "checkpoint")
    before = torch.empty(4 * MIB, device="cuda")
    torch.cuda._sleep(100_000_000)
    before.fill_(9)
    del before
    loaded = await aiostage.load(tmp_path / "checkpoint", device="cuda")
    assert bool((loaded["a"] == 2).all())


FIRST_USE = """
import asyncio, sys, torch, aiostage

assert not torch.cuda.is_initialized()
loaded = asyncio.run(aiostage.load(sys.argv[1], device="cuda"))
assert bool((loaded["a"] == 1).all())
"""


@pytest.mark.asyncio
async def test_the_first_use_of_the_device(tmp_path: Path) -> None:
    await aiostage.save({"a": torch.ones(1000)}, tmp_path / "checkpoint")
    program = [sys.executable, "-c", FIRST_USE, str(tmp_path / "checkpoint")]
    assert subprocess.run(program, check=False, timeout=seconds(55)).returncode == 0  # noqa: ASYNC221


@pytest.mark.asyncio
async def test_a_device_without_room(tmp_path: Path) -> None:
    await aiostage.save({"a": torch.ones(64 * MIB)}, tmp_path / "checkpoint")
    # The limit is on what the allocator asks for, and not on what it has kept of earlier tests.
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0001)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            await aiostage.load(tmp_path / "checkpoint", device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
