"""Removals of checkpoints that are killed before each of their operations on files in turn, and what is found then.

Run as a program, in a process of its own that has no threads, so that it may fork.
"""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from anyio.lowlevel import checkpoint

import aiostage
from aiostage.incremental import writing
from aiostage.storage import LocalStorage
from tests.checkpoint.dying import MANY_POINTS, Killer, in_child
from tests.checkpoint.runs import MIB, Run, apart_from_the_small, in_directory, needed

STEPS = 5


async def save(root: Path) -> None:
    model = Run()
    async with aiostage.Checkpointer(root, incremental=True) as checkpoints:
        for step in range(STEPS):
            await checkpoints.save(step, model.state_dict(step))
            model.train(step)


async def remove(root: Path) -> None:
    checkpoints = aiostage.Checkpointer(root)
    for step in (1, 0, 2):
        await checkpoints.delete(step)


async def look(root: Path) -> int:
    """Check that all that is there can be read, and that entering tidies up; return whether there was anything to."""
    checkpoints = aiostage.Checkpointer(root)
    steps = await checkpoints.steps()
    assert steps[-2:] == [3, 4]
    for step in steps:
        assert (await checkpoints.restore(step=step))["step"] == step
    expected = await needed(LocalStorage(root), steps)
    untidy = apart_from_the_small(in_directory(root)) != expected
    async with checkpoints:
        assert await checkpoints.steps() == steps
    assert apart_from_the_small(in_directory(root)) == expected
    return int(untidy)


def killed(root: Path, last: int) -> int:
    Killer(last)
    asyncio.run(remove(root))
    return 0


def main(directory: Path) -> None:
    # What is loaded here, and what no collector looks at, costs the children nothing.
    asyncio.run(checkpoint())
    gc.disable()
    gc.freeze()
    writing._GROUP_BYTES = MIB
    torch.set_num_threads(1)
    whole, root = directory / "whole", directory / "run"
    assert in_child(lambda: asyncio.run(save(whole)) or 0) == 0
    untidy = 0
    for last in range(MANY_POINTS):
        shutil.rmtree(root, ignore_errors=True)
        # Files are removed, never written to.
        shutil.copytree(whole, root, copy_function=os.link)
        outcome = in_child(lambda last=last: killed(root, last))  # type: ignore[misc]
        assert outcome in (0, -signal.SIGKILL), outcome
        found = in_child(lambda: asyncio.run(look(root)))
        assert found in (0, 1), found
        untidy += found
        if outcome == 0:
            print(last, untidy)
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]))
