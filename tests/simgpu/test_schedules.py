"""Hundreds of random schedules on the device, and two controls that have to be found out."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
import torch

from aiostage.abc import CheckpointStager
from tests.schedules import KeepsNoSource, Machine, Outcome, WaitsForNothing, run_schedule, write_source

SCHEDULES = int(os.environ.get("AIOSTAGE_SCHEDULES", "100"))
BATCH = 50
OF_CONTROLS = 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("schedules") / "checkpoint"
    asyncio.run(write_source(path))
    return path


def machine() -> Machine:
    device = torch.simgpu  # type: ignore[attr-defined]
    device.copy_delay(0, 600)
    device.kernel_delay(0, 300)
    return Machine(
        ["simgpu:0", "simgpu:1"],
        lambda name, microseconds: device.sleep(microseconds, torch.device(name).index),
        device.drain,
    )


def run(first: int, count: int, checkpoint: Path, control: type[CheckpointStager] | None = None) -> Outcome:
    async def main() -> Outcome:
        here, total = machine(), Outcome()
        for seed in range(first, first + count):
            torch.simgpu.seed(seed)  # type: ignore[attr-defined]
            outcome = await run_schedule(here, seed, checkpoint, control() if control is not None else None)
            total.stagings += outcome.stagings
            total.wrong += [f"schedule {seed}: {wrong}" for wrong in outcome.wrong]
        return total

    return asyncio.run(main())


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(0, SCHEDULES, BATCH))
def test_every_tensor_holds_what_the_model_says(first: int, checkpoint: Path) -> None:
    before = torch.simgpu.stats()  # type: ignore[attr-defined]
    outcome = run(first, min(BATCH, SCHEDULES - first), checkpoint)
    after = torch.simgpu.stats()  # type: ignore[attr-defined]
    assert outcome.wrong == []
    assert outcome.stagings > BATCH
    # Memory that was read after it was given away may still have held the right bytes.
    assert after["freed_source"] == before["freed_source"]
    assert after["expired_host"] == before["expired_host"]


@pytest.mark.parametrize("control", [WaitsForNothing, KeepsNoSource])
def test_a_wrong_stager_is_found_out(control: type[CheckpointStager], checkpoint: Path) -> None:
    outcome = run(0, OF_CONTROLS, checkpoint, control)
    assert len(outcome.wrong) > OF_CONTROLS / 4
