"""Two processes: one saves incrementally, the other removes all that it finds, and checks the rest.

Each prints how many checkpoints it has saved or removed.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from pathlib import Path

import torch

import aiostage
from aiostage.incremental import writing
from aiostage.storage import LocalStorage
from tests.checkpoint.comparing import assert_same
from tests.checkpoint.runs import MIB, Run, apart_from_the_small, in_directory, needed

STEPS = 60
ENDED = "ended"


def model_at(step: int) -> Run:
    model = Run()
    for before in range(step):
        model.train(before)
    return model


async def save(root: Path) -> int:
    saved, model = 0, Run()
    async with aiostage.Checkpointer(root, incremental=True) as checkpoints:
        for step in range(STEPS):
            # Also if what it refers to is removed meanwhile.
            await (await checkpoints.save(step, model.state_dict(step))).committed()
            saved += 1
            model.train(step)
    (root / ENDED).touch()
    return saved


async def remove(root: Path) -> int:
    removed, seen, ended = 0, -1, False
    checkpoints = aiostage.Checkpointer(root)
    while not ended:
        ended = (root / ENDED).exists()
        steps = await checkpoints.steps()
        # All but the last two, and now and then the last, to which the next save is about to refer.
        going = steps[:-2] + (steps[-1:] if steps and steps[-1] % 5 == 4 and not ended else [])
        for step in going:
            await checkpoints.delete(step)
        removed += len(going)
        steps = await checkpoints.steps()
        if (steps and steps[-1] > seen + 10) or ended:
            seen = steps[-1]
            with suppress(aiostage.CheckpointNotFoundError):
                assert_same(model_at(seen).state_dict(seen), await checkpoints.restore(step=seen))
    for step in steps:
        assert_same(model_at(step).state_dict(step), await checkpoints.restore(step=step))
    (root / ENDED).unlink()
    async with checkpoints:
        pass
    held = apart_from_the_small(in_directory(root))
    assert held == await needed(LocalStorage(root), steps)
    return removed


if __name__ == "__main__":
    writing._GROUP_BYTES = MIB
    torch.set_num_threads(1)
    print(asyncio.run({"save": save, "remove": remove}[sys.argv[2]](Path(sys.argv[1]))))
