"""The tests that every stager has to pass, to run on a stager of your own.

Inherit from the suite, implement ``make_stager``, and mark the class for pytest-asyncio or anyio::

    @pytest.mark.asyncio
    class TestMyStager(StagerSuite):
        def make_stager(self):
            return MyStager()

Nothing here imports pytest. For readable failures add this to a conftest, before anything imports
``aiostage.testing``::

    pytest.register_assert_rewrite("aiostage.testing.stager_suite", "aiostage.testing.storage_suite")
"""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import time
import unittest
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict, defaultdict, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import anyio
import torch
from anyio.lowlevel import checkpoint

from aiostage.abc import CheckpointStager
from aiostage.errors import StagerClosedError, TornSnapshotError
from aiostage.testing.cancelling import at_every_await
from aiostage.testing.probes import LeakProbe

__all__ = ["StagerSuite", "check_holds", "require_asyncio"]


_SOON = 2.0
"""Seconds in which a thread drops its last references after its result was awaited. A guess, for a busy machine."""

_POOLS = ("asyncio_", "AnyIO worker", "Trio thread")
"""Names of the threads that the event loops themselves keep."""


class _Pair(NamedTuple):
    left: Any
    right: Any


@dataclass
class _Record:
    value: Any


class _OwnCopy:
    """Copies itself by code of its own, so a stager cannot detect whether it has changed since."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, object]) -> object:
        return _OwnCopy(copy.deepcopy(self.value, memo))


class _Refuses:
    """Cannot be copied."""

    def __deepcopy__(self, memo: dict[int, object]) -> object:
        raise ZeroDivisionError("this object cannot be copied")


def _tree(value: float = 1.0, leaves: int = 20) -> dict[str, Any]:
    return {
        "step": int(value),
        "weights": {f"w{number}": torch.full((3, 4), value + number, device="cpu") for number in range(leaves)},
        "list": [torch.arange(5, device="cpu"), (torch.ones(2, dtype=torch.bfloat16, device="cpu"), None)],
    }


def _leaves() -> dict[str, torch.Tensor]:
    """Return tensors of all usual dtypes, shapes and sizes. None has zero as its last value."""
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.complex64)
    leaves = {str(dtype): torch.arange(1, 8, device="cpu").to(dtype) for dtype in dtypes}
    leaves |= {f"scalar {dtype}": torch.tensor(3, device="cpu").to(dtype) for dtype in dtypes}
    # float32 cannot represent these.
    leaves["precise"] = torch.tensor([1.0 + 2.0**-40, 1e300], dtype=torch.float64, device="cpu")
    leaves["flags"] = torch.tensor([False, True], device="cpu")
    leaves["flag"] = torch.tensor(True, device="cpu")
    leaves["empty"] = torch.empty(0, 3, device="cpu")
    for kibibytes in (4, 1024, 1025, 5000):
        leaves[f"{kibibytes} KiB"] = torch.arange(1, kibibytes * 256 + 2, dtype=torch.float32, device="cpu")
    leaves["strided"] = torch.arange(1.0, 13.0, device="cpu")[1::3]
    leaves["transposed"] = torch.arange(1.0, 7.0, device="cpu").reshape(2, 3).t()
    leaves["channels last"] = (
        torch.arange(1.0, 17.0, device="cpu").reshape(1, 4, 2, 2).to(memory_format=torch.channels_last)
    )
    return leaves


async def longest_hold(run: Callable[[], Awaitable[object]]) -> float:
    """Run something, and return the longest time in seconds for which another task did not get its turn.

    On Linux, the time for which the thread waited for a core does not count. A busy machine causes such waits.
    """
    longest, done = 0.0, False
    try:
        waits = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
    except OSError:
        waits = -1

    def waited() -> int:
        # The second number is the time spent waiting for a core, in nanoseconds.
        return int(os.pread(waits, 100, 0).split()[1]) if waits >= 0 else 0

    def now() -> float:
        while True:
            before, clock = waited(), time.perf_counter()
            # If the thread waited for a core between the two readings, their difference would hide a part of a hold.
            if waited() == before:
                return clock - before * 1e-9

    async def count() -> None:
        nonlocal longest
        last = now()
        while not done:
            await checkpoint()
            this = now()
            longest, last = max(longest, this - last), this

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(count)
            await checkpoint()
            await run()
            done = True
    finally:
        if waits >= 0:
            os.close(waits)
    return longest


async def check_holds(run: Callable[[], Awaitable[object]], limit: float) -> None:
    """Check that something can run without keeping other tasks from their turn for ``limit`` seconds.

    It gets ten attempts. A busy machine stops a process now and then, but code that holds the loop does so each time.
    """
    held = []
    for _ in range(10):
        held.append(await longest_hold(run))
        if held[-1] < limit:
            return
    raise AssertionError(f"the event loop was kept from other tasks for {min(held):.3f} s, each time")


def _values(tree: dict[str, Any]) -> list[float]:
    return [float(tensor.flatten()[0]) for tensor in tree["weights"].values()]


def require_asyncio() -> None:
    """Skip the calling test where cancellations cannot be thrown in from outside."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise unittest.SkipTest("cancelling at every await needs asyncio or uvloop") from None


class StagerSuite(ABC):
    """What a :class:`~aiostage.CheckpointStager` promises, as tests.

    Attributes:
        keeps_results: Whether a result keeps its values when the next one is made. PyTorch's stagers do not.
        keeps_parameters: Whether an ``nn.Parameter`` stays one. PyTorch's stagers make plain tensors of them.
        one_moment: Whether a copy is the tree at one moment, or TornSnapshotError is raised, while other tasks change
            the tree. Stagers that copy in a thread and compare nothing afterwards, as PyTorch's do, mix moments.
        longest_hold: How long a staging may keep the event loop from its other tasks, in seconds. The default is a
            guess for a busy machine.
    """

    keeps_results = True
    keeps_parameters = True
    one_moment = True
    longest_hold = 0.04

    @abstractmethod
    def make_stager(self) -> CheckpointStager:
        """Return a new stager. Called inside a coroutine, once or more for each test."""

    async def test_returns_the_same_tree(self) -> None:
        source = _tree()
        async with self.make_stager() as stager:
            staged = await stager.stage(source)
        assert type(staged) is dict
        assert list(staged) == list(source)
        assert staged["step"] == source["step"]
        assert list(staged["weights"]) == list(source["weights"])
        for name, tensor in source["weights"].items():
            assert torch.equal(staged["weights"][name], tensor), name
            assert staged["weights"][name].device.type == "cpu"
        assert torch.equal(staged["list"][0], source["list"][0])
        assert type(staged["list"][1]) is tuple
        assert staged["list"][1][0].dtype is torch.bfloat16
        assert staged["list"][1][1] is None

    async def test_no_change_to_the_source_shows(self) -> None:
        source = _tree(1.0)
        before = _values(source)
        async with self.make_stager() as stager:
            staged = await stager.stage(source)
            for tensor in source["weights"].values():
                tensor.fill_(-1)
            source["list"][0].zero_()
            source["list"].append("more")
            source["step"] = 99
            assert _values(staged) == before
            assert staged["list"][0].tolist() == [0, 1, 2, 3, 4]
            assert len(staged["list"]) == 2
            assert staged["step"] == 1

    async def test_no_change_to_the_copy_shows(self) -> None:
        source = _tree(1.0)
        before = _values(source)
        async with self.make_stager() as stager:
            staged = await stager.stage(source)
            for tensor in staged["weights"].values():
                tensor.fill_(-1)
            staged["list"].clear()
            assert _values(source) == before
            assert len(source["list"]) == 2

    async def test_ties_stay_ties(self) -> None:
        shared = torch.arange(4.0, device="cpu")
        inside = [shared]
        async with self.make_stager() as stager:
            source: dict[str, Any] = {"a": shared, "b": shared, "c": inside, "d": inside}
            staged = await stager.stage(source)
            assert staged["a"] is staged["b"]
            assert staged["c"] is staged["d"]
            assert staged["c"][0] is staged["a"]

    async def test_shapes_and_strides(self) -> None:
        source = {
            "transposed": torch.arange(6.0, device="cpu").reshape(2, 3).t(),
            "empty": torch.empty(0, 3, device="cpu"),
            "scalar": torch.tensor(7, device="cpu"),
            "flags": torch.tensor([True, False], device="cpu"),
        }
        async with self.make_stager() as stager:
            staged = await stager.stage(source)
            for name, tensor in source.items():
                assert torch.equal(staged[name], tensor), name
                assert staged[name].dtype is tensor.dtype, name
                assert staged[name].stride() == tensor.stride(), name

    async def test_leaves_of_every_kind(self) -> None:
        source = _leaves()
        expected = {name: tensor.clone() for name, tensor in source.items()}
        async with self.make_stager() as stager:
            staged = await stager.stage(source)
            for tensor in source.values():
                tensor.zero_()
            assert list(staged) == list(expected)
            for name, tensor in expected.items():
                assert staged[name].dtype is tensor.dtype, name
                assert staged[name].shape == tensor.shape, name
                assert torch.equal(staged[name], tensor), f"{name}: another value, or a change to the source shows"
            for tensor in staged.values():
                tensor.fill_(1)
            assert not any(tensor.any() for tensor in source.values()), "a change to the copy shows"

    async def test_views_stay_views(self) -> None:
        base = torch.arange(1.0, 13.0, device="cpu")
        source = {"high": base[4:10], "low": base[2:6], "all": base, "apart": torch.ones(3, device="cpu")}
        expected = {name: tensor.tolist() for name, tensor in source.items()}
        async with self.make_stager() as stager:
            staged = await stager.stage(source)
            assert {name: tensor.tolist() for name, tensor in staged.items()} == expected
            # Copies share memory where their sources do.
            staged["high"][0] = -1
            assert float(staged["low"][2]) == -1
            assert float(staged["all"][4]) == -1
            assert staged["apart"].tolist() == [1, 1, 1]
            assert base.tolist() == expected["all"]

    async def test_containers_of_other_kinds(self) -> None:
        inside = torch.ones(1, device="cpu")
        source = _Pair(
            {
                "ordered": OrderedDict(b=inside, a=1),
                "default": defaultdict(list, a=inside),
                "deque": deque([inside, 2], maxlen=4),
                "record": _Record(inside),
                "tuple": (inside, (1, 2)),
                "set": {1, 2},
            },
            frozenset({1, 2}),
        )
        async with self.make_stager() as stager:
            staged = await stager.stage(source)
            assert type(staged) is _Pair
            assert staged.right == source.right
            for name, container in source.left.items():
                assert type(staged.left[name]) is type(container), name
                assert staged.left[name] is not container or name == "tuple", name
            assert list(staged.left["ordered"]) == ["b", "a"]
            assert staged.left["default"]["another"] == []
            assert staged.left["deque"].maxlen == 4
            assert staged.left["set"] == {1, 2}
            copied = staged.left["ordered"]["b"]
            assert copied is not inside
            assert torch.equal(copied, inside)
            others = (staged.left["default"]["a"], staged.left["deque"][0], staged.left["tuple"][0])
            assert all(other is copied for other in (*others, staged.left["record"].value))

    async def test_parameters(self) -> None:
        if not self.keeps_parameters:
            raise unittest.SkipTest("this stager makes plain tensors of parameters")
        source = {"p": torch.nn.Parameter(torch.ones(2, device="cpu"), requires_grad=False)}
        async with self.make_stager() as stager:
            staged = await stager.stage(source)
            assert type(staged["p"]) is torch.nn.Parameter
            assert not staged["p"].requires_grad

    async def test_results_keep_their_values(self) -> None:
        if not self.keeps_results:
            raise unittest.SkipTest("this stager overwrites its last result")
        async with self.make_stager() as stager:
            # More results than a stager would have buffers for.
            results = [await stager.stage(_tree(float(number))) for number in range(20)]
            for number, staged in enumerate(results):
                assert _values(staged) == _values(_tree(float(number)))

    async def test_results_are_let_go_of(self) -> None:
        if not self.keeps_results:
            raise unittest.SkipTest("this stager overwrites its last result")
        async with self.make_stager() as stager:
            alive: list[weakref.ref[torch.Tensor]] = []
            for number in range(6):
                staged = await stager.stage(_tree(float(number)))
                alive += map(weakref.ref, staged["weights"].values())
                del staged
            # A thread of the stager may still refer to the last result, until it gets a core.
            deadline = anyio.current_time() + _SOON
            while left := sum(reference() is not None for reference in alive):
                assert anyio.current_time() < deadline, (
                    f"{left} of {len(alive)} tensors without a reference are still there after {_SOON} s"
                )
                await anyio.sleep(0.01)
                gc.collect()

    async def test_results_outlive_the_stager(self) -> None:
        async with self.make_stager() as stager:
            staged = await stager.stage(_tree(3.0))
        del stager
        gc.collect()
        assert _values(staged) == _values(_tree(3.0))

    async def test_many_tasks_at_once(self) -> None:
        seen: dict[int, list[float]] = {}

        async def stage(stager: CheckpointStager, number: int) -> None:
            staged = await stager.stage(_tree(float(number)))
            # Read before anything else may run, as a stager that overwrites results may do it then.
            seen[number] = _values(staged)

        async with self.make_stager() as stager, anyio.create_task_group() as tasks:
            for number in range(8):
                tasks.start_soon(stage, stager, number)
        if self.keeps_results:
            assert seen == {number: _values(_tree(float(number))) for number in range(8)}
        assert len(seen) == 8

    async def test_the_event_loop_gets_its_turn(self) -> None:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await checkpoint()

        async with self.make_stager() as stager, anyio.create_task_group() as tasks:
            tasks.start_soon(count)
            await checkpoint()
            before = turns
            await stager.stage(_tree(leaves=2000))
            meanwhile = turns - before
            tasks.cancel_scope.cancel()
        assert meanwhile, "stage() did not let anything else run"

    async def test_the_event_loop_is_not_held(self) -> None:
        source = _tree(leaves=2000)
        source["large"] = torch.ones(1 << 21, device="cpu")
        async with self.make_stager() as stager:
            await check_holds(lambda: stager.stage(source), self.longest_hold)

    async def test_one_moment_or_an_error(self) -> None:
        if not self.one_moment:
            raise unittest.SkipTest("this stager mixes moments")
        async with self.make_stager() as stager:
            # From before the first step of a staging to after the last one of a slow stager. A guess: most stagers
            # record a tree in their first turns, so these are close together.
            for turns in (0, 1, 2, 3, 5, 8, 13, 21, 50, 120, 300):
                for leaves in (5, 300):
                    await self._check_moment(stager, turns, leaves)

    async def _check_moment(self, stager: CheckpointStager, turns: int, leaves: int) -> None:
        """Change everything at once while it is staged; all of the change is in the copy, or nothing."""
        source: dict[str, Any] = {"first": 0, "own": _OwnCopy(0)}
        source["array"] = torch.zeros(3, device="cpu").numpy().copy()
        source |= {f"w{number}": torch.zeros(3, device="cpu") for number in range(leaves)}
        source |= {"list": [0], "last": 0, "own too": _OwnCopy(0)}
        staged: list[dict[str, Any]] = []

        async def stage() -> None:
            with suppress(TornSnapshotError):
                staged.append(await stager.stage(source))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stage)
            for _ in range(turns):
                await checkpoint()
            for name, value in source.items():
                if isinstance(value, torch.Tensor):
                    value.fill_(1)
                elif isinstance(value, _OwnCopy):
                    value.value = 1
                elif isinstance(value, int):
                    source[name] = 1
                else:
                    value[0] = 1
        for tree in staged:
            found = {
                name: float(
                    value.value if isinstance(value, _OwnCopy) else value if isinstance(value, int) else value[0]
                )
                for name, value in tree.items()
            }
            old = [name for name, value in found.items() if value == 0]
            assert len(old) in (0, len(found)), f"{old[:5]} are of before a change that the rest of the copy has"

    async def test_an_error_is_the_callers_and_changes_nothing(self) -> None:
        async with self.make_stager() as stager:
            for _ in range(3):
                try:
                    await stager.stage({"weights": torch.ones(3, device="cpu"), "odd": _Refuses()})
                except Exception as error:
                    told = str(error)
                else:
                    raise AssertionError("what cannot be copied was staged without an error")
                assert "cannot be copied" in told, "the error does not say what was wrong"
                assert _values(await stager.stage(_tree(2.0))) == _values(_tree(2.0))

    async def test_cancelled_at_every_await(self) -> None:
        require_asyncio()
        async with self.make_stager() as stager:
            # The next staging has to get memory, and must not get bytes of the cancelled one.
            async for _ in at_every_await(lambda: stager.stage(_tree(5.0))):
                assert _values(await stager.stage(_tree(6.0))) == _values(_tree(6.0))

    async def test_closing(self) -> None:
        stager = self.make_stager()
        await stager.stage(_tree())
        await stager.aclose()
        await stager.aclose()
        try:
            await stager.stage(_tree())
        except StagerClosedError:
            return
        raise AssertionError("a closed stager has to refuse with StagerClosedError")

    async def test_closing_closes_also_when_cancelled(self) -> None:
        require_asyncio()
        made: list[CheckpointStager] = []

        def close() -> Any:
            made.append(self.make_stager())
            return made[-1].aclose()

        async for _ in at_every_await(close):
            await made[-1].aclose()
            try:
                await made[-1].stage(_tree())
            except StagerClosedError:
                continue
            raise AssertionError("a stager whose closing was cancelled has to refuse with StagerClosedError")
        await made[-1].aclose()

    async def test_may_be_entered_and_left_in_different_tasks(self) -> None:
        stager = self.make_stager()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stager.__aenter__)
        assert _values(await stager.stage(_tree(4.0))) == _values(_tree(4.0))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stager.__aexit__, None, None, None)

    async def test_leaves_nothing_behind(self) -> None:
        async with self.make_stager() as stager:
            await stager.stage(_tree())
        # By now everything is there that is made once for a process, except for threads of the loops' own pools.
        probe = LeakProbe(ignore_threads=_POOLS)
        for _ in range(5):
            async with self.make_stager() as stager:
                await stager.stage(_tree())
        del stager
        await probe.settled()
