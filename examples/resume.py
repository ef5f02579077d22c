"""A training run that is killed again and again, and comes to the same losses, to the bit.

A process trains and checkpoints itself every few steps. It is killed (SIGKILL) at random points, often in the middle
of a save, and started again; then it is asked to end (SIGTERM), as clusters do before they take a machine away, and
started again. In the end every loss that it has reported is compared with those of an undisturbed run.

AIOSTAGE_EXAMPLE_QUICK=1 makes it shorter. It exits with 1 if a loss differs, or if a SIGTERM has cost a step.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

import aiostage

QUICK = bool(os.environ.get("AIOSTAGE_EXAMPLE_QUICK"))
STEPS = 90 if QUICK else 400
STEPS_BETWEEN_CHECKPOINTS = 5
KILLS = 2 if QUICK else 8


class Trainer:
    """A model, its optimizer, and all else that decides how training goes on."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Dropout(0.1), nn.Linear(512, 64))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.batches = torch.Generator().manual_seed(1)
        self.steps = 0

    def step(self) -> float:
        """Learn to sort numbers."""
        numbers = torch.rand(32, 64, generator=self.batches)
        loss = nn.functional.mse_loss(self.model(numbers), numbers.sort(dim=1).values)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        return loss.item()

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.get_state(),
            "dropout": torch.get_rng_state(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.set_state(state["batches"])
        torch.set_rng_state(state["dropout"])
        self.steps = state["steps"]


async def train(directory: Path, losses: Connection) -> None:
    """Train from wherever the last process came to, and tell every loss."""
    trainer = Trainer()
    async with aiostage.Checkpointer(
        directory, keep=2, max_in_flight=2, save_on_signals=[signal.SIGTERM]
    ) as checkpoints:
        if await checkpoints.latest() is not None:
            trainer.load_state_dict(await checkpoints.restore())
        ending = False
        while trainer.steps < STEPS and not ending:
            loss = await asyncio.to_thread(trainer.step)
            losses.send((trainer.steps, loss))
            # Asked once a step, so that the state that is saved last is the one with which training ends.
            ending = checkpoints.preempted.is_set()
            if ending or trainer.steps % STEPS_BETWEEN_CHECKPOINTS == 0:
                await checkpoints.save(trainer.steps, trainer.state_dict())
    # Leaving the block has waited until everything is safe on the disk.


# ---------------------------------------------------------------- what happens to the process


def process_main(directory: Path, losses: Connection) -> None:
    torch.set_num_threads(1)
    asyncio.run(train(directory, losses))


def run(
    directory: Path, *, number: signal.Signals | None = None, after: int = 0, wait: float = 0.0
) -> dict[int, float]:
    """Run a training process, send it a signal some seconds after it has told some losses, and return those."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "aiostage"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=process_main, args=(directory, theirs))
    process.start()
    theirs.close()
    told: dict[int, float] = {}
    with ours:
        while True:
            try:
                step, loss = ours.recv()
            except EOFError:
                break
            told[step] = loss
            if number is not None and len(told) == after:
                time.sleep(wait)
                process.kill() if number is signal.SIGKILL else process.terminate()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the training process has ended with {process.exitcode}")
    return told


def main() -> bool:
    dice = random.Random(7)
    signals = [*[signal.SIGKILL] * KILLS, signal.SIGTERM, signal.SIGTERM]
    told: dict[int, list[float]] = {step: [] for step in range(1, STEPS + 1)}
    repeated_after = dict.fromkeys(signals, 0)
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = run(Path(folder) / "undisturbed")
        reached, before = 0, signal.SIGTERM
        for number in [*signals, None]:
            losses = run(
                Path(folder) / "disturbed",
                number=number,
                # The last one is left alone, and has something left to do.
                after=dice.randint(STEPS // 20, STEPS // (len(signals) + 1)),
                wait=dice.random() / 50,
            )
            for step, loss in losses.items():
                told[step].append(loss)
            first, last = min(losses), max(losses)
            print(f"steps {first:>3} to {last:>3}, then {number.name if number is not None else 'the end'}")
            repeated_after[before] += reached + 1 - first
            reached, before = last, number or before
    print(f"\nkilled {KILLS} times, which has cost {repeated_after[signal.SIGKILL]} steps that were trained again")
    checks = {
        f"every one of {sum(map(len, told.values()))} losses equals that of an undisturbed run, bit for bit": all(
            losses and set(losses) == {undisturbed[step]} for step, losses in told.items()
        ),
        "SIGTERM has cost no step": repeated_after[signal.SIGTERM] == 0,
    }
    for what, holds in checks.items():
        print(f"  {'yes' if holds else 'NO '}  {what}")
    return all(checks.values())


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
