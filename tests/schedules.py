"""Random schedules of a trainer on devices beside aiostage, with a model of what each tensor has to hold.

The trainer keeps the rules of PyTorch: it orders its own streams when it changes from one to another, and leaves a tree
alone while it is staged, unless it orders its next step behind the copies. So what each tensor holds is what was
written to it last in the order of the program, whatever the device does when.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import aiostage
from aiostage import AsyncStager, CheckpointStager, StagingOptions

__all__ = ["CONTROLS", "SCHEDULES", "KeepsNoSource", "Machine", "Outcome", "WaitsForNothing", "run_schedules", "source"]

SCHEDULES = int(os.environ.get("AIOSTAGE_SCHEDULES", "500"))
"""How many a run tries."""

SIZES = (64, 3000, 20_000, 70_000)
TENSORS = 5
STEPS = 14
SAVED = 999.0

Tree = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Machine:
    """The devices of one kind.

    Attributes:
        names: Of the devices.
        busy: Keeps the current stream of a device busy for some microseconds.
        drain: Waits until everything has been done.
        seed: Takes the seed of each schedule, where the device chooses how late things are.
    """

    names: Sequence[str]
    busy: Callable[[str, int], object]
    drain: Callable[[], object]
    seed: Callable[[int], object] = id


@dataclass
class Outcome:
    """What a schedule has come to.

    Attributes:
        stagings: How many staged trees were looked at.
        wrong: What did not hold what it had to, in words.
    """

    stagings: int = 0
    wrong: list[str] = field(default_factory=list)


class _Schedule:
    def __init__(self, machine: Machine, seed: int, stager: CheckpointStager, checkpoint: Path | None) -> None:
        self.machine = machine
        self.random = random.Random(seed)
        self.stager = stager
        self.checkpoint = checkpoint
        self.outcome = Outcome()
        self.value = 0.0
        self.streams = {name: torch.Stream(name) for name in machine.names}
        self.live: Tree = {}
        self.model: dict[str, float] = {}
        self.kept: list[tuple[Tree, dict[str, float], str]] = []
        for number in range(TENSORS):
            self.allocate(f"t{number}")

    # What the trainer does without waiting

    def allocate(self, name: str) -> None:
        device = self.random.choice(self.machine.names)
        # The size belongs to the name, so that a checkpoint of the tree fits later trees.
        size = SIZES[int(name[1:]) % len(SIZES)]
        with self.streams[device]:
            self.live[name] = torch.empty(size, device=device)
        self.write(name)

    def write(self, name: str) -> None:
        tensor = self.live[name]
        self.value += 1
        with self.streams[str(tensor.device)]:
            if self.random.random() < 0.5:
                self.machine.busy(str(tensor.device), self.random.randrange(2000))
            tensor.fill_(self.value)
        self.model[name] = self.value

    def write_some(self) -> None:
        for name in self.random.sample(sorted(self.live), self.random.randrange(1, TENSORS)):
            self.write(name)

    def replace(self) -> None:
        """Drop a tensor. The next one of its size gets its memory at once."""
        name = self.random.choice(sorted(self.live))
        self.let_go(name)
        self.allocate(name)

    def let_go(self, name: str) -> None:
        """Drop a tensor, and tell the allocator of the stream that was the last to use it."""
        tensor = self.live.pop(name)
        tensor.record_stream(self.streams[str(tensor.device)])

    def change_stream(self) -> None:
        device = self.random.choice(self.machine.names)
        stream = torch.Stream(device)
        stream.wait_stream(self.streams[device])
        self.streams[device] = stream

    def call(self, function: Callable[[], Any]) -> Any:
        """Call on the trainer's streams, to be awaited where others are current."""
        before = {name: torch.accelerator.current_stream(torch.device(name)) for name in self.machine.names}
        device = torch.accelerator.current_device_index()
        for stream in self.streams.values():
            torch.accelerator.set_stream(stream)
        try:
            return function()
        finally:
            for stream in before.values():
                torch.accelerator.set_stream(stream)
            torch.accelerator.set_device_index(device)

    # What it does with aiostage

    async def stage(self) -> None:
        tree, expected = dict(self.live), dict(self.model)
        self.keep(await self.call(lambda: self.stager.stage(tree)), expected, "stage")

    async def stage_and_forget(self) -> None:
        """Drop the source while it is copied, and use its memory for others."""
        expected = dict(self.model)
        task = asyncio.ensure_future(self.call(lambda: self.stager.stage(dict(self.live))))
        await asyncio.sleep(0)
        names = sorted(self.live)
        for name in names:
            self.let_go(name)
        for _ in range(self.random.randrange(3)):
            await asyncio.sleep(0)
        for name in names:
            self.allocate(name)
        self.keep(await task, expected, "stage_and_forget")

    async def snapshot(self) -> None:
        """Go on at once, behind the copies on the device."""
        assert isinstance(self.stager, AsyncStager)
        expected = dict(self.model)
        async with self.call(lambda: self.stager.snapshot(dict(self.live))) as snapshot:  # type: ignore[attr-defined]
            self.call(snapshot.order_before)
            for name in sorted(self.live):
                self.write(name)
            self.keep(await snapshot.result(), expected, "snapshot")

    async def cancel(self) -> None:
        task = asyncio.ensure_future(self.call(lambda: self.stager.stage(dict(self.live))))
        for _ in range(self.random.randrange(12)):
            await asyncio.sleep(0)
        if self.random.random() < 0.5:
            await asyncio.sleep(self.random.random() * 2e-3)
        task.cancel()
        await asyncio.wait([task])
        self.write_some()

    async def restore(self) -> None:
        if self.kept:
            staged, values, _ = self.random.choice(self.kept)
            self.write_some()
            live = self.live
            await self.call(lambda: self.stager.restore(staged, into=live))  # type: ignore[attr-defined]
            self.model = dict(values)

    async def load(self) -> None:
        self.write_some()
        live, source, in_place = self.live, self.checkpoint, self.random.random() < 0.5
        await self.call(lambda: aiostage.load(source, into=live, in_place=in_place))
        self.model = {name: SAVED + int(name[1:]) for name in live}

    def keep(self, staged: Tree, expected: dict[str, float], how: str) -> None:
        self.outcome.stagings += 1
        self.check(staged, expected, how)
        self.kept.append((staged, expected, how))
        if len(self.kept) > 3:
            del self.kept[self.random.randrange(len(self.kept))]

    def check(self, tree: Tree, expected: dict[str, float], how: str) -> None:
        for name, value in expected.items():
            found = tree[name].cpu()
            if not bool((found == value).all()):
                self.outcome.wrong.append(f"{how}: {name} of {len(found)} is to be {value}, has {found.unique()[:4]}")

    async def run(self, steps: Sequence[Callable[[], Coroutine[Any, Any, None] | None]]) -> Outcome:
        for _ in range(STEPS):
            doing = self.random.choice(steps)()
            if doing is not None:
                await doing
        # What was staged before is never written to again.
        for staged, expected, how in self.kept:
            self.check(staged, expected, f"{how}, at the end")
        self.machine.drain()
        self.check(self.live, self.model, "the live tree")
        for name in sorted(self.live):
            self.let_go(name)
        return self.outcome


async def run_schedule(
    machine: Machine, seed: int, checkpoint: Path, control: CheckpointStager | None = None
) -> Outcome:
    """Run one schedule.

    Args:
        machine: Where.
        seed: Chooses what is done.
        checkpoint: From :func:`source`.
        control: Stages instead of aiostage; then nothing else is tried.
    """
    options = random.Random(seed).choice(
        [
            StagingOptions(),
            StagingOptions(max_bytes_in_flight=100_000),
            StagingOptions(use_non_blocking_copy=False),
            StagingOptions(use_shared_memory=True),
        ]
    )
    async with control if control is not None else AsyncStager(options) as stager:
        schedule = _Schedule(machine, seed, stager, checkpoint)
        alone = [
            schedule.write_some,
            schedule.replace,
            schedule.change_stream,
            schedule.stage,
            schedule.stage_and_forget,
        ]
        others = [schedule.snapshot, schedule.cancel, schedule.restore, schedule.load]
        return await schedule.run(alone if control is not None else [*alone, *others])


def run_schedules(
    machine: Machine, seeds: range, checkpoint: Path, control: type[CheckpointStager] | None = None
) -> Outcome:
    """Run schedules one after another.

    Args:
        machine: Where.
        seeds: One for each.
        checkpoint: From :func:`source`.
        control: Stages instead of aiostage; then nothing else is tried.
    """

    async def main() -> Outcome:
        total = Outcome()
        for seed in seeds:
            machine.seed(seed)
            outcome = await run_schedule(machine, seed, checkpoint, control() if control is not None else None)
            total.stagings += outcome.stagings
            total.wrong += [f"schedule {seed}: {wrong}" for wrong in outcome.wrong]
        return total

    # Tensors of this size PyTorch compares with all cores, whose threads spin between two of them: 60 % of the time.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return asyncio.run(main())
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that schedules load."""
    path = tmp_path_factory.mktemp("schedules") / "checkpoint"
    tree = {f"t{n}": torch.full((SIZES[n % len(SIZES)],), SAVED + n) for n in range(TENSORS)}
    asyncio.run(aiostage.save(tree, path))
    return path


class _Control(CheckpointStager):
    """Copies on a stream of its own, polls, and does one thing wrong."""

    waits = True
    keeps = True

    def stage(self, state_dict: Any) -> Any:
        pairs, events = {}, []
        for name, tensor in state_dict.items():
            stream = torch.Stream(tensor.device)
            if self.waits:
                stream.wait_stream(torch.accelerator.current_stream(tensor.device))
            with stream:
                # CUDA's copies into pageable memory are over when the call returns.
                host = torch.empty(tensor.shape, pin_memory=True)
                host.copy_(tensor, non_blocking=True)
                event = torch.Event(tensor.device)
                event.record(stream)
            events.append(event)
            pairs[name] = host
        return self._finish(pairs, events, state_dict if self.keeps else None)

    async def _finish(self, pairs: Tree, events: Sequence[Any], source: object) -> Tree:
        for event in events:
            await aiostage.wait_event(event)
        return pairs

    async def aclose(self) -> None:
        pass


class WaitsForNothing(_Control):
    """Does not wait for what the caller has enqueued."""

    waits = False


class KeepsNoSource(_Control):
    """Drops the source while it is copied."""

    keeps = False


CONTROLS: list[type[CheckpointStager]] = [WaitsForNothing, KeepsNoSource]
"""Wrong stagers, which have to be found out."""
