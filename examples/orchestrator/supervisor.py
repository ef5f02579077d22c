"""Owns the training jobs: starts their processes, follows what they say, and starts them again when they die."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from time import time
from typing import Any

from feed import Feed
from protocol import LONGEST_LINE, Message, encode, messages

__all__ = ["Checkpoint", "Job", "JobSpec", "Settings", "Supervisor"]

log = logging.getLogger("orchestrator")

HERE = Path(__file__).parent

CHECKPOINTS_SHOWN = 40
LOSSES_PUBLISHED_EVERY = 0.2
GOODBYE_SECONDS = 20.0
"""How long a worker may take for its last checkpoint when the service ends."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the service runs its jobs.

    Attributes:
        root: Where checkpoints lie, a directory for each job.
        every: Seconds between two scheduled checkpoints of a job; 0 for none.
        keep: How many checkpoints of a job are kept.
        max_restarts: How often a job is started again without having come any further before it is given up.
        backoff: Seconds before the first restart; doubled each time.
    """

    root: Path
    every: float = 10.0
    keep: int = 3
    max_restarts: int = 5
    backoff: float = 0.5


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """What a job is to do."""

    name: str
    steps: int = 2000
    seed: int = 0
    width: int = 512
    pace: float = 0.02


@dataclass(kw_only=True)
class Checkpoint:
    """One checkpoint on its way, and when it got where (seconds since the epoch)."""

    id: str
    reason: str
    stage: str = "asked"
    step: int | None = None
    at: dict[str, float] = field(default_factory=dict)
    written: int = 0
    total: int = 0
    nbytes: int | None = None
    error: str | None = None

    @property
    def ended(self) -> bool:
        return self.stage in ("committed", "failed", "lost", "skipped")

    def reach(self, stage: str, at: float | None = None) -> None:
        self.stage = stage
        self.at[stage] = time() if at is None else at


class Job:
    """One job and its process. Its state is one of starting, running, preempted, finished, restarting and failed."""

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self.state = "starting"
        self.step = 0
        self.restarts = 0
        self.losses: dict[int, float] = {}
        self.checkpoints: deque[Checkpoint] = deque(maxlen=CHECKPOINTS_SHOWN)
        self.score: dict[str, float] | None = None
        self.process: asyncio.subprocess.Process | None = None
        self.wanted = asyncio.Event()
        self.wanted.set()
        self.unpublished: list[tuple[int, float]] = []

    @property
    def name(self) -> str:
        return self.spec.name

    def describe(self) -> dict[str, Any]:
        """Return what the API and the page show, without the losses."""
        return {
            "name": self.name,
            "state": self.state,
            "step": self.step,
            "steps": self.spec.steps,
            "restarts": self.restarts,
            "pid": self.process.pid if self.process is not None and self.process.returncode is None else None,
            "score": self.score,
            "checkpoints": [asdict(checkpoint) for checkpoint in self.checkpoints],
        }

    def under_way(self) -> Iterator[Checkpoint]:
        """Iterate over the checkpoints that have not come to an end."""
        return (checkpoint for checkpoint in self.checkpoints if not checkpoint.ended)

    def send(self, message: Message) -> None:
        """Tell the worker something, if there is one."""
        if self.process is not None and self.process.returncode is None and self.process.stdin is not None:
            self.process.stdin.write(encode(message))


class Supervisor:
    """All jobs of a service. Made and run inside one event loop.

    Args:
        settings: How to run jobs.
        feed: Where to publish what happens.
    """

    def __init__(self, settings: Settings, feed: Feed) -> None:
        self.settings = settings
        self.feed = feed
        self.jobs: dict[str, Job] = {}
        self.committed = 0
        self.failed = 0
        self._tasks: asyncio.TaskGroup | None = None
        self._evaluator: asyncio.subprocess.Process | None = None
        self._numbers = count(1)
        self._ending = False

    @contextlib.asynccontextmanager
    async def running(self) -> Any:
        """Run jobs inside this block. At its end every running job checkpoints once more and stops."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            background = [
                tasks.create_task(self._evaluate()),
                tasks.create_task(self._schedule()),
                tasks.create_task(self._publish_losses()),
            ]
            try:
                yield self
            finally:
                self._ending = True
                await self._say_goodbye()
                for task in background:
                    task.cancel()
                self._tasks = None

    # What can be asked for

    def start(self, spec: JobSpec) -> Job:
        """Start a job. If there are checkpoints under its name, it goes on from the last.

        Raises:
            ValueError: If there is a job of that name.
        """
        if spec.name in self.jobs:
            raise ValueError(f"there is a job named {spec.name!r} already")
        if self._tasks is None:
            raise RuntimeError("the supervisor is not running")
        job = self.jobs[spec.name] = Job(spec)
        self._tasks.create_task(self._supervise(job))
        self._changed(job)
        return job

    def checkpoint(self, job: Job, reason: str) -> Checkpoint:
        """Ask a running job for a checkpoint."""
        return self._ask(job, "checkpoint", reason)

    def preempt(self, job: Job) -> Checkpoint:
        """Ask a running job to checkpoint and stop, until it is resumed."""
        job.wanted.clear()
        return self._ask(job, "preempt", "preemption")

    def resume(self, job: Job) -> None:
        """Start a preempted job again, from its last checkpoint."""
        job.wanted.set()

    def _ask(self, job: Job, what: str, reason: str) -> Checkpoint:
        checkpoint = Checkpoint(id=str(next(self._numbers)), reason=reason)
        checkpoint.reach("asked")
        job.checkpoints.append(checkpoint)
        job.send({"do": what, "id": checkpoint.id, "reason": reason})
        self._changed(job)
        return checkpoint

    # The life of a job

    async def _supervise(self, job: Job) -> None:
        """Run a job's process until the job is finished, given up, or the service ends."""
        fruitless = 0
        while not self._ending:
            before = job.step
            await self._run(job)
            if job.state in ("finished", "failed"):
                return
            if job.state == "preempted":
                await job.wanted.wait()
                continue
            fruitless = fruitless + 1 if job.step <= before else 1
            if fruitless > self.settings.max_restarts:
                log.error("%s has died %d times without coming any further", job.name, fruitless)
                self._change(job, "failed")
                return
            job.restarts += 1
            self._change(job, "restarting")
            await asyncio.sleep(self.settings.backoff * 2 ** (fruitless - 1))

    async def _run(self, job: Job) -> None:
        """Start a process and follow it to its end."""
        spec = job.spec
        arguments = {
            "--checkpoints": self.settings.root / spec.name,
            "--steps": spec.steps,
            "--seed": spec.seed,
            "--width": spec.width,
            "--pace": spec.pace,
            "--keep": self.settings.keep,
        }
        job.process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(HERE / "worker.py"),
            *(str(word) for pair in arguments.items() for word in pair),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LONGEST_LINE,
        )
        assert job.process.stdout is not None
        try:
            async for message in messages(job.process.stdout):
                self._hear(job, message)
            code = await job.process.wait()
        finally:
            if job.process.returncode is None:
                job.process.kill()
        for checkpoint in job.under_way():
            checkpoint.reach("lost")
        if code:
            log.warning("%s died with status %d at step %d", job.name, code, job.step)
        self._changed(job)

    def _hear(self, job: Job, message: Message) -> None:
        """Take note of what a worker says."""
        match message["event"]:
            case "step":
                job.step = message["step"]
                job.losses[job.step] = message["loss"]
                job.unpublished.append((job.step, message["loss"]))
                return
            case "started":
                job.step = message["step"]
                self._change(job, "running")
            case "checkpoint":
                self._follow(job, message)
            case "progress":
                for checkpoint in job.under_way():
                    if checkpoint.step == message["step"]:
                        checkpoint.written, checkpoint.total = message["written"], message["total"]
            case "weights":
                self._push_weights(job, message)
                return
            case "preempted" | "finished" as state:
                self._change(job, state)
        self._changed(job)

    def _follow(self, job: Job, message: Message) -> None:
        checkpoint = next((known for known in job.checkpoints if known.id == message["id"]), None)
        if checkpoint is None:
            checkpoint = Checkpoint(id=message["id"], reason=message.get("reason", ""))
            job.checkpoints.append(checkpoint)
        checkpoint.step = message.get("step", checkpoint.step)
        checkpoint.nbytes = message.get("nbytes", checkpoint.nbytes)
        checkpoint.error = message.get("error")
        checkpoint.reach(message["stage"], message["at"])
        self.committed += checkpoint.stage == "committed"
        self.failed += checkpoint.stage == "failed"

    # The evaluator

    async def _evaluate(self) -> None:
        """Keep an evaluator alive and follow it."""
        while True:
            self._evaluator = process = await asyncio.create_subprocess_exec(
                sys.executable,
                str(HERE / "evaluator.py"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=LONGEST_LINE,
            )
            assert process.stdout is not None
            try:
                async for message in messages(process.stdout):
                    self._hear_evaluator(message)
            finally:
                if process.returncode is None:
                    process.kill()
                    await asyncio.shield(process.wait())
            log.warning("the evaluator died with status %d", await process.wait())
            await asyncio.sleep(self.settings.backoff)

    def _push_weights(self, job: Job, message: Message) -> None:
        """Hand a staged tree's handle on; the weights themselves never come here."""
        evaluator = self._evaluator
        if evaluator is not None and evaluator.returncode is None and evaluator.stdin is not None:
            evaluator.stdin.write(
                encode({"do": "evaluate", "job": job.name, "step": message["step"], "handle": message["handle"]})
            )

    def _hear_evaluator(self, message: Message) -> None:
        if message["event"] == "ready":
            return
        job = self.jobs[message["job"]]
        if message["event"] in ("opened", "missed"):
            job.send({"do": "release", "step": message["step"]})
        elif message["event"] == "score":
            job.score = {key: message[key] for key in ("step", "loss", "accuracy")}
            self._changed(job)

    # In the background

    async def _schedule(self) -> None:
        if not self.settings.every:
            return
        while True:
            await asyncio.sleep(self.settings.every)
            for job in self.jobs.values():
                if job.state == "running" and not any(job.under_way()):
                    self.checkpoint(job, "schedule")

    async def _publish_losses(self) -> None:
        """Publish losses a few times a second, and not one by one."""
        while True:
            await asyncio.sleep(LOSSES_PUBLISHED_EVERY)
            for job in self.jobs.values():
                if job.unpublished:
                    points, job.unpublished = job.unpublished, []
                    self.feed.publish("losses", {"name": job.name, "step": job.step, "points": points})

    async def _say_goodbye(self) -> None:
        for job in self.jobs.values():
            if job.state == "running":
                self.preempt(job)
            # Whoever waits to be resumed sees that the service ends.
            job.wanted.set()
        alive = [job.process for job in self.jobs.values() if job.process and job.process.returncode is None]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE_SECONDS):
                await asyncio.gather(*(process.wait() for process in alive))
        for process in alive:
            if process.returncode is None:
                process.kill()

    def _change(self, job: Job, state: str) -> None:
        log.info("%s is %s at step %d", job.name, state, job.step)
        job.state = state
        self._changed(job)

    def _changed(self, job: Job) -> None:
        self.feed.publish("job", job.describe())
