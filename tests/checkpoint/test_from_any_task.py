"""A checkpointer that no block holds: opened in one task, used from others, closed in yet another."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
import trio

import aiostage
from aiostage import Checkpointer, CheckpointError, SaveHandle
from aiostage.testing import at_every_await
from tests.checkpoint.comparing import assert_same
from tests.checkpoint.leftovers import nothing_left
from tests.checkpoint.memory_storage import MemoryStorage
from tests.checkpoint.test_checkpointer import Gate, tree, turns, until
from tests.patience import seconds


async def in_a_task(call: Callable[[], Awaitable[Any]]) -> Any:
    """Run something in a task that has ended when this returns."""
    results = []

    async def run() -> None:
        results.append(await call())

    async with anyio.create_task_group() as group:
        group.start_soon(run)
    return results[0]


async def opened_saved_closed() -> None:
    storage = MemoryStorage()
    checkpoints = Checkpointer(storage, keep=2)
    await in_a_task(checkpoints.open)
    for step in range(3):
        await in_a_task(lambda step=step: checkpoints.save(step, tree(step)))
    await in_a_task(checkpoints.aclose)
    assert await checkpoints.steps() == [1, 2]
    assert_same(tree(2), await checkpoints.restore())
    with pytest.raises(CheckpointError, match="left"):
        await checkpoints.save(3, tree(3))
    await checkpoints.aclose()
    with pytest.raises(CheckpointError, match="entered before"):
        await checkpoints.open()


async def entered_here_and_left_there() -> None:
    storage = MemoryStorage()
    checkpoints = Checkpointer(storage)
    assert await in_a_task(checkpoints.__aenter__) is checkpoints
    await in_a_task(lambda: checkpoints.save(1, tree(1)))
    await in_a_task(lambda: checkpoints.__aexit__(None, None, None))
    assert await checkpoints.steps() == [1]


async def closing_waits_in_all_tasks() -> None:
    storage = MemoryStorage()
    gate = Gate(storage)
    checkpoints = Checkpointer(storage)
    await checkpoints.open()
    handle = await checkpoints.save(1, tree(1))
    closed = []

    async def close() -> None:
        await checkpoints.aclose()
        closed.append(handle.done())

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(close)
        await until(lambda: gate.waiting == 1)
        await turns(50)
        assert closed == []
        gate.open.set()
    assert closed == [True] * 3
    assert await checkpoints.steps() == [1]


async def closing_is_cancelled() -> None:
    storage = MemoryStorage()
    gate = Gate(storage)
    checkpoints = Checkpointer(storage)
    await in_a_task(checkpoints.open)
    handle: SaveHandle = await in_a_task(lambda: checkpoints.save(1, tree(1)))
    await until(lambda: gate.waiting == 1)
    with anyio.move_on_after(0.01) as scope:
        await checkpoints.aclose()
    assert scope.cancelled_caught
    assert handle.done()
    assert (storage.checkpoints, storage.under_way) == ({}, [])
    with pytest.raises(CheckpointError, match="abandoned"):
        await handle.committed()
    await in_a_task(checkpoints.aclose)


async def closing_in_a_scope_that_is_cancelled_already() -> None:
    storage = MemoryStorage()
    gate = Gate(storage)
    checkpoints = Checkpointer(storage)
    await checkpoints.open()
    handle = await checkpoints.save(1, tree(1))
    await until(lambda: gate.waiting == 1)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await checkpoints.aclose()
    assert scope.cancelled_caught
    assert handle.done()
    assert storage.under_way == []


async def what_has_opened_is_cancelled_later() -> None:
    """The saves are not part of the scope in which it was opened."""
    storage = MemoryStorage()
    checkpoints = Checkpointer(storage)
    with anyio.CancelScope() as scope:
        await checkpoints.open()
        scope.cancel()
        await anyio.sleep_forever()
    await checkpoints.save(1, tree(1))
    await checkpoints.aclose()
    assert await checkpoints.steps() == [1]


async def a_failure_is_raised_by_closing_once() -> None:
    storage = MemoryStorage()
    gate = Gate(storage)
    gate.refuse = True
    checkpoints = Checkpointer(storage)
    await in_a_task(checkpoints.open)
    await in_a_task(lambda: checkpoints.save(1, tree(1)))
    gate.open.set()
    with pytest.raises(OSError, match="No space left"):
        await checkpoints.aclose()
    await checkpoints.aclose()


async def opening_fails_and_is_tried_again() -> None:
    storage = MemoryStorage()

    async def refuse(operation: str, name: str) -> None:
        raise PermissionError(13, "Permission denied", name)

    storage.before = refuse
    checkpoints = Checkpointer(storage)
    with pytest.raises(PermissionError):
        await checkpoints.open()
    await checkpoints.aclose()
    storage.before = None
    await checkpoints.open()
    await checkpoints.save(1, tree(1))
    await checkpoints.aclose()
    assert await checkpoints.steps() == [1]


SCENARIOS = [
    opened_saved_closed,
    entered_here_and_left_there,
    closing_waits_in_all_tasks,
    closing_is_cancelled,
    closing_in_a_scope_that_is_cancelled_already,
    what_has_opened_is_cancelled_later,
    a_failure_is_raised_by_closing_once,
    opening_fails_and_is_tried_again,
]


@pytest.mark.asyncio
@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_on_asyncio(scenario: Callable[[], Awaitable[None]]) -> None:
    with nothing_left():
        await scenario()


@pytest.mark.anyio
@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_on_trio(scenario: Callable[[], Awaitable[None]]) -> None:
    with nothing_left():
        await scenario()


@pytest.mark.asyncio
async def test_opening_and_closing_cancelled_at_every_await() -> None:
    storage = MemoryStorage()
    checkpoints = Checkpointer(storage)
    rounds = 0
    async for _ in at_every_await(checkpoints.open):
        rounds += 1
    assert rounds > 1
    handle = await checkpoints.save(1, tree(1))
    async for _ in at_every_await(checkpoints.aclose):
        assert handle.done()
        assert storage.under_way == []
    with pytest.raises(CheckpointError, match="left"):
        await checkpoints.save(2, tree(2))


@pytest.mark.asyncio
async def test_a_task_that_is_cancelled_again_and_again_while_closing() -> None:
    storage = MemoryStorage()
    gate = Gate(storage)
    checkpoints = Checkpointer(storage)
    await checkpoints.open()
    await checkpoints.save(1, tree(1))
    closing = asyncio.create_task(checkpoints.aclose())
    await until(lambda: gate.waiting == 1)
    for _ in range(5):
        closing.cancel()
        await anyio.lowlevel.checkpoint()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert (storage.checkpoints, storage.under_way) == ({}, [])


@pytest.mark.asyncio
async def test_signals_reach_a_checkpointer_that_no_block_holds() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    checkpoints = Checkpointer(MemoryStorage(), save_on_signals=[signal.SIGUSR1])
    await in_a_task(checkpoints.open)
    os.kill(os.getpid(), signal.SIGUSR1)
    with anyio.fail_after(seconds(10)):
        await checkpoints.preempted.wait()
    await in_a_task(checkpoints.aclose)
    assert signal.getsignal(signal.SIGUSR1) is before


class Actor:
    """Methods that each run as a task of their own, called from another thread."""

    def __init__(self, target: Path) -> None:
        self._checkpoints = Checkpointer(target)

    async def start(self) -> None:
        await self._checkpoints.open()

    async def save(self, step: int) -> None:
        await self._checkpoints.save(step, tree(step))

    async def stop(self) -> None:
        await self._checkpoints.aclose()


def test_an_actor_holds_one(tmp_path: Path) -> None:
    with nothing_left():
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        try:
            actor = Actor(tmp_path)
            for coroutine in (actor.start(), actor.save(1), actor.save(2), actor.stop()):
                asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
    assert_same(tree(2), aiostage.blocking.load(tmp_path / "step-00000002"))


def test_another_loop_may_not_close_it(tmp_path: Path) -> None:
    async def run() -> None:
        checkpoints = Checkpointer(tmp_path)
        await checkpoints.open()

        def elsewhere() -> None:
            with pytest.raises(CheckpointError, match="another event loop"):
                asyncio.run(checkpoints.aclose())

        await asyncio.to_thread(elsewhere)
        await checkpoints.save(1, tree(1))
        await checkpoints.aclose()
        assert await checkpoints.steps() == [1]

    asyncio.run(run())


@pytest.mark.parametrize("run", [asyncio.run, lambda coroutine: trio.run(lambda: coroutine)], ids=["asyncio", "trio"])
def test_a_loop_that_ends_abandons_what_is_not_closed(run: Callable[[Any], None]) -> None:
    storage = MemoryStorage()
    left = []

    async def forget() -> None:
        gate = Gate(storage)
        checkpoints = Checkpointer(storage)
        await checkpoints.open()
        left.append((checkpoints, await checkpoints.save(1, tree(1))))
        await until(lambda: gate.waiting == 1)

    with nothing_left():
        run(forget())
    checkpoints, handle = left[0]
    assert handle.done()
    assert (storage.checkpoints, storage.under_way) == ({}, [])
    with pytest.raises(CheckpointError, match="left"):
        checkpoints.save(2, tree(2)).close()
