"""A device whose module denies that it is in use."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from aiostage._device import accelerator
from tests.simgpu.test_caller_streams import (
    LATE,
    SAVED,
    adapted_default,
    check,
    dcp_load,
    in_a_task,
    live,
    load_in_place,
    load_into,
    restore,
    save,
    snapshot,
    stage,
)
from tests.simgpu.test_caller_streams import checkpoints as checkpoints
from tests.simgpu.test_caller_streams import pytestmark as pytestmark


class TestADeviceThatSaysItIsNotInUse:
    """`is_initialized()` of a device's module may be wrong; a tensor proves that the device is in use."""

    @pytest.fixture(autouse=True)
    def _denies(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.simgpu, "is_initialized", lambda: False)  # type: ignore[attr-defined]
        monkeypatch.setattr(accelerator, "_seen", set())

    @pytest.mark.parametrize("reader", [stage, snapshot, save, adapted_default])
    def test_reading(self, reader: Any, tmp_path: Path) -> None:
        tree = live()
        check(in_a_task(partial(reader, tree, tmp_path), tree), LATE)

    @pytest.mark.parametrize("writer", [load_into, load_in_place, restore, dcp_load])
    def test_writing(self, writer: Any, checkpoints: Path) -> None:
        tree = live()
        in_a_task(partial(writer, tree, checkpoints), tree)
        check(tree, SAVED)
