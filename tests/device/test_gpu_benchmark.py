"""The benchmark for a GPU, as far as it goes without one."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from tests.device.accelerators import default_stager_stages_again, simulator_only
from tests.patience import seconds
from tests.warm import PYTHON

BENCHMARK = Path(__file__).parent.parent.parent / "benchmarks" / "gpu.py"


@simulator_only
@pytest.mark.slow
def test_every_part_of_it_runs(tmp_path: Path) -> None:
    if not default_stager_stages_again():
        pytest.skip("the DefaultStager of this PyTorch, which the benchmark compares with, stages once")
    figures = tmp_path / "figures.json"
    command = [*PYTHON, str(BENCHMARK), "--dry-run", "--gib", "1", "--json", str(figures)]
    subprocess.run(command, check=True, timeout=seconds(55), capture_output=True)
    rows = json.loads(figures.read_text())["rows"]
    work = {row["work"] for row in rows}
    assert {
        "1 GiB in 64 tensors",
        "10,000 of 1 KiB",
        "prewarm of 8 GiB",
        "waiting for 8 GiB",
        "waiting for 1 GiB",
    } <= work
    assert sum(name.startswith("training step") for name in work) == 3


@simulator_only
def test_without_a_device_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    result = subprocess.run([*PYTHON, str(BENCHMARK)], capture_output=True, text=True, timeout=seconds(55), check=False)
    assert result.returncode == 2
    assert "--dry-run" in result.stderr
