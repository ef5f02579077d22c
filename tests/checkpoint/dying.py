"""Saves that are killed before each of their operations on files in turn, and what is found afterwards.

Run as a program, in a process of its own that has no threads, so that it may fork.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from anyio.lowlevel import checkpoint

import aiostage
from aiostage.checkpoint.save import write_checkpoint
from aiostage.storage import files

OPERATIONS = ("open", "mkdir", "pwrite", "fsync", "ftruncate", "posix_fallocate", "rename", "unlink", "rmdir")
MANY_POINTS = 500


def tree(step: int) -> dict[str, Any]:
    tensors = {f"p{n}": torch.full((1000,), float(step)) for n in range(3)}
    # Large enough for direct I/O.
    return {"step": step, "tensors": tensors, "big": torch.full((300_000,), float(step))}


def step_of(found: dict[str, Any]) -> int:
    """Return the step that a tree is of, after checking that all of it is of that step."""
    step = found["step"]
    expected = tree(step)
    assert found["tensors"].keys() == expected["tensors"].keys()
    assert all(torch.equal(found["tensors"][name], value) for name, value in expected["tensors"].items())
    assert torch.equal(found["big"], expected["big"])
    return int(step)


async def load_step(target: str) -> int:
    # Not the tree: at its end, asyncio.run() has signal make a text of what it returns, number by number.
    return step_of(await aiostage.load(target))


def save(step: int, target: str, *, overwrite: bool) -> None:
    asyncio.run(write_checkpoint(tree(step), target, overwrite=overwrite, max_shard_bytes=1_000_000))


class Killer:
    """Kills the process before the n-th operation on files."""

    def __init__(self, last: int) -> None:
        self.left = last
        for name in OPERATIONS:
            setattr(os, name, self.counted(getattr(os, name)))
        files._rename = self.counted(files._rename)
        os.pwrite = self.interrupted(os.pwrite)

    def count(self) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1

    def counted(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.count()
            return operation(*args, **options)

        return call

    def interrupted(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def call(descriptor: int, data: Any, offset: int) -> Any:
            # In two halves of whole pages, as direct I/O wants them.
            half = len(data) // 8192 * 4096
            if half:
                write(descriptor, data[:half], offset)
            return half + write(descriptor, data[half:], offset + half)

        return call


def in_child(run: Callable[[], int]) -> int:
    """Run something in a child process; return its result, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = run()
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_save(target: str, last: int, overwrite: bool) -> int:
    Killer(last)
    save(2, target, overwrite=overwrite)
    return 0


def look(target: str, overwrite: bool) -> int:
    """Return the step that is found, 0 for none; then check that the next save is not in any way hindered."""
    try:
        found = asyncio.run(load_step(target))
    except aiostage.CheckpointNotFoundError:
        found = 0
    save(3, target, overwrite=overwrite or found != 0)
    assert asyncio.run(load_step(target)) == 3
    parent = os.path.dirname(target)
    assert os.listdir(parent) == [os.path.basename(target)], os.listdir(parent)
    return found


def main(directory: str, overwrite: bool, exchanging: bool) -> None:
    if not exchanging:
        files._rename = lambda *_, **__: False
    # What is loaded here, and what no collector looks at, costs the children nothing.
    asyncio.run(checkpoint())
    gc.disable()
    gc.freeze()
    torch.set_num_threads(1)
    old, target = os.path.join(directory, "old"), os.path.join(directory, "new", "checkpoint")
    assert in_child(lambda: save(1, old, overwrite=False) or 0) == 0
    found: Counter[int] = Counter()
    for last in range(MANY_POINTS):
        shutil.rmtree(os.path.dirname(target), ignore_errors=True)
        os.mkdir(os.path.dirname(target))
        if overwrite:
            shutil.copytree(old, target)
        outcome = in_child(lambda last=last: killed_save(target, last, overwrite))  # type: ignore[misc]
        assert outcome in (0, -signal.SIGKILL), outcome
        found[in_child(lambda: look(target, overwrite))] += 1
        if outcome == 0:
            print(json.dumps(found))
            return


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "overwrite", sys.argv[3] == "exchanging")
