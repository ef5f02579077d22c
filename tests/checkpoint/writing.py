"""A process of its own that saves steps beside others, and prints those that it has won."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import torch

import aiostage


def tree(step: int, writer: int) -> dict[str, Any]:
    return {"step": step, "writer": writer, "weights": torch.full((300_000,), float(step * 1000 + writer))}


async def main(target: str, writer: int, steps: int) -> None:
    won = []
    async with aiostage.Checkpointer(target, keep=4) as checkpoints:
        # All begin at once.
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        for step in range(steps):
            try:
                await (await checkpoints.save(step, tree(step, writer))).committed()
                won.append(step)
            except aiostage.CheckpointExistsError:
                continue
    print(*won)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
