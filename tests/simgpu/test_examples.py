"""The examples that take a device, on the device: they know it as the simulator."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

import aiostage.testing
from tests.device.accelerators import DeviceAccelerator

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.mark.parametrize("name", ["devices", "zero_stall"])
def test_it_runs(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    made: list[DeviceAccelerator] = []

    class Noted(DeviceAccelerator):
        def __init__(self, *arguments: int, **options: object) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setenv("AIOSTAGE_EXAMPLE_QUICK", "1")
    monkeypatch.setattr(aiostage.testing, "SimulatedAccelerator", Noted)
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    output = capsys.readouterr().out
    assert made
    if name == "devices":
        assert "staged before the step: [0.0]" in output
        assert "live after the step: [1.0]" in output
        assert "loaded onto simgpu:0: [0.0]" in output
