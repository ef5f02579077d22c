"""Owns the training jobs: starts their processes, follows what they say, and starts them again when they die.

What a process does wrong is its own fault, and ends that process. What goes wrong in here ends the service: a page that
says "running" of jobs that nothing supervises is worse than none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from time import time

import events
from feed import Feed
from process import Child

__all__ = ["Checkpoint", "Job", "JobSpec", "Score", "Settings", "Status", "Supervisor"]

log = logging.getLogger("orchestrator")

HERE = Path(__file__).parent

CHECKPOINTS_SHOWN = 40
SCORES_SHOWN = 200
DELAYS_SHOWN = 480
LOSSES_KEPT = 20_000
MOST_JOBS = 64
PUBLISHED_EVERY = 0.2
SECONDS_TO_STOP = 20.0
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
        worker: The script that trains.
        evaluator: The script that scores.
    """

    root: Path
    every: float = 10.0
    keep: int = 3
    max_restarts: int = 5
    backoff: float = 0.5
    worker: Path = HERE / "worker.py"
    evaluator: Path = HERE / "evaluator.py"


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
    """One checkpoint on its way, and when it got where (seconds since the epoch).

    Its stage is one of asked, staging, captured, committed, failed, lost and skipped.
    """

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


@dataclass(frozen=True, kw_only=True)
class Score:
    """What the evaluator found."""

    step: int
    loss: float | None
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Status:
    """What the API and the page show of a job, without its curves."""

    name: str
    state: str
    step: int
    steps: int
    restarts: int
    pid: int | None
    died_of: str | None
    score: Score | None
    delay: float | None
    """How late the worker's event loop was at worst in its last report, in seconds."""
    checkpoints: list[Checkpoint]


class Job:
    """One job and its process. Its state is one of starting, running, preempted, finished, restarting and failed."""

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self.state = "starting"
        self.step = 0
        self.restarts = 0
        self.died_of: str | None = None
        self.losses: dict[int, float | None] = {}
        self.checkpoints: deque[Checkpoint] = deque(maxlen=CHECKPOINTS_SHOWN)
        self.scores: deque[Score] = deque(maxlen=SCORES_SHOWN)
        self.delays: deque[tuple[float, float]] = deque(maxlen=DELAYS_SHOWN)
        self.child: Child | None = None
        self.supervising: asyncio.Task[None] | None = None
        self.wanted = asyncio.Event()
        self.wanted.set()
        self.numbers = count(1)
        self.changed = True
        self.new_losses: list[tuple[int, float | None]] = []
        self.new_delays: list[tuple[float, float]] = []

    @property
    def name(self) -> str:
        return self.spec.name

    def status(self) -> Status:
        """Return what the API and the page show."""
        return Status(
            name=self.name,
            state=self.state,
            step=self.step,
            steps=self.spec.steps,
            restarts=self.restarts,
            pid=self.child.pid if self.child is not None and self.child.alive else None,
            died_of=self.died_of,
            score=self.scores[-1] if self.scores else None,
            delay=self.delays[-1][1] if self.delays else None,
            checkpoints=list(self.checkpoints),
        )

    def under_way(self) -> Iterator[Checkpoint]:
        """Iterate over the checkpoints that have not come to an end."""
        return (checkpoint for checkpoint in self.checkpoints if not checkpoint.ended)

    def note_loss(self, step: int, loss: float) -> None:
        # JSON has no NaN.
        self.losses[step] = known = loss if math.isfinite(loss) else None
        self.new_losses.append((step, known))
        while len(self.losses) > LOSSES_KEPT:
            del self.losses[next(iter(self.losses))]


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
        self._evaluator: Child | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Supervisor]:
        """Run jobs inside this block. At its end every running job checkpoints once more and stops.

        Raises:
            ExceptionGroup: If the supervision itself fails. The block is cancelled then.
        """
        async with asyncio.TaskGroup() as background:
            endless = [
                background.create_task(work) for work in (self._evaluate(), self._schedule(), self._publish_changes())
            ]
            async with asyncio.TaskGroup() as self._tasks:
                try:
                    yield self
                finally:
                    self._tasks = None
                    await self._stop_jobs()
                    for job in self.jobs.values():
                        if job.supervising is not None:
                            job.supervising.cancel()
            for task in endless:
                task.cancel()

    # What can be asked for

    def start(self, spec: JobSpec) -> Job:
        """Start a job. If there are checkpoints under its name, it goes on from the last.

        Raises:
            ValueError: If there is a job of that name, or if there are too many.
        """
        if spec.name in self.jobs:
            raise ValueError(f"there is a job named {spec.name!r} already")
        if len(self.jobs) >= MOST_JOBS:
            raise ValueError(f"there are {MOST_JOBS} jobs already, which is the most that one service runs")
        if self._tasks is None:
            raise ValueError("the service is ending")
        job = self.jobs[spec.name] = Job(spec)
        job.supervising = self._tasks.create_task(self._supervise(job))
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
        checkpoint = Checkpoint(id=str(next(job.numbers)), reason=reason)
        checkpoint.reach("asked")
        job.checkpoints.append(checkpoint)
        if job.child is None or not job.child.send({"do": what, "id": checkpoint.id, "reason": reason}):
            checkpoint.error = "the worker does not take commands"
            checkpoint.reach("lost")
        job.changed = True
        return checkpoint

    # The life of a job

    async def _supervise(self, job: Job) -> None:
        """Run a job's process until the job is finished or given up."""
        fruitless = 0
        while True:
            before = job.step
            await self._run(job)
            if job.state == "finished" or self._tasks is None:
                return
            if not job.wanted.is_set():
                # Also if it died on the way: its last commit is there.
                self._change(job, "preempted")
                await job.wanted.wait()
                self._change(job, "starting")
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
        job.child = await Child.start(self.settings.worker, *(word for pair in arguments.items() for word in pair))
        job.died_of = await job.child.follow(events.worker_event, lambda event: self._handle(job, event))
        for checkpoint in job.under_way():
            checkpoint.error = job.died_of or f"process {job.child.pid} ended before it was committed"
            checkpoint.reach("lost")
        if job.died_of:
            log.warning("%s, at step %d: %s", job.name, job.step, job.died_of)
        job.changed = True

    def _handle(self, job: Job, event: events.WorkerEvent) -> None:
        """Take note of what a worker says."""
        job.changed = True
        match event:
            case events.Step():
                job.step = event.step
                job.note_loss(event.step, event.loss)
            case events.Started():
                job.step = event.step
                self._change(job, "running")
            case events.Delay():
                job.delays.append((event.at, event.worst))
                job.new_delays.append((event.at, event.worst))
            case events.CheckpointReached():
                self._follow(job, event)
            case events.Progress():
                for checkpoint in job.under_way():
                    if checkpoint.step == event.step:
                        checkpoint.written, checkpoint.total = event.written, event.total
            case events.Weights():
                # A staged tree's handle is handed on; the weights themselves never come here.
                if self._evaluator is not None:
                    self._evaluator.send(
                        {"do": "evaluate", "job": job.name, "step": event.step, "handle": event.handle}
                    )
            case events.Ended():
                self._change(job, event.event)

    def _follow(self, job: Job, event: events.CheckpointReached) -> None:
        checkpoint = next((known for known in job.checkpoints if known.id == event.id), None)
        if checkpoint is None:
            checkpoint = Checkpoint(id=event.id, reason=event.reason)
            job.checkpoints.append(checkpoint)
        checkpoint.step = checkpoint.step if event.step is None else event.step
        checkpoint.nbytes = event.nbytes
        checkpoint.error = event.error
        checkpoint.reach(event.stage, event.at)
        self.committed += checkpoint.stage == "committed"
        self.failed += checkpoint.stage == "failed"

    # In the background

    async def _evaluate(self) -> None:
        """Keep an evaluator alive and follow it."""
        while True:
            self._evaluator = await Child.start(self.settings.evaluator)
            died_of = await self._evaluator.follow(events.evaluator_event, self._handle_score)
            log.warning("the evaluator has ended: %s", died_of)
            await asyncio.sleep(self.settings.backoff)

    def _handle_score(self, event: events.EvaluatorEvent) -> None:
        if isinstance(event, events.Ready) or (job := self.jobs.get(event.job)) is None:
            return
        if isinstance(event, events.Opened):
            if job.child is not None:
                job.child.send({"do": "release", "step": event.step})
            return
        loss = event.loss if math.isfinite(event.loss) else None
        job.scores.append(Score(step=event.step, loss=loss, accuracy=event.accuracy))
        job.changed = True

    async def _schedule(self) -> None:
        if not self.settings.every:
            return
        while True:
            await asyncio.sleep(self.settings.every)
            for job in self.jobs.values():
                if job.state == "running" and not any(job.under_way()):
                    self.checkpoint(job, "schedule")

    def everything(self) -> dict[str, object]:
        """Return what a page that has just been opened needs to know."""
        return {
            "now": time(),
            "jobs": [
                asdict(job.status())
                | {
                    "losses": list(job.losses.items()),
                    "scores": [asdict(score) for score in job.scores],
                    "delays": list(job.delays),
                }
                for job in self.jobs.values()
            ],
        }

    async def _publish_changes(self) -> None:
        """Publish what has changed a few times a second, and not one by one."""
        while True:
            await asyncio.sleep(PUBLISHED_EVERY)
            for job in self.jobs.values():
                if job.changed:
                    news = {"now": time(), "losses": job.new_losses, "delays": job.new_delays}
                    if self.feed:
                        self.feed.publish("job", asdict(job.status()) | news)
                    job.changed, job.new_losses, job.new_delays = False, [], []

    async def _stop_jobs(self) -> None:
        """Have every job that runs checkpoint once more and stop."""
        alive = [job for job in self.jobs.values() if job.child is not None and job.child.alive]
        for job in alive:
            if job.state != "finished":
                self.preempt(job)
        if alive:
            await asyncio.wait([job.supervising for job in alive if job.supervising], timeout=SECONDS_TO_STOP)

    def _change(self, job: Job, state: str) -> None:
        if job.state != state:
            log.info("%s is %s at step %d", job.name, state, job.step)
        job.state = state
        job.changed = True
