"""An async trainer that checkpoints itself while its other coroutines keep running.

A small convolutional network learns scikit-learn's digits. Beside the training run a heartbeat, which stands for
whatever an event loop has to answer in time (rollouts, requests, health checks), and an evaluation of every
checkpoint. The network is wider than digits deserve, so that model, average and optimizer together weigh 270 MB
and are worth staging.

Run it with ``make demo``; AIOSTAGE_EXAMPLE_QUICK=1 shrinks it to a few seconds. It draws what happened into the file
that the first argument names. It exits with 1 if the network does not learn, or if the reloaded checkpoint does not
give the same numbers to the bit.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from demo.picture import Bar, Strip, draw
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager
from torch.distributed.checkpoint.staging import StagingOptions as TorchStagingOptions
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import aiostage
from aiostage.abc import Observer, Span
from aiostage.observe import observing

QUICK = bool(os.environ.get("AIOSTAGE_EXAMPLE_QUICK"))
WIDTH = 128 if QUICK else 4096
STEPS = 70 if QUICK else 200
STEPS_OF_OTHER_WAYS = 30 if QUICK else 75
STEPS_BETWEEN_CHECKPOINTS = 20 if QUICK else 30
TARGET_ACCURACY = 0.80 if QUICK else 0.95
BATCH = 32
HEARTBEAT_SECONDS = 0.01
BUSY_ALONE_SECONDS, BUSY_TRAINING_SECONDS = 0.005, 0.02
"""A heartbeat later than this, with nothing or with training beside it, says that the machine is busy elsewhere."""

LANES = {"train": "#9db7d5", "capture": "#3b7dd8", "write": "#e2a44b", "commit": "#2a9d5c"}

# ---------------------------------------------------------------- the model, which knows nothing of checkpoints


class Digits:
    """1,797 handwritten digits of 8 x 8 pixels; the last 360 of a fixed shuffle are held out."""

    def __init__(self) -> None:
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
        images = torch.tensor(digits.images, dtype=torch.float32)[order].unsqueeze(1) / 16
        labels = torch.tensor(digits.target)[order]
        self.images, self.held_out_images = images[:-360], images[-360:]
        self.labels, self.held_out_labels = labels[:-360], labels[-360:]


def network() -> nn.Module:
    """Return an untrained network: two convolutions and a wide hidden layer."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(64 * 8 * 8, WIDTH),
        nn.GELU(),
        nn.Linear(WIDTH, 10),
    )


class Trainer:
    """A model, its moving average and its optimizer, and all else that decides how training goes on."""

    def __init__(self, digits: Digits, seed: int) -> None:
        torch.manual_seed(seed)
        self.digits = digits
        self.model = network()
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.batches = torch.Generator().manual_seed(seed)
        self.steps = 0

    def step(self) -> float:
        """Learn from one batch; return its loss."""
        chosen = torch.randint(len(self.digits.labels), (BATCH,), generator=self.batches)
        loss = nn.functional.cross_entropy(self.model(self.digits.images[chosen]), self.digits.labels[chosen])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.average.update_parameters(self.model)
        self.steps += 1
        return loss.item()

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.get_state(),
            "dropout": torch.get_rng_state(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.set_state(state["batches"])
        torch.set_rng_state(state["dropout"])
        self.steps = state["steps"]


@dataclass(frozen=True)
class Score:
    loss: float
    accuracy: float


@torch.no_grad()
def evaluate(weights: dict[str, torch.Tensor], digits: Digits) -> Score:
    """Score weights where they lie: on the meta device the network is only its structure."""
    with torch.device("meta"):
        structure = network().eval()
    guesses = functional_call(structure, weights, (digits.held_out_images,))
    loss = nn.functional.cross_entropy(guesses, digits.held_out_labels)
    return Score(loss.item(), (guesses.argmax(dim=1) == digits.held_out_labels).float().mean().item())


# ---------------------------------------------------------------- four ways to checkpoint, ours first


class Way(ABC):
    """Capture while training waits, commit while it goes on. Lanes say where in the picture these two are seen."""

    capture_lane: str | None = "capture"
    commit_lane: str | None = "write"

    def __init__(self, path: Path) -> None:
        self.path = path

    async def prewarm(self, state: dict[str, Any]) -> None:
        """Do what only the first checkpoint would have to do, if the way has such a thing."""
        return

    @abstractmethod
    async def capture(self, state: dict[str, Any]) -> dict[str, Any]: ...

    @abstractmethod
    async def commit(self, captured: dict[str, Any]) -> int:
        """Make it durable; return its bytes."""


class Aiostage(Way):
    """aiostage"""

    commit_lane = None  # aiostage says itself when it writes and commits: see Lanes

    def __init__(self, path: Path, stager: aiostage.AsyncStager) -> None:
        super().__init__(path)
        self.stager = stager

    async def prewarm(self, state: dict[str, Any]) -> None:
        # Memory for the copies is allocated and faulted in here. Otherwise the first checkpoint waits for that: it is
        # captured ten times as slowly as those that follow.
        await self.stager.prewarm(state)

    async def capture(self, state: dict[str, Any]) -> dict[str, Any]:
        return await self.stager.stage(state)

    async def commit(self, captured: dict[str, Any]) -> int:
        return (await aiostage.save(captured, self.path, overwrite=True)).nbytes


class TorchSave(Way):
    """torch.save() in the coroutine"""

    capture_lane, commit_lane = "write", None  # it is captured by being written

    async def capture(self, state: dict[str, Any]) -> dict[str, Any]:
        torch.save(state, self.path)
        return state

    async def commit(self, captured: dict[str, Any]) -> int:
        return self.path.stat().st_size


class DefaultStagerThread(Way):
    """DefaultStager and torch.save() in threads"""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.stager = DefaultStager(TorchStagingOptions(False, False, True, False))

    async def capture(self, state: dict[str, Any]) -> dict[str, Any]:
        return await asyncio.wrap_future(self.stager.stage(state))

    async def commit(self, captured: dict[str, Any]) -> int:
        await asyncio.to_thread(torch.save, captured, self.path)
        return self.path.stat().st_size


class NoCheckpoints(Way):
    """no checkpoints at all"""

    capture_lane = commit_lane = None

    async def capture(self, state: dict[str, Any]) -> dict[str, Any]:
        return state

    async def commit(self, captured: dict[str, Any]) -> int:
        await asyncio.sleep(1)  # to watch the heartbeat meanwhile
        return 0


# ---------------------------------------------------------------- the event loop and what runs on it


class Heartbeat:
    """Wants to run every 10 ms, and notes how late it was."""

    def __init__(self) -> None:
        self._beats: list[tuple[float, float]] = []

    @property
    def delays(self) -> list[tuple[float, float]]:
        """When each beat was due, and how late it was, in seconds."""
        return [(due, ran - due) for due, ran in self._beats]

    async def run(self) -> None:
        while True:
            due = perf_counter() + HEARTBEAT_SECONDS
            await asyncio.sleep(HEARTBEAT_SECONDS)
            self._beats.append((due, perf_counter()))

    def worst_delay(self, begin: float, end: float) -> float:
        """Return how late the latest beat between two moments was, in seconds."""
        return max((ran - due for due, ran in self._beats if ran >= begin and due <= end), default=0.0)


class Lanes(Observer):
    """Notes when aiostage writes files and commits: an observer like any that you may write."""

    def __init__(self, bars: list[Bar]) -> None:
        self._bars = bars

    def started(self, span: Span) -> None:
        return

    def complete(self, span: Span) -> None:
        if span.name in LANES and span.end is not None:
            self._bars.append(Bar(span.name, span.begin, span.end))

    def failed(self, span: Span, error: BaseException) -> None:
        return


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint took, in seconds from its beginning."""

    steps: int
    began: float
    nbytes: int
    to_captured: float
    to_committed: float
    worst_delay: float


class Run:
    """Trains beside a heartbeat, and checkpoints in one of the ways."""

    def __init__(self, trainer: Trainer, way: Way) -> None:
        self.trainer = trainer
        self.way = way
        self.heartbeat = Heartbeat()
        self.losses: list[float] = []
        self.checkpoints: list[Checkpoint] = []
        self.scores: dict[int, Score] = {}
        self.bars: list[Bar] = []

    async def train(self, steps: int) -> None:
        """Train, and checkpoint every few steps.

        On a GPU a step only enqueues work, and may be called right here. On a CPU the step is the work, so it runs in
        a thread, as it must wherever something else lives on the loop: PyTorch computes without the GIL.
        """
        with observing(Lanes(self.bars)):
            await self._train(steps)

    async def _train(self, steps: int) -> None:
        async with asyncio.TaskGroup() as tasks:
            heartbeat = tasks.create_task(self.heartbeat.run())
            async with asyncio.TaskGroup() as background:
                commit: asyncio.Task[None] | None = None
                for _ in range(steps):
                    began = perf_counter()
                    self.losses.append(await asyncio.to_thread(self.trainer.step))
                    self.bars.append(Bar("train", began, perf_counter()))
                    if self.trainer.steps == 1:  # the optimizer has its state only now
                        await self.way.prewarm(self.trainer.state_dict())
                    if self.trainer.steps % STEPS_BETWEEN_CHECKPOINTS == 0:
                        if commit is not None:
                            await commit  # one at a time, which bounds memory to two staged copies
                        commit = await self.checkpoint(background)
            heartbeat.cancel()

    async def checkpoint(self, background: asyncio.TaskGroup) -> asyncio.Task[None]:
        """Capture the state; leave what follows to the background."""
        began = perf_counter()
        captured = await self.way.capture(self.trainer.state_dict())
        captured_at = perf_counter()
        if self.way.capture_lane:
            self.bars.append(Bar(self.way.capture_lane, began, captured_at))
        # From here on the trainer may change its state: `captured` stays as it is.
        background.create_task(self.evaluate(captured))
        return background.create_task(self.commit(captured, began, captured_at))

    async def commit(self, captured: dict[str, Any], began: float, captured_at: float) -> None:
        nbytes = await self.way.commit(captured)
        committed_at = perf_counter()
        if self.way.commit_lane:
            self.bars.append(Bar(self.way.commit_lane, captured_at, committed_at))
        await asyncio.sleep(2 * HEARTBEAT_SECONDS)  # a beat that was held up runs only now
        delay = self.heartbeat.worst_delay(began, committed_at)
        times = captured_at - began, committed_at - began
        self.checkpoints.append(Checkpoint(captured["steps"], began, nbytes, *times, delay))

    async def evaluate(self, captured: dict[str, Any]) -> None:
        self.scores[captured["steps"]] = await asyncio.to_thread(evaluate, captured["model"], self.trainer.digits)


# ---------------------------------------------------------------- the demonstration


async def main() -> bool:
    """Train, reload, compare; return whether everything came out as it should."""
    # One core computes; the other is left to the event loop, the copies and the disk.
    torch.set_num_threads(1)
    digits = Digits()
    alone = await delay_alone()
    print(f"Nothing beside it, the heartbeat is late by at most {alone * 1e3:.1f} ms on this machine.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        print(f"Training for {STEPS} steps, with a checkpoint every {STEPS_BETWEEN_CHECKPOINTS}.\n")
        async with aiostage.AsyncStager() as stager:
            run = Run(Trainer(digits, seed=0), Aiostage(path, stager))
            await run.train(STEPS)
        show_checkpoints(run)
        fine = await reload_and_compare(path, run)
        print(f"\nThe same training for {STEPS_OF_OTHER_WAYS} steps, checkpointed in other ways.\n")
        file = Path(folder) / "checkpoint.pt"
        others = NoCheckpoints(file), TorchSave(file), DefaultStagerThread(file)
        runs = [run, *(Run(Trainer(digits, seed=0), way) for way in others)]
        for other in runs[1:]:
            await other.train(STEPS_OF_OTHER_WAYS)
        show_ways(runs)
    show_whether_to_believe(alone, runs[1])
    with_checkpoints = [run for run in runs if run.way.capture_lane]
    drawn = picture(with_checkpoints)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(drawn, encoding="utf-8")
        print(f"\nThe picture: {Path(sys.argv[1]).resolve()}")
    return fine


async def delay_alone() -> float:
    """Return how late the heartbeat is at worst while nothing else runs, in seconds: the jitter of the machine."""
    heartbeat = Heartbeat()
    begin = perf_counter()
    beating = asyncio.create_task(heartbeat.run())
    await asyncio.sleep(100 * HEARTBEAT_SECONDS)
    beating.cancel()
    return heartbeat.worst_delay(begin, perf_counter())


def picture(runs: list[Run]) -> str:
    """Draw one checkpoint of each run on a common time axis that begins with its call."""
    chosen = [run.checkpoints[min(1, len(run.checkpoints) - 1)] for run in runs]
    strips = [
        Strip(
            f"{run.way.__doc__}: training waits {checkpoint.to_captured * 1e3:.0f} ms",
            [Bar(bar.lane, bar.begin - checkpoint.began, bar.end - checkpoint.began) for bar in run.bars],
            [(due - checkpoint.began, late) for due, late in run.heartbeat.delays],
        )
        for run, checkpoint in zip(runs, chosen, strict=True)
    ]
    length = max(checkpoint.to_committed for checkpoint in chosen)
    title = f"A checkpoint of {chosen[0].nbytes / 1e6:.0f} MB, from its call; dots: how late a heartbeat of 100 Hz was"
    return draw(strips, LANES, begin=-0.15 * length, end=1.1 * length, title=title)


async def reload_and_compare(path: Path, run: Run) -> bool:
    """Load the last checkpoint into a fresh trainer, and look for any difference to the one that never stopped."""
    fresh = Trainer(run.trainer.digits, seed=1)
    fresh.load_state_dict(await aiostage.load(path))
    at = fresh.steps
    score = await asyncio.to_thread(evaluate, fresh.model.state_dict(), fresh.digits)
    losses = [await asyncio.to_thread(fresh.step) for _ in range(at, STEPS)]
    final = await asyncio.to_thread(evaluate, run.trainer.average.module.state_dict(), fresh.digits)
    print(f"\nThe checkpoint of step {at}, loaded into a fresh trainer:")
    checks = {
        f"the same held-out loss, {score.loss!r}": score.loss == run.scores[at].loss,
        f"the same held-out accuracy, {score.accuracy:.2%}": score.accuracy == run.scores[at].accuracy,
        f"the same {len(losses)} losses when training goes on": losses == run.losses[at:],
        f"the trained average reaches {final.accuracy:.2%} (asked for: {TARGET_ACCURACY:.0%})": (
            final.accuracy >= TARGET_ACCURACY
        ),
    }
    for what, holds in checks.items():
        print(f"  {'yes' if holds else 'NO '}  {what}")
    return all(checks.values())


def show_checkpoints(run: Run) -> None:
    print(f"{'step':>4} {'size':>9} {'captured after':>15} {'committed after':>16} {'worst heartbeat delay':>22}")
    for row in run.checkpoints:
        print(
            f"{row.steps:>4} {row.nbytes / 1e6:>6.0f} MB {row.to_captured * 1e3:>12.0f} ms"
            f" {row.to_committed * 1e3:>13.0f} ms {row.worst_delay * 1e3:>19.1f} ms"
        )


def show_ways(runs: list[Run]) -> None:
    print(f"{'medians of the checkpoints':<41} {'training waits':>15} {'worst heartbeat delay':>22}")
    for run in runs:
        waits = median(row.to_captured for row in run.checkpoints)
        delay = median(row.worst_delay for row in run.checkpoints)
        print(f"{run.way.__doc__:<41} {waits * 1e3:>12.0f} ms {delay * 1e3:>19.1f} ms")
    print("\nTraining waits until its state is captured. The heartbeat wants to run every 10 ms, and everything else")
    print(
        "that runs on the event loop waits as long as it does. aiostage writes with checksums and waits for the disk;"
    )
    print("torch.save() does neither.")


def show_whether_to_believe(alone: float, undisturbed: Run) -> None:
    """Say whether the machine was quiet enough for these figures."""
    training = median(row.worst_delay for row in undisturbed.checkpoints)
    print(f"It waits {alone * 1e3:.1f} ms with nothing beside it, and {training * 1e3:.1f} ms with training alone.")
    if alone > BUSY_ALONE_SECONDS or training > BUSY_TRAINING_SECONDS:
        print("That is too much: this machine is too busy to judge. Run it again when nothing else runs.")


if __name__ == "__main__":
    sys.exit(0 if asyncio.run(main()) else 1)
