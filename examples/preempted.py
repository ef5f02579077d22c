"""A trainer for clusters that take machines back: it saves on a signal, and its exit status says what to do next.

    python examples/preempted.py FOLDER [STEPS]    trains; 0: done, 75: preempted, start it again
    python examples/preempted.py                   runs itself like that, sends SIGTERM and SIGUSR1, and compares

Kubernetes and most clouds send SIGTERM, Slurm the signal that you ask for. docs/clusters.md has their files.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
from torch import nn

from aiostage.blocking import Checkpointer

PREEMPTED = 75
"""The exit status that stands for "try again later" (EX_TEMPFAIL). 0 would count as a finished training."""


def train(folder: str, steps: int, begins: Callable[[], object] = lambda: None) -> int:
    """Train from the latest checkpoint on, and return the exit status."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    with Checkpointer(folder, keep=2, save_on_signals=[signal.SIGTERM, signal.SIGUSR1]) as checkpoints:
        step = checkpoints.latest() or 0
        if step:
            state = checkpoints.restore()
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        begins()
        while step < steps:
            optimizer.zero_grad()
            loss = model(torch.randn(32, 64)).square().mean()
            loss.backward()
            optimizer.step()
            step += 1
            # Asked once a step: what is saved last is the state that training ends with.
            preempted = checkpoints.preempted.is_set()
            if preempted or step % 100 == 0:
                checkpoints.save(step, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
            if preempted:
                break
    # Leaving the block has waited until the last checkpoint is committed.
    return PREEMPTED if step < steps else 0


# ---------------------------------------------------------------- what the cluster does


def run(folder: str, steps: int, number: signal.Signals | None) -> tuple[int, list[int]]:
    """Run a training in a process of its own, and send it a signal once it trains. Return how it ended."""
    # Forks of a process that has imported PyTorch and has no threads begin at once.
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=in_process, args=(folder, steps, theirs))
    process.start()
    theirs.close()
    ours.recv()
    if number is not None:
        assert process.pid is not None
        os.kill(process.pid, number)
    process.join()
    return process.exitcode or 0, sorted(int(name.removeprefix("step-")) for name in os.listdir(folder))


def in_process(folder: str, steps: int, begun: Connection) -> None:
    torch.set_num_threads(1)
    sys.exit(train(folder, steps, lambda: begun.send(None)))


def main() -> bool:
    checks: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as folder:
        last = 0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            status, saved = run(folder, 10_000_000, number)
            checks[f"{number.name}: exit status {status}, checkpoints of steps {saved}"] = (
                status == PREEMPTED and saved[-1] > last
            )
            last = saved[-1]
        status, saved = run(folder, last + 200, None)
        checks[f"left alone: exit status {status}, checkpoints of steps {saved}"] = status == 0 and saved[-1] > last
    for what, holds in checks.items():
        print(f"  {'yes' if holds else 'NO '}  {what}")
    return all(checks.values())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(train(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 10_000))
    sys.exit(0 if main() else 1)
