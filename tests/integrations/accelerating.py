"""A loop over Accelerate in a process of its own, to be killed and continued.

`tests.integrations.killed` runs ``main``. It prints a line with step and loss, as JSON, for each step of the
first rank. With torchrun's environment it trains on all ranks.
"""

from __future__ import annotations

import json
import os
import signal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from aiostage.blocking import Checkpointer
from aiostage.integrations.accelerate import AcceleratorCheckpoints


class Seen:
    """Something that is registered for checkpoints."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def main(target: str, steps: int, die_after: int) -> None:
    accelerator = Accelerator(cpu=True)
    # Each rank draws its own numbers.
    set_seed(11 + accelerator.process_index)
    torch.manual_seed(3)
    layers = torch.nn.Linear(8, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 1)
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    seen = Seen()
    accelerator.register_for_checkpointing(seen)
    torch.manual_seed(100 + accelerator.process_index)
    with Checkpointer(target, keep=2) as checkpointer:
        checkpoints = AcceleratorCheckpoints(accelerator, checkpointer)
        start = checkpoints.restore() or 0
        assert seen.count == start
        for step in range(start + 1, steps + 1):
            with torch.random.fork_rng():
                torch.manual_seed(1000 * step + accelerator.process_index)
                batch = torch.randn(4, 8)
            optimizer.zero_grad()
            loss = model(batch).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            seen.count += 1
            mean = accelerator.reduce(loss.detach(), "mean").item()
            if accelerator.is_main_process:
                print(json.dumps([step, mean, scheduler.get_last_lr()[0]]), flush=True)
            if step % 3 == 0:
                checkpoints.save(step)
            if step == die_after and accelerator.is_main_process:
                while not checkpointer.steps():
                    pass
                os.kill(os.getpid(), signal.SIGKILL)
