"""Trees that other coroutines change while they are staged: the copy is the tree of one moment, or torn."""

from __future__ import annotations

import asyncio
import math
import random
import sys
import warnings
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy
import torch

from aiostage import AsyncStager, StagingOptions, TornSnapshotError
from aiostage.abc import CheckpointStager
from tests.fuzz.choices import Choices
from tests.fuzz.classes import Drifting, OwnCopy, Plain, Record, Slotted, Stateful
from tests.fuzz.describing import describe, difference

__all__ = ["PROFILES", "Disturbed", "check_disturbed", "main"]

PROFILES = (
    StagingOptions(max_loop_hold=1e-9),
    StagingOptions(max_loop_hold=1e-5),
    StagingOptions(),
    StagingOptions(max_loop_hold=1e-9, use_async_staging=False),
    StagingOptions(max_loop_hold=math.inf),
)


class Disturbed(AssertionError):
    """A copy that mixes two moments."""


class Scene:
    """A tree, and all that may be changed in it.

    Args:
        choices: What is random about both.
    """

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.serial = 1000
        leaves = choices.pick([6, 30, 120])
        self.base = torch.arange(64.0)
        self.tensors: list[torch.Tensor] = [torch.full((3,), float(number)) for number in range(leaves)]
        self.tensors += [self.base[8:20], self.base[4:12], self.base, torch.nn.Parameter(torch.zeros(4))]
        self.array = numpy.zeros(5)
        self.objects = numpy.empty(1, dtype=object)
        self.objects[0] = [0]
        self.bytes = bytearray(4)
        self.random = random.Random(1)
        self.holders = [Plain(0), Record(0), Slotted(0), Stateful(0), OwnCopy(0), Drifting(0), OwnCopy([0])]
        self.counters = {"step": 0, "epoch": 0}
        self.list: list[Any] = [1, 2, 3]
        self.deque = deque([1, 2, 3])
        self.ordered = OrderedDict(a=1, b=2)
        self.set = {1, 2}
        parts: list[Any] = [
            self.counters,
            {f"w{number}": tensor for number, tensor in enumerate(self.tensors)},
            self.array,
            self.objects,
            self.bytes,
            self.random,
            self.holders,
            self.list,
            self.deque,
            self.ordered,
            self.set,
        ]
        # In any order, and some in a list of their own, so that they are met at any time.
        self.tree: dict[str, Any] = {}
        while parts:
            part = parts.pop(choices.below(len(parts)))
            self.tree[f"part{len(self.tree)}"] = [part, torch.ones(1)] if choices.below(2) else part

    def changes(self) -> list[Callable[[], object]]:
        self.serial += 1
        serial, pick = self.serial, self.choices.pick
        tensor, holder = pick(self.tensors), pick(self.holders)

        def write() -> None:
            with torch.no_grad():
                tensor.fill_(serial)

        def replace_data() -> None:
            tensor.data = torch.full(tuple(tensor.shape), float(serial))

        def resize_data() -> None:
            tensor.data = torch.full((1 + serial % 5,), float(serial))

        def set_memory() -> None:
            with torch.no_grad():
                tensor.set_(torch.full((4,), float(serial)))  # type: ignore[call-overload]

        def swap() -> None:
            other = pick(self.tensors)
            if type(other) is type(tensor) and other is not tensor and tensor.grad is other.grad is None:
                # Refused, with nothing changed, where views refer to one of them.
                with suppress(RuntimeError):
                    torch.utils.swap_tensors(tensor, other)

        def attribute() -> None:
            tensor.note = serial  # type: ignore[attr-defined]

        def gradient() -> None:
            tensor.grad = torch.full_like(tensor.detach(), float(serial))

        def array_write() -> None:
            self.array[serial % 5] = serial

        def bytes_write() -> None:
            self.bytes[serial % 4] = serial % 256

        def held() -> None:
            if type(holder) is OwnCopy and isinstance(holder.value, list):
                holder.value.append(serial)
            else:
                holder.value = serial  # type: ignore[attr-defined]

        def more() -> None:
            # Those that copy themselves do not copy what they do not know.
            if not isinstance(holder, (Slotted, Stateful, OwnCopy)):
                vars(holder)[f"more{serial}"] = serial

        def reorder() -> None:
            self.ordered.move_to_end("a")
            self.ordered["b"] = serial

        return [
            write,
            replace_data,
            resize_data,
            set_memory,
            swap,
            attribute,
            gradient,
            array_write,
            bytes_write,
            held,
            more,
            reorder,
            lambda: self.counters.update(step=serial),
            lambda: self.counters.update({f"new{serial}": serial}),
            lambda: self.random.random(),
            lambda: self.list.append(serial),
            lambda: self.list.__setitem__(0, serial),
            lambda: self.list.pop() if len(self.list) > 1 else None,
            lambda: self.deque.append(serial),
            lambda: self.set.add(serial),
            lambda: self.objects[0].append(serial),
            lambda: self.objects.__setitem__(0, [serial]),
            lambda: self.tree.update({f"added{serial}": serial}),
        ]

    def change(self) -> None:
        """Change some things in one step, of which a copy has all or none."""
        # Few, as what gives one of them away hides that another was not seen.
        for _ in range(2 + self.choices.chance(4)):
            self.choices.pick(self.changes())()


async def check_disturbed(stager: CheckpointStager, choices: Choices) -> str:
    """Stage a tree that another task changes; return whether it was captured, and of which moment.

    Raises:
        Disturbed: If the copy is the tree of no moment.
    """
    scene = Scene(choices)
    for _ in range(choices.below(3)):
        await stager.stage(scene.tree)
        if choices.below(2):
            scene.change()
    versions = [describe(scene.tree, bare=True)]
    turns = sorted(choices.below(choices.pick([3, 12, 60, 250])) for _ in range(1 + choices.below(2)))
    over = False

    async def disturb() -> None:
        for turn in range(turns[-1] + 1):
            for _ in range(turns.count(turn)):
                if over:
                    return
                scene.change()
                versions.append(describe(scene.tree, bare=True))
            await asyncio.sleep(0)

    # The call, and the first step, are before the first change.
    staging = asyncio.ensure_future(stager.stage(scene.tree)) if choices.below(2) else None
    task = asyncio.ensure_future(disturb())
    try:
        staged = await (staging if staging is not None else stager.stage(scene.tree))
    except TornSnapshotError:
        return "torn"
    finally:
        over = True
        await task
    found = describe(staged, bare=True)
    misses = [difference(version, found) for version in versions]
    if None not in misses:
        raise Disturbed(f"{len(versions)} moments, changes in turns {turns}; none is it: {misses}")
    if len(versions) == 1:
        return "captured before any change"
    return f"captured at its {'first' if misses[0] is None else 'last' if misses[-1] is None else 'middle'} moment"


async def check_seeds(make: Callable[[int], CheckpointStager], n: int, seed: int, results: Counter[str]) -> list[str]:
    """Disturb ``n`` stagings, some at a time with one stager; return what was wrong."""
    failures = []
    for start in range(seed, seed + n, 10):
        async with make(start) as stager:
            for number in range(start, min(start + 10, seed + n)):
                try:
                    results[await check_disturbed(stager, Choices(number))] += 1
                except Exception as error:
                    failures.append(f"seed {number}: {type(error).__name__}: {str(error)[:500]}")
    return failures


def make_stager(seed: int) -> CheckpointStager:
    """Return the stager that a block of ten seeds has."""
    return AsyncStager(PROFILES[seed // 10 % len(PROFILES)])


def main(n: int, seed: int) -> int:
    """Disturb ``n`` stagings; print what became of them. Return how many were wrong."""
    warnings.simplefilter("ignore")
    results: Counter[str] = Counter()
    failures = asyncio.run(check_seeds(make_stager, n, seed - seed % 10, results))
    for failure in failures:
        print(failure, file=sys.stderr)
    for what, count in sorted(results.items()):
        print(f"{count:6} disturbed stagings: {what}")
    print(f"{len(failures):6} disturbed stagings failed")
    return len(failures)
