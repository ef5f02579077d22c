"""A trainer that checkpoints in every step and never waits for it: the device orders the step behind the copies.

The device is a simulated one, in real time: kernels last as long as they are told to, and copies as long as 0.4 GB/s
take. With a GPU nothing changes but the kernels: `AsyncStager()` finds it, and `loss.backward()` enqueues its work too.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from time import perf_counter

import torch

from aiostage import AsyncStager
from aiostage.testing import SimulatedAccelerator

STEPS = 2 if os.environ.get("AIOSTAGE_EXAMPLE_QUICK") else 5
FORWARD_SECONDS, BACKWARD_SECONDS, OPTIMIZER_SECONDS = 0.01, 0.02, 0.002
COPIED_BYTES_PER_SECOND = 4e8


class Trainer:
    """Weights that the optimizer changes, and statistics that the forward pass changes already."""

    def __init__(self, accelerator: SimulatedAccelerator) -> None:
        self._accelerator = accelerator
        self._weight = accelerator.to_device(torch.zeros(2_000_000))
        self._mean = accelerator.to_device(torch.zeros(64))
        self.steps = 0

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"weight": self._weight, "norm.mean": self._mean}

    def forward_and_backward(self) -> None:
        # As BatchNorm does it: the statistics change, and no version counter tells of it.
        self._accelerator.launch(lambda mean: mean.add_(1), reads=[self._mean], seconds=FORWARD_SECONDS)
        self._accelerator.launch(lambda weight: None, reads=[self._weight], seconds=BACKWARD_SECONDS)

    def optimizer_step(self) -> None:
        self._accelerator.launch(lambda weight: weight.add_(1), self._weight, seconds=OPTIMIZER_SECONDS)
        self.steps += 1


async def without(trainer: Trainer, stager: AsyncStager) -> None:
    trainer.forward_and_backward()
    trainer.optimizer_step()


async def staged_first(trainer: Trainer, stager: AsyncStager) -> None:
    await stager.stage(trainer.state_dict())
    trainer.forward_and_backward()
    trainer.optimizer_step()


async def beside(trainer: Trainer, stager: AsyncStager) -> None:
    async with stager.snapshot(trainer.state_dict()) as snapshot:
        snapshot.order_before(parts=[("norm.mean",)])  # what forward changes: small, so it is copied first
        trainer.forward_and_backward()
        snapshot.order_before()  # what the optimizer changes: everything else
        trainer.optimizer_step()
        staged = await snapshot.result()
    # As it was before this step, wherever one looks.
    assert staged["weight"][::100_000].unique().tolist() == [trainer.steps - 1]
    assert staged["norm.mean"].unique().tolist() == [trainer.steps - 1]


async def main() -> None:
    ways: dict[str, Callable[[Trainer, AsyncStager], Awaitable[None]]] = {
        "no checkpoint": without,
        "await stage(), then the step": staged_first,
        "order_before(), nothing awaited": beside,
    }
    for name, step in ways.items():
        with SimulatedAccelerator(bandwidth=COPIED_BYTES_PER_SECOND) as accelerator:
            trainer = Trainer(accelerator)
            async with AsyncStager(backend=accelerator) as stager:
                await stager.prewarm(trainer.state_dict())
                begin = perf_counter()
                for _ in range(STEPS):
                    await step(trainer, stager)
                await asyncio.to_thread(accelerator.synchronize)
                milliseconds = (perf_counter() - begin) / STEPS * 1e3
        print(f"{name:<34}{milliseconds:6.1f} ms a step, simulated")


asyncio.run(main())
