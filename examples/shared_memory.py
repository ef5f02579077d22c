"""Another process opens a staged tree without copying it.

The trainer stages into shared memory and sends a small handle to a reader, which stands for an evaluator or an
uploader in a process of its own. However many tensors there are, they take one file descriptor.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import sys
from asyncio.subprocess import PIPE

import torch
from torch import nn

from aiostage import AsyncStager, StagingOptions

LAYERS = 50


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def network() -> nn.Module:
    return nn.Sequential(*(nn.Linear(200, 200) for _ in range(LAYERS)))


def read() -> None:
    """What the other process does: open the tree, put it into a network, and answer."""
    before = descriptors()
    staged = pickle.load(sys.stdin.buffer).open()
    opened = descriptors() - before
    model = network()
    # assign=True takes the tensors as they are, so that the parameters lie in the shared memory.
    model.load_state_dict(staged["model"], assign=True)
    with torch.no_grad():
        answer = float(model(torch.ones(1, 200)).sum())
    print(f"step {staged['step']}: the network answers {answer!r}; {opened} descriptors more than before")


async def main() -> None:
    torch.manual_seed(0)
    model = network()
    with torch.no_grad():
        answer = float(model(torch.ones(1, 200)).sum())
    async with AsyncStager(StagingOptions(use_shared_memory=True)) as stager:
        staged = await stager.stage({"model": model.state_dict(), "step": 7})
        handle = pickle.dumps(await stager.share(staged))
        nn.init.zeros_(model[0].weight)  # training goes on; what the reader opens stays as it was staged

        statistics = stager.statistics()
        print(f"{statistics.leaves} tensors, {statistics.nbytes:,} bytes, in {statistics.arenas} shared arena")
        print(f"the handle takes {len(handle):,} bytes, and the network answers {answer!r} here")

        # `staged` is referred to until the reader is done, which is what keeps the memory from being used again.
        reader = await asyncio.create_subprocess_exec(sys.executable, __file__, "--read", stdin=PIPE, stdout=PIPE)
        output, _ = await reader.communicate(handle)
        print("the reader says:", output.decode().strip())
        assert reader.returncode == 0
        del staged


if __name__ == "__main__":
    if "--read" in sys.argv:
        read()
    elif sys.platform == "linux":
        asyncio.run(main())
    else:
        print("Sharing staged memory needs Linux.")
