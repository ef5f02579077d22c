"""Closing a stager while a device does not come to an end: all waiters get an error, and its memory waits for it."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Awaitable, Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

import aiostage
from aiostage import AsyncStager, StagerClosedError, StagingOptions
from aiostage.snapshot import Snapshot
from aiostage.testing.clock import VirtualClock
from tests.device.accelerators import Accelerator, CopyCounter
from tests.loop.test_polling import RUNS, run_on
from tests.patience import seconds
from tests.staging.holding import until

MIB = 2**20
Action = Callable[[Snapshot[Any]], Awaitable[object]]


def on_every_loop(scene: Callable[..., Any]) -> Callable[..., None]:
    """Make a test of a coroutine function that takes the name of its event loop first."""

    @pytest.mark.parametrize("loop", RUNS)
    @wraps(scene)
    def test(loop: str, **arguments: Any) -> None:
        run_on(loop, partial(scene, loop, **arguments))

    return test


def full(accelerator: Accelerator, value: float, size: int = 64) -> torch.Tensor:
    tensor = accelerator.to_device(torch.full((size,), float(value)))
    accelerator.synchronize()
    return tensor


class Refused:
    """Calls that are expected to end with StagerClosedError; the errors are kept, as a log would."""

    def __init__(self) -> None:
        self.errors: list[StagerClosedError] = []

    async def call(self, call: Callable[[], Awaitable[object]]) -> None:
        try:
            await call()
        except StagerClosedError as error:
            self.errors.append(error)
        else:
            pytest.fail("it was not refused")
        finally:
            # The error's traceback has this frame in it.
            del call


async def everything_is_gone(accelerator: Accelerator, stager: AsyncStager) -> None:
    """Let the device come to an end after all, and wait until nothing is kept for it."""

    def is_gone() -> bool:
        # Again and again: what a thread was about to enqueue may come after the first.
        accelerator.synchronize()
        return stager.statistics().arenas == 0

    await until(is_gone)
    assert accelerator.statistics().registered_bytes == 0


async def iterate(snapshot: Snapshot[Any]) -> None:
    async for leaf in snapshot:
        del leaf


async def inspect_memory(snapshot: Snapshot[Any]) -> None:
    await snapshot.copied(snapshot.memory.start, len(snapshot.memory))


@on_every_loop
async def test_a_staging(loop: str) -> None:
    with Accelerator(clock=VirtualClock()) as accelerator:
        source = full(accelerator, 1)
        launched = CopyCounter(accelerator)
        alive, stager, refused = weakref.ref(source.untyped_storage()), AsyncStager(backend=accelerator), Refused()
        async with anyio.create_task_group() as group:
            group.start_soon(refused.call, partial(stager.stage, {"a": source}))
            await until(lambda: launched.count == 1)
            await stager.aclose()
        del source
        gc.collect()
        assert alive() is not None, "the device may still read it"
        assert stager.statistics().leases == 1, "and write to this"
        await everything_is_gone(accelerator, stager)
        assert alive() is None
        assert len(refused.errors) == 1


@pytest.mark.parametrize(
    "action",
    [Snapshot.captured, Snapshot.result, Snapshot.source_free, iterate, inspect_memory],
    ids=["captured", "result", "source_free", "iteration", "completed"],
)
@on_every_loop
async def test_a_snapshot(loop: str, action: Action) -> None:
    with Accelerator(clock=VirtualClock()) as accelerator:
        state = {"a": full(accelerator, 1), "b": full(accelerator, 2, 9 * MIB), "host": torch.ones(3)}
        launched = CopyCounter(accelerator)
        stager, refused = AsyncStager(backend=accelerator), Refused()
        async with stager.snapshot(state) as snapshot:
            async with anyio.create_task_group() as group:
                for _ in range(3):
                    group.start_soon(refused.call, partial(action, snapshot))
                for _ in range(20):
                    await anyio.lowlevel.checkpoint()
                await stager.aclose()
            await refused.call(partial(action, snapshot))
        assert launched.count == 3
        assert stager.statistics().leases == 1, "the device may still write to it"
        await everything_is_gone(accelerator, stager)


@pytest.mark.parametrize("options", [{"max_bytes_in_flight": 1}, {"use_non_blocking_copy": False}])
@on_every_loop
async def test_a_launch_that_waits_for_its_turn(loop: str, options: dict[str, Any]) -> None:
    with Accelerator(clock=VirtualClock()) as accelerator:
        state = {str(n): full(accelerator, n, 9 * MIB) for n in range(4)}
        launched = CopyCounter(accelerator)
        stager, refused = AsyncStager(StagingOptions(**options), backend=accelerator), Refused()
        async with anyio.create_task_group() as group:
            group.start_soon(refused.call, partial(stager.stage, state))
            await until(lambda: launched.count == 2)
            await stager.aclose()
        await everything_is_gone(accelerator, stager)
        assert launched.count == 2, "the rest was not launched"


class Hangs(Accelerator):
    """Does not return from the call that tells it to copy."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.hangs = False

    def copy(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], stream: Any) -> int:
        self.hangs = True
        self.entered.set()
        self.go_on.wait(seconds(30))
        self.hangs = False
        return super().copy(destinations, sources, stream)


@pytest.mark.parametrize("cancelled", [False, True])
@on_every_loop
async def test_a_driver_that_hangs(loop: str, cancelled: bool) -> None:
    with Hangs(clock=VirtualClock()) as accelerator:
        state = {str(n): full(accelerator, n, 9 * MIB) for n in range(2)}
        launched = CopyCounter(accelerator)
        stager, ended = AsyncStager(backend=accelerator), []

        async def stage() -> None:
            try:
                await stager.stage(state)
            except StagerClosedError:
                ended.append("closed")
            except anyio.get_cancelled_exc_class():
                ended.append("cancelled")
                raise

        async with anyio.create_task_group() as group:
            group.start_soon(stage)
            await until(accelerator.entered.is_set)
            if cancelled:
                group.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await stager.aclose()
        assert accelerator.hangs, "they waited for the driver"
        assert ended == ["cancelled" if cancelled else "closed"]
        assert stager.statistics().leases == 1, "it is in the driver's hands"
        accelerator.go_on.set()
        await until(lambda: launched.count == 1)
        await everything_is_gone(accelerator, stager)


@on_every_loop
async def test_a_restore_is_made_all_the_same(loop: str) -> None:
    with Accelerator(clock=VirtualClock()) as accelerator:
        live = {"a": full(accelerator, 1)}
        launched = CopyCounter(accelerator)
        stager, refused = AsyncStager(backend=accelerator), Refused()
        async with anyio.create_task_group() as group:
            staged: list[Any] = []

            async def stage() -> None:
                staged.append(await stager.stage(live))

            group.start_soon(stage)
            await until(lambda: launched.count == 1)
            await until(lambda: accelerator.synchronize() or bool(staged))
        accelerator.launch(lambda t: t.fill_(9), live["a"])
        async with anyio.create_task_group() as group:
            group.start_soon(refused.call, partial(stager.restore, staged.pop(), into=live))
            await until(lambda: launched.count == 2)
            await stager.aclose()
        seen = accelerator.empty(64)
        accelerator.launch(lambda to, source: to.copy_(source), seen, reads=[live["a"]])
        # They lead to the staged tree that was given.
        refused.errors.clear()
        gc.collect()
        await everything_is_gone(accelerator, stager)
        assert (float(live["a"].mean()), float(seen.mean())) == (1, 1)


@pytest.mark.parametrize("budget", [None, 40 * MIB])
@on_every_loop
async def test_a_save(loop: str, budget: int | None, tmp_path: Path) -> None:
    with Accelerator(clock=VirtualClock()) as accelerator:
        state = {str(n): full(accelerator, n, 9 * MIB) for n in range(3)}
        launched = CopyCounter(accelerator)
        stager, refused = AsyncStager(StagingOptions(max_host_bytes=budget), backend=accelerator), Refused()
        async with anyio.create_task_group() as group:
            group.start_soon(refused.call, partial(aiostage.save, state, tmp_path / "saved", stager=stager))
            await until(lambda: launched.count > 0)
            for _ in range(50):
                await anyio.lowlevel.checkpoint()
            await stager.aclose()
        refused.errors.clear()
        gc.collect()
        await everything_is_gone(accelerator, stager)
        assert not list(tmp_path.iterdir())


@on_every_loop
async def test_from_another_thread(loop: str) -> None:
    with Accelerator(clock=VirtualClock()) as accelerator:
        stager, refused = AsyncStager(backend=accelerator), Refused()
        source = full(accelerator, 1)
        launched = CopyCounter(accelerator)
        async with anyio.create_task_group() as group:
            group.start_soon(refused.call, partial(stager.stage, {"a": source}))
            await until(lambda: launched.count == 1)
            thread = threading.Thread(target=anyio.run, args=(stager.aclose,))
            thread.start()
            await until(lambda: not thread.is_alive())
        await everything_is_gone(accelerator, stager)
