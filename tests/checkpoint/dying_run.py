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
COMMITS = (0, 0, 1, 2)
"""How many checkpoints a run may commit, one of these, before it is killed a little later."""


def tree(step: int) -> dict[str, Any]:
    """Return what a step saves: something frozen, something that changes now and then, something that always does."""
    return {
        "step": step,
        "frozen": torch.arange(1_000_000),
        "slow": torch.full((600_000,), float(step // 5)),
        "fast": torch.full((300_000,), float(step)),
    }


async def run(target: str, incremental: bool, committed: int) -> None:
    """Save step after step, two at once, and write a byte for each that is committed."""
    async with aiostage.Checkpointer(target, incremental=incremental, keep=KEEP, max_in_flight=2) as checkpoints:
        step = await checkpoints.latest() or 0
        before: aiostage.SaveHandle | None = None
        while True:
            step += 1
            handle = await checkpoints.save(step, tree(step))
            if before is not None:
                await before.committed()
                os.write(committed, b".")
            before = handle


async def look(target: str, at_least: int) -> list[int]:
    """Check everything that is found, and that no committed step was lost; return the steps."""
    checkpoints = aiostage.Checkpointer(target)
    steps = await checkpoints.steps()
    assert max(steps, default=0) >= at_least
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
    assert len(await look(target, step + 1)) <= KEEP
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


def live(target: str, incremental: bool, dice: random.Random) -> int:
    """Let a child run for a while and kill it; return how many commits it has reported."""
    reader, writer = os.pipe()
    child = in_child(lambda: asyncio.run(run(target, incremental, writer)))
    os.close(writer)
    commits = sum(len(os.read(reader, 1)) for _ in range(dice.choice(COMMITS)))
    time.sleep(dice.uniform(0.02, 0.2))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    while told := os.read(reader, 1 << 10):
        commits += len(told)
    os.close(reader)
    return commits


def main(target: str, incremental: bool) -> None:
    # What is loaded here, and what no collector looks at, costs the children nothing.
    asyncio.run(checkpoint())
    gc.disable()
    gc.freeze()
    torch.set_num_threads(1)
    dice = random.Random(11)
    commits = 0
    for _ in range(LIVES):
        commits += live(target, incremental, dice)
        looker = in_child(lambda: asyncio.run(look(target, at_least=commits)))  # noqa: B023 - it runs at once
        assert os.waitstatus_to_exitcode(os.waitpid(looker, 0)[1]) == 0
    last = in_child(lambda: asyncio.run(tidy(target, incremental)))
    assert os.waitstatus_to_exitcode(os.waitpid(last, 0)[1]) == 0
    print(max(int(name[5:]) for name in os.listdir(target) if name[5:].isdigit()))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "incremental")
