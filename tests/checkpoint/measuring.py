"""A save of more than its budget, in a process of its own, which measures how much memory that takes at most."""

from __future__ import annotations

import asyncio
import json
import sys

import torch

import aiostage
from aiostage import AsyncStager, StagingOptions

MIB = 1 << 20
BUDGET = 160 * MIB


def resident(field: str) -> int:
    """Return a figure of the kernel's about this process, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


async def main(target: str) -> None:
    tree = {f"w{n}": torch.full((5 * MIB,), float(n)) for n in range(25)}
    async with AsyncStager(StagingOptions(max_host_bytes=BUDGET)) as stager:
        # What is only loaded at the first save is no staged memory.
        await aiostage.save({"warm": torch.ones(1)}, target, stager=stager)
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")
        before = resident("VmRSS")
        info = await aiostage.save(tree, target, stager=stager, overwrite=True)
        peak = resident("VmHWM") - before
    print(json.dumps({"nbytes": info.nbytes, "budget": BUDGET, "peak": peak}))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
