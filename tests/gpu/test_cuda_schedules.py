"""Random schedules on CUDA devices, and two controls that have to be found out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aiostage.abc import CheckpointStager
from tests.schedules import CONTROLS, SCHEDULES, Machine, run_schedules
from tests.schedules import source as source

pytestmark = pytest.mark.gpu

BATCH = 25
OF_CONTROLS = 40
CYCLES_IN_A_MICROSECOND = 2000


def busy(name: str, microseconds: int) -> None:
    with torch.cuda.device(name):
        torch.cuda._sleep(microseconds * CYCLES_IN_A_MICROSECOND)


def drain() -> None:
    """Wait for all devices: PyTorch's own waits for the current one."""
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)


def machine() -> Machine:
    return Machine([f"cuda:{index}" for index in range(torch.cuda.device_count())], busy, drain)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(0, SCHEDULES, BATCH))
def test_every_tensor_holds_what_the_model_says(first: int, source: Path) -> None:
    outcome = run_schedules(machine(), range(first, min(first + BATCH, SCHEDULES)), source)
    assert outcome.wrong == []
    assert outcome.stagings > BATCH


@pytest.mark.timeout(600)
@pytest.mark.parametrize("control", CONTROLS)
def test_a_wrong_stager_is_found_out(control: type[CheckpointStager], source: Path) -> None:
    assert run_schedules(machine(), range(OF_CONTROLS), source, control).wrong
