"""A training by Hugging Face's Trainer in a process of its own, to be killed and continued.

`tests.integrations.killed` runs ``main``. It prints the losses by step, as JSON, a line each. With torchrun's
environment it trains on all ranks. At DIE_AFTER the first rank waits for its checkpoint and kills itself.
"""

from __future__ import annotations

import json
import logging
import os
import signal
from typing import Any

import torch
import transformers
from transformers.integrations import integration_utils  # noqa: F401 - else each run imports it

from aiostage.blocking import Checkpointer
from aiostage.integrations.transformers import CheckpointCallback

EVERY = 3


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(8, 16), torch.nn.Linear(16, 1)
        # Draws random numbers in each step: they have to be continued too.
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": torch.nn.functional.mse_loss(self.second(self.dropout(self.first(x).relu())), labels)}


class Tell(transformers.TrainerCallback):
    def __init__(self, checkpoints: Checkpointer, die_after: int) -> None:
        self.checkpoints, self.die_after = checkpoints, die_after

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **objects: Any) -> None:
        if state.is_world_process_zero and "loss" in logs:
            print(json.dumps([state.global_step, logs["loss"], round(logs["learning_rate"], 12)]), flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if state.global_step == self.die_after and state.is_world_process_zero:
            while not self.checkpoints.steps():
                pass
            os.kill(os.getpid(), signal.SIGKILL)


def main(target: str, output: str, steps: int, die_after: int) -> None:
    logging.disable(logging.WARNING)
    data = [{"x": torch.randn(8, generator=seeded(n)), "labels": torch.tensor([n % 5.0])} for n in range(40)]
    arguments = transformers.TrainingArguments(
        output,
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        use_cpu=True,
        ddp_backend="gloo" if "RANK" in os.environ else None,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        seed=7,
    )
    with Checkpointer(target, keep=2) as checkpoints:
        callback = CheckpointCallback(checkpoints, every=EVERY)
        trainer = transformers.Trainer(
            Model(), arguments, train_dataset=data, callbacks=[callback, Tell(checkpoints, die_after)]
        )
        with callback.resume() as folder:
            trainer.train(resume_from_checkpoint=folder)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
