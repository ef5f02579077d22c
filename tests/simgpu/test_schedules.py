"""Hundreds of random schedules on the device, and two controls that have to be found out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aiostage.abc import CheckpointStager
from tests.schedules import CONTROLS, SCHEDULES, Machine, run_schedules
from tests.schedules import source as source

BATCH = 50
OF_CONTROLS = 40


def machine() -> Machine:
    device = torch.simgpu  # type: ignore[attr-defined]
    device.copy_delay(0, 600)
    device.kernel_delay(0, 300)
    return Machine(
        ["simgpu:0", "simgpu:1"],
        lambda name, microseconds: device.sleep(microseconds, torch.device(name).index),
        device.drain,
        device.seed,
    )


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(0, SCHEDULES, BATCH))
def test_every_tensor_holds_what_the_model_says(first: int, source: Path) -> None:
    before = torch.simgpu.stats()  # type: ignore[attr-defined]
    outcome = run_schedules(machine(), range(first, min(first + BATCH, SCHEDULES)), source)
    after = torch.simgpu.stats()  # type: ignore[attr-defined]
    assert outcome.wrong == []
    assert outcome.stagings > BATCH
    # Memory that was read after it was given away may still have held the right bytes.
    assert after["freed_source"] == before["freed_source"]
    assert after["expired_host"] == before["expired_host"]


@pytest.mark.parametrize("control", CONTROLS)
def test_a_wrong_stager_is_found_out(control: type[CheckpointStager], source: Path) -> None:
    outcome = run_schedules(machine(), range(OF_CONTROLS), source, control)
    assert len(outcome.wrong) > OF_CONTROLS / 4
