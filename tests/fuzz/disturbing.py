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
from tests.fuzz.classes import Drifting, Marked, OwnCopy, Plain, Record, Slotted, Stateful, Wrapper
from tests.fuzz.describing import Description, describe, difference

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


WHERE = ("anywhere", "anywhere", "anywhere", "ahead", "ahead", "outside", "back", "back", "after")
"""What other coroutines change: whatever it is, a part that the walk has not met yet, what is not in the tree, what
they put back in the same step, or the source of a copy that is captured."""


class Scene:
    """A tree, and all that may be changed in it.

    Args:
        choices: What is random about both.

    Attributes:
        filling: What the walk meets first, which is never changed.
    """

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.serial = 1000
        leaves = choices.pick([6, 30, 120])
        self.base = torch.arange(64.0)
        self.tensors: list[torch.Tensor] = [torch.full((3,), float(number)) for number in range(leaves)]
        self.tensors += [self.base[8:20], self.base[4:12], self.base, torch.nn.Parameter(torch.zeros(4))]
        self.wrapper = Wrapper(torch.zeros(3), torch.ones(3))
        self.sparse = torch.eye(3).to_sparse()
        self.marked = torch.zeros(3).as_subclass(Marked)
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
            [self.wrapper, self.sparse, self.marked],
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
        self.filling = [0] * 512 * choices.pick([0, 1, 4, 12])
        self.tree: dict[str, Any] = {"filling": self.filling}
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
            # One that does not fit is refused, as by copy.deepcopy.
            tensor.grad = None

        def set_memory() -> None:
            with torch.no_grad():
                tensor.set_(torch.full((4,), float(serial)))  # type: ignore[call-overload]
            tensor.grad = None

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

        def part() -> None:
            if serial % 2:
                self.wrapper.left = torch.full((3,), float(serial))
            else:
                self.wrapper.right.fill_(serial)

        def requires_gradient() -> None:
            if tensor.is_leaf and not tensor._is_view():
                tensor.requires_grad_(not tensor.requires_grad)

        def sparse_data() -> None:
            self.sparse.data = torch.eye(3).mul(serial).to_sparse()

        return [
            part,
            requires_gradient,
            sparse_data,
            lambda: vars(self.marked).update({f"note{serial}": serial}),
            lambda: vars(self.ordered).update({f"note{serial}": serial}),
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

    def reversible(self) -> list[Callable[[], object]]:
        """Return changes that are put back."""
        self.serial += 1
        serial = self.serial
        tensor, holder = self.choices.pick(self.tensors), self.choices.pick(self.holders)

        def item(container: Any, key: Any) -> None:
            before = container[key]
            container[key] = serial % 256
            container[key] = before

        def attribute(owner: Any, name: str) -> None:
            before = getattr(owner, name)
            setattr(owner, name, serial)
            setattr(owner, name, before)

        def first_attribute(owner: Any) -> None:
            vars(owner)["more"] = serial
            del vars(owner)["more"]

        def data() -> None:
            before = tensor.data
            tensor.data = torch.full((2,), float(serial))
            tensor.data = before

        def gradient() -> None:
            before = tensor.grad
            tensor.grad = torch.ones_like(tensor.detach()) if before is None else None
            tensor.grad = before

        def requires_gradient() -> None:
            if tensor.is_leaf:
                before = tensor.requires_grad
                tensor.requires_grad_(not before).requires_grad_(before)

        def end(container: Any) -> None:
            container.append(serial)
            container.pop()

        def member() -> None:
            self.set.add(serial)
            self.set.discard(serial)

        def key() -> None:
            self.counters["other"] = serial
            del self.counters["other"]

        def order() -> None:
            before = list(self.ordered)
            self.ordered.move_to_end(before[0])
            for name in before:
                self.ordered.move_to_end(name)

        def state() -> None:
            before = self.random.getstate()
            self.random.random()
            self.random.setstate(before)

        return [
            lambda: item(self.counters, "step"),
            lambda: item(self.list, 0),
            lambda: item(self.ordered, "b"),
            lambda: item(self.array, 0),
            lambda: item(self.bytes, 0),
            lambda: item(self.objects, 0),
            lambda: item(self.tree, "filling"),
            lambda: attribute(holder, "value"),
            lambda: first_attribute(tensor if isinstance(holder, Slotted) else holder),
            lambda: end(self.list),
            lambda: end(self.deque),
            data,
            gradient,
            requires_gradient,
            member,
            key,
            order,
            state,
        ]

    def change_and_put_back(self) -> None:
        """Change some things in one step, and put them back in it."""
        for _ in range(1 + self.choices.below(3)):
            self.choices.pick(self.reversible())()

    def describe(self, tree: dict[str, Any]) -> Description:
        """Describe this tree or a copy of it."""
        rest = {key: value for key, value in tree.items() if key != "filling"}
        return describe([tree["filling"] == self.filling, rest], bare=True)

    def change(self) -> None:
        """Change some things in one step, of which a copy has all or none."""
        # Few, as what gives one of them away hides that another was not seen.
        for _ in range(2 + self.choices.chance(4)):
            self.choices.pick(self.changes())()


async def check_disturbed(stager: CheckpointStager, choices: Choices) -> str:
    """Stage a tree that another task changes; return what was changed, and whether it was captured.

    Raises:
        Disturbed: If the copy is the tree of no moment.
    """
    scene = Scene(choices)
    for _ in range(choices.below(3)):
        await stager.stage(scene.tree)
        if choices.below(2):
            scene.change()
    versions = [scene.describe(scene.tree)]
    where = choices.pick(WHERE)
    change = {"outside": Scene(choices).change, "back": scene.change_and_put_back}.get(where, scene.change)
    within = choices.pick([2, 3, 5] if where == "ahead" else [3, 12, 60, 250])
    turns = sorted(choices.below(within) for _ in range(1 + choices.below(2)))
    over = False

    async def disturb() -> None:
        for turn in range(turns[-1] + 1):
            for _ in range(turns.count(turn)):
                if over:
                    return
                change()
                versions.append(scene.describe(scene.tree))
            await asyncio.sleep(0)

    # The call, and the first step, are before the first change.
    staging = asyncio.ensure_future(stager.stage(scene.tree)) if choices.below(2) else None
    task = asyncio.ensure_future(disturb()) if where != "after" else None
    try:
        staged = await (staging if staging is not None else stager.stage(scene.tree))
    except TornSnapshotError:
        if where in ("outside", "back", "after"):
            raise Disturbed(f"{where}: torn, and there was no change") from None
        return f"{where}: torn"
    finally:
        over = True
        if task is not None:
            await task
    # Changes from now on must not show.
    scene.change()
    found = scene.describe(staged)
    versions = [*versions, scene.describe(scene.tree)]
    misses = [difference(version, found) for version in versions[:-1]]
    if None not in misses:
        raise Disturbed(
            f"{where}: {len(versions) - 1} moments, changes in turns {turns}; none is it: {misses}, and of "
            f"what came after: {difference(versions[-1], found)}"
        )
    if where == "after":
        return f"{where}: captured"
    if len(versions) == 2:
        return f"{where}: captured before any change"
    moment = "first" if misses[0] is None else "last" if misses[-1] is None else "middle"
    return f"{where}: captured beside changes, as at the {moment} moment"


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
    """Disturb ``n`` stagings; print the results. Return how many were wrong."""
    warnings.simplefilter("ignore")
    results: Counter[str] = Counter()
    failures = asyncio.run(check_seeds(make_stager, n, seed - seed % 10, results))
    for failure in failures:
        print(failure, file=sys.stderr)
    for what, count in sorted(results.items()):
        print(f"{count:6} disturbed stagings: {what}")
    print(f"{len(failures):6} disturbed stagings failed")
    return len(failures)
