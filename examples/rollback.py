"""Going back after a bad step: staged values are copied into the live tensors, in place.

A batch with a broken label makes the loss explode. The trainer restores the last good state, leaves the batch out and
goes on; model and optimizer are then exactly where they would be if the batch had never been there.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any

import torch
from torch import nn

from aiostage import AsyncStager

STEPS = 30
BAD_STEP = 17
STEPS_BETWEEN_COPIES = 5


class Trainer:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
        inputs, labels = batch
        loss = nn.functional.mse_loss(self.model(inputs), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def live(self) -> dict[str, Any]:
        """Return the tensors that training changes, not copies of them."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(32, 8, generator=generator) for _ in range(STEPS)]
    made = [(each, each.sum(dim=1, keepdim=True)) for each in inputs]
    made[BAD_STEP][1][0] = math.inf
    return made


async def train(trainer: Trainer, stager: AsyncStager) -> float:
    """Train over all batches, going back whenever a loss is not finite; return the last loss."""
    step, last, skipped = 0, math.nan, set[int]()
    good: tuple[int, dict[str, Any]] | None = None
    data = batches()
    while step < STEPS:
        loss = trainer.step(data[step]) if step not in skipped else last
        if not math.isfinite(loss):
            assert good is not None
            print(f"step {step}: loss {loss}; back to the copy made after step {good[0]}, without this batch")
            skipped.add(step)
            step, staged = good
            # Only tensors are written to, so whatever else had changed has to be put back by hand, as `step` is here.
            await stager.restore(staged, trainer.live())
        elif step % STEPS_BETWEEN_COPIES == 0:
            # The optimizer makes its state in the first step, so the first copy is made after it.
            good = (step, await stager.stage(trainer.live()))
            print(f"step {step}: loss {loss:.4f}; copied")
        last = loss if math.isfinite(loss) else last
        step += 1
    return last


async def main() -> None:
    trainer = Trainer()
    address = trainer.model[0].weight.data_ptr()
    async with AsyncStager() as stager:
        last = await train(trainer, stager)
        statistics = stager.statistics()
    print(f"step {STEPS - 1}: loss {last:.4f} after {statistics.stagings} copies of {statistics.nbytes:,} bytes in all")

    untroubled = Trainer()
    for step, batch in enumerate(batches()):
        if step != BAD_STEP:
            untroubled.step(batch)
    twins = zip(trainer.model.parameters(), untroubled.model.parameters(), strict=True)
    print("as if the batch had never been there:", all(torch.equal(*pair) for pair in twins))
    print("in place:", trainer.model[0].weight.data_ptr() == address)


asyncio.run(main())
