"""One training job in a process of its own: trains, checkpoints when asked, and hands out its weights.

Commands: ``checkpoint`` (with an ``id`` and a ``reason``), ``preempt`` (checkpoint, then end) and ``release`` (the
evaluator has opened the weights of a step). When the service is gone, so is the job.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import pickle
from collections import deque
from pathlib import Path
from time import perf_counter, time
from typing import Any

import torch
from protocol import Channel, Message
from training import Digits, Trainer

import aiostage

UNCLAIMED_WEIGHTS = 2
"""How many versions of the weights wait for somebody to open them before the oldest is dropped."""

BEAT_SECONDS = 0.01
BEATS_IN_A_REPORT = 25


class Job:
    """The coroutines of a worker and what they share."""

    def __init__(
        self, service: Channel, trainer: Trainer, stager: aiostage.AsyncStager, checkpoints: aiostage.Checkpointer
    ) -> None:
        self.service = service
        self.trainer = trainer
        self.stager = stager
        self.checkpoints = checkpoints
        self.asked: deque[Message] = deque()
        self.weights: dict[int, Any] = {}

    async def train(self, steps: int, pace: float) -> None:
        """Train until the given step, or until preempted."""
        while self.trainer.steps < steps:
            # The step is the work on a CPU, so it runs in a thread; the event loop stays with commands and copies.
            loss, _ = await asyncio.gather(asyncio.to_thread(self.trainer.step), asyncio.sleep(pace))
            self.service.tell("step", step=self.trainer.steps, loss=loss)
            if self.asked and await self.answer():
                return
        await self.checkpoint({"id": "final", "reason": "finished"}, wait=True)
        self.service.tell("finished", step=self.trainer.steps)

    async def answer(self) -> bool:
        """Carry out what was asked for, between two steps; return whether to stop."""
        stop = False
        while self.asked:
            command = self.asked.popleft()
            stop = command["do"] == "preempt"
            await self.checkpoint(command, wait=stop)
            if stop:
                self.service.tell("preempted", step=self.trainer.steps)
                break
        return stop

    async def checkpoint(self, command: Message, *, wait: bool) -> None:
        """Capture the state; training goes on while it is written."""
        name, step = command["id"], self.trainer.steps
        self.service.tell("checkpoint", id=name, stage="staging", reason=command["reason"], step=step, at=time())
        try:
            handle = await self.checkpoints.save(step, self.trainer.state_dict())
        except aiostage.CheckpointExistsError:
            # Nothing was learnt since the last one.
            self.service.tell("checkpoint", id=name, stage="skipped", at=time())
            return
        self.service.tell("checkpoint", id=name, stage="captured", at=time())
        committing = asyncio.create_task(self.follow(name, handle))
        await self.push_weights()
        if wait:
            await committing

    async def follow(self, name: str, handle: aiostage.SaveHandle) -> None:
        """Report what becomes of a checkpoint."""
        try:
            info = await handle.committed()
        except Exception as error:
            self.service.tell("checkpoint", id=name, stage="failed", error=str(error), at=time())
        else:
            self.service.tell(
                "checkpoint", id=name, stage="committed", nbytes=info.nbytes, path=str(info.path), at=time()
            )

    async def push_weights(self) -> None:
        """Stage the weights once more, in memory that another process can open, and say where they are."""
        step = self.trainer.steps
        self.weights[step] = await self.stager.stage(dict(self.trainer.model.state_dict()))
        while len(self.weights) > UNCLAIMED_WEIGHTS:
            del self.weights[min(self.weights)]
        handle = await self.stager.share(self.weights[step])
        self.service.tell("weights", step=step, handle=base64.b64encode(pickle.dumps(handle)).decode())

    async def measure_delay(self) -> None:
        """Report how late the event loop runs what is due: what checkpoints must not change."""
        while True:
            worst = 0.0
            for _ in range(BEATS_IN_A_REPORT):
                due = perf_counter() + BEAT_SECONDS
                await asyncio.sleep(BEAT_SECONDS)
                worst = max(worst, perf_counter() - due)
            self.service.tell("delay", at=time(), worst=worst)

    async def obey(self) -> None:
        """Take commands until the service is gone."""
        async for line in self.service.lines():
            command = json.loads(line)
            if command["do"] == "release":
                self.weights.pop(command["step"], None)
            else:
                self.asked.append(command)


async def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    service = await Channel.to_service()
    trainer = Trainer(Digits(), seed=arguments.seed, width=arguments.width)

    def progress(state: Any) -> None:
        step = int(state.name.rpartition("-")[2])
        service.tell("progress", step=step, written=state.written_bytes, total=state.total_bytes)

    options = aiostage.StagingOptions(use_shared_memory=True)
    async with (
        aiostage.AsyncStager(options) as stager,
        aiostage.Checkpointer(arguments.checkpoints, stager, keep=arguments.keep, progress=progress) as checkpoints,
    ):
        latest = await checkpoints.latest()
        if latest is not None:
            trainer.load_state_dict(await checkpoints.restore())
        service.tell("started", step=trainer.steps)
        job = Job(service, trainer, stager, checkpoints)
        measuring = asyncio.create_task(job.measure_delay())
        training = asyncio.create_task(job.train(arguments.steps, arguments.pace))
        obeying = asyncio.create_task(job.obey())
        done, _ = await asyncio.wait((measuring, training, obeying), return_when=asyncio.FIRST_COMPLETED)
        for task in {measuring, training, obeying} - done:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        for task in done:
            task.result()
    await service.aclose()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=Path, required=True, help="where this job's checkpoints lie")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--pace", type=float, default=0.0, help="seconds that a step takes at least")
    parser.add_argument("--keep", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(main(parse()))
