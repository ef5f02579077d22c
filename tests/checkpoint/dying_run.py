"""A run that is killed at random moments again and again, and what is found in between.

Run as a program, in a process of its own that has no threads, so that it may fork.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from anyio.lowlevel import checkpoint

import aiostage

LIVES = 15
KEEP = 2


def tree(step: int) -> dict[str, Any]:
    """Return what a step saves: something frozen, something that changes now and then, something that always does."""
    return {
        "step": step,
        "frozen": torch.arange(1_000_000),
        "slow": torch.full((600_000,), float(step // 5)),
        "fast": torch.full((300_000,), float(step)),
    }


async def run(target: str, incremental: bool) -> None:
    async with aiostage.Checkpointer(target, incremental=incremental, keep=KEEP, max_in_flight=2) as checkpoints:
        step = await checkpoints.latest() or 0
        while True:
            step += 1
            await checkpoints.save(step, tree(step))


async def look(target: str) -> list[int]:
    """Check everything that is found; return the steps."""
    checkpoints = aiostage.Checkpointer(target)
    steps = await checkpoints.steps()
    for step in steps:
        found, expected = await checkpoints.restore(step=step), tree(step)
        assert found["step"] == step
        assert all(torch.equal(found[name], expected[name]) for name in ("frozen", "slow", "fast"))
    return steps


async def tidy(target: str, incremental: bool) -> None:
    """Save once more in peace; then nothing is left but what is kept and what that needs."""
    async with aiostage.Checkpointer(target, incremental=incremental, keep=KEEP) as checkpoints:
        step = await checkpoints.latest() or 0
        await checkpoints.save(step + 1, tree(step + 1))
    names = set(os.listdir(target))
    assert len(await look(target)) <= KEEP
    assert len(names) <= (8 if incremental else KEEP), names
    assert not any(name.startswith(".") for name in names), names


def in_child(call: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        code = 99
        try:
            call()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def main(target: str, incremental: bool) -> None:
    # What is loaded here, and what no collector looks at, costs the children nothing.
    asyncio.run(checkpoint())
    gc.disable()
    gc.freeze()
    torch.set_num_threads(1)
    dice = random.Random(11)
    for _ in range(LIVES):
        child = in_child(lambda: asyncio.run(run(target, incremental)))
        time.sleep(dice.uniform(0.02, 0.3))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        looker = in_child(lambda: asyncio.run(look(target)))
        assert os.waitstatus_to_exitcode(os.waitpid(looker, 0)[1]) == 0
    last = in_child(lambda: asyncio.run(tidy(target, incremental)))
    assert os.waitstatus_to_exitcode(os.waitpid(last, 0)[1]) == 0
    print(max(int(name[5:]) for name in os.listdir(target) if name[5:].isdigit()))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "incremental")
