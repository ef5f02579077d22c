"""Random schedules on CUDA devices, and two controls that have to be found out."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
import torch

from aiostage.abc import CheckpointStager
from tests.schedules import KeepsNoSource, Machine, Outcome, WaitsForNothing, run_schedule, write_source

pytestmark = pytest.mark.gpu

SCHEDULES = int(os.environ.get("AIOSTAGE_SCHEDULES", "100"))
BATCH = 25
OF_CONTROLS = 40
CYCLES_IN_A_MICROSECOND = 2000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("schedules") / "checkpoint"
    asyncio.run(write_source(path))
    return path


def busy(name: str, microseconds: int) -> None:
    with torch.cuda.device(name):
        torch.cuda._sleep(microseconds * CYCLES_IN_A_MICROSECOND)


def drain() -> None:
    """Wait for all devices: PyTorch's own waits for the current one."""
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)


def run(first: int, count: int, checkpoint: Path, control: type[CheckpointStager] | None = None) -> Outcome:
    async def main() -> Outcome:
        names = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        machine, total = Machine(names, busy, drain), Outcome()
        for seed in range(first, first + count):
            outcome = await run_schedule(machine, seed, checkpoint, control() if control is not None else None)
            total.stagings += outcome.stagings
            total.wrong += [f"schedule {seed}: {wrong}" for wrong in outcome.wrong]
        return total

    return asyncio.run(main())


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(0, SCHEDULES, BATCH))
def test_every_tensor_holds_what_the_model_says(first: int, checkpoint: Path) -> None:
    outcome = run(first, min(BATCH, SCHEDULES - first), checkpoint)
    assert outcome.wrong == []
    assert outcome.stagings > BATCH


@pytest.mark.timeout(600)
@pytest.mark.parametrize("control", [WaitsForNothing, KeepsNoSource])
def test_a_wrong_stager_is_found_out(control: type[CheckpointStager], checkpoint: Path) -> None:
    assert run(0, OF_CONTROLS, checkpoint, control).wrong
