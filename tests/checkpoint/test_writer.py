from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import pytest
import torch

import aiostage
from tests.checkpoint.memory_storage import MemoryStorage
from tests.checkpoint.uncopied import Uncopied

PACKAGE = str(Path(aiostage.__file__).parent)


class Calls:
    """Counts the calls of functions of aiostage in this thread."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Calls:
        self._before = sys.getprofile()
        sys.setprofile(self._note)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(self._before)

    def _note(self, frame: FrameType, event: str, argument: object) -> None:
        # Generators are entered again after each yield, and how often they yield is a matter of time.
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE) and frame.f_lasti <= 0:
            self.count += 1


async def calls_for(tensors: int) -> int:
    state = {f"layer{number // 10}.weight{number % 10}": torch.zeros(4) for number in range(tensors)}
    with Calls() as calls:
        await aiostage.save(state, (MemoryStorage(), "a"), stager=Uncopied())
    return calls.count


@pytest.mark.asyncio
async def test_a_small_tensor_costs_the_loop_few_calls() -> None:
    # There are 17. Each is a hundredth of a second for 50,000 tensors.
    each = (await calls_for(3000) - await calls_for(1000)) / 2000
    assert each < 18
