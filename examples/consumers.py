"""One staged copy, three consumers: a checkpoint, a push of weights to an inference worker, a copy to go back to.

The state dict is copied once. Each consumer takes what it needs from the copy at its own pace, and the memory is free
again when the last of them is done with it.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import aiostage
from aiostage import AsyncStager, CheckpointInfo, Snapshot


class InferenceWorker:
    """Stands for a server that takes new weights one by one, while it still answers with the old ones."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    async def push(self, snapshot: Snapshot[Any]) -> None:
        arriving: dict[str, torch.Tensor] = {}
        async for leaf in snapshot:
            if leaf.path[0] == "model":
                # A real worker would be sent the bytes here.
                arriving[str(leaf.path[1])] = leaf.tensor.clone()
                await asyncio.sleep(0)
        self.weights = arriving


async def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    worker = InferenceWorker()

    with tempfile.TemporaryDirectory() as directory:
        async with AsyncStager() as stager:
            async with stager.snapshot(state) as snapshot:
                saving: asyncio.Task[CheckpointInfo] = asyncio.ensure_future(
                    aiostage.save(snapshot, Path(directory) / "checkpoint")
                )
                pushing = asyncio.ensure_future(worker.push(snapshot))
                last_good = await snapshot.result()
                # Captured: training goes on, whatever the other consumers are at.
                with torch.no_grad():
                    model[0].weight.fill_(float("nan"))
                info, _ = await asyncio.gather(saving, pushing)

            print(f"one copy: {info.nbytes:,} bytes saved, {len(worker.weights)} tensors pushed, one to go back to")
            saved = await aiostage.load(info.path)
            for name, weight in worker.weights.items():
                assert torch.equal(weight, saved["model"][name])

            await stager.restore(last_good, state)
            assert torch.equal(model[0].weight, saved["model"]["0.weight"])
            assert stager.statistics().leases == 1
            # The last consumer lets go.
            del last_good
            assert stager.statistics().leases == 0
    print("the checkpoint, the worker and the model that went back agree")


if __name__ == "__main__":
    asyncio.run(main())
