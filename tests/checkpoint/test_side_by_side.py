"""A writer and a remover on one storage: each stops at every point of the other's way, and may die there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import pytest

import aiostage
from aiostage.checkpoint.index import CheckpointIndex
from aiostage.checkpoint.save import pending_checkpoint
from aiostage.checkpoint.writer import CheckpointWriter, FileOptions
from aiostage.incremental.references import locked
from aiostage.incremental.writing import IncrementalSaver
from aiostage.storage.locate import locked_by, step_of
from tests.checkpoint.comparing import assert_same
from tests.checkpoint.memory_storage import MANIFEST, MemoryStorage
from tests.checkpoint.names import name_of, tombstone_of
from tests.checkpoint.runs import MIB, apart_from_the_small, needed, numbers

NEW = 3


class Killed(BaseException):
    pass


@dataclass
class Actor:
    """A process that stops before one of its operations, and then continues or dies.

    Attributes:
        stop_at: Which operation; 0 for none.
        operations: How many it has begun.
    """

    stop_at: int
    operations: int = 0
    is_dead: bool = False
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    may_go_on: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    error: BaseException | None = None

    async def act(self, does: Callable[[], Awaitable[object]]) -> None:
        current.set(self)
        try:
            with suppress(Killed, BaseExceptionGroup):
                await does()
        except Exception as error:
            self.error = error
        finally:
            self.stopped.set()
            self.ended.set()

    async def pass_by(self) -> None:
        self.operations += 1
        if self.operations == self.stop_at:
            self.stopped.set()
            await self.may_go_on.wait()
        if self.is_dead:
            raise Killed

    async def goes_on(self, *, dies: bool = False) -> None:
        self.is_dead = dies
        self.may_go_on.set()
        await self.ended.wait()


current: ContextVar[Actor] = ContextVar("current")


def state(step: int) -> dict[str, Any]:
    """What lies in the first checkpoint and in each later one."""
    return {"frozen": numbers(MIB // 2, 0), "learns": numbers(MIB // 4, step)}


@cache
def refers_to(manifest: bytes) -> list[tuple[str | None, str, int]]:
    return [(source, file, nbytes) for source, file, nbytes in json.loads(manifest).get("sources", [])]


def check(storage: MemoryStorage) -> None:
    """Check that all that is there can be read."""
    for name, files in storage.checkpoints.items():
        if step_of(name) is not None and tombstone_of(name) not in storage.checkpoints:
            for source, file, nbytes in refers_to(files[MANIFEST]):
                assert len(storage.checkpoints[source or name][file]) == nbytes, f"{name} cannot be read"


async def write(saver: IncrementalSaver, name: str, tree: object) -> None:
    writer = CheckpointWriter(name, FileOptions())
    try:
        await writer.plan(tree)
        async with saver.compared() as changes, pending_checkpoint(name, partial(changes.open, name)) as (pending, _):
            await writer.write(pending)
        await writer.aclose()
    finally:
        writer.close()


async def saved() -> dict[str, dict[str, bytes]]:
    storage = MemoryStorage()
    saver = IncrementalSaver(storage)
    for step in range(NEW):
        await write(saver, name_of(step), state(step))
    return storage.checkpoints


class Stage:
    """Where it happens, once for each order."""

    def __init__(self, whole: dict[str, dict[str, bytes]], storage: type[MemoryStorage]) -> None:
        self.storage = storage()
        self.storage.checkpoints = {name: dict(files) for name, files in whole.items()}
        self.storage.before = self.before
        self.seen: set[str] = set()
        # Nothing has changed, so that all of it refers to the last one, and to what that refers to.
        self.new = state(NEW - 1)

    async def before(self, operation: str, name: str) -> None:
        check(self.storage)
        if name_of(NEW - 1) in locked_by(pending.name for pending in self.storage.under_way):
            self.seen.add("locked")
        await current.get().pass_by()

    async def write(self) -> None:
        await write(IncrementalSaver(self.storage), name_of(NEW), self.new)

    async def remove(self) -> None:
        await CheckpointIndex(self.storage).remove([0, 2])

    async def close(self, writer: Actor, remover: Actor) -> None:
        """Check the files after all processes have ended, and that the next process removes stale ones."""
        storage = self.storage
        storage.before, storage.under_way = None, [] if writer.is_dead or remover.is_dead else storage.under_way
        check(storage)
        assert storage.under_way == []
        assert (writer.error, remover.error) == (None, None)
        index = CheckpointIndex(storage)
        await index.open()
        steps = await index.steps()
        assert 1 in steps
        if not writer.is_dead:
            # A removal by another process does not make a save fail.
            assert NEW in steps
        if not remover.is_dead:
            assert not {0, 2} & set(steps)
        files = {(name, file): len(data) for name, held in storage.checkpoints.items() for file, data in held.items()}
        assert apart_from_the_small(files) == await needed(storage, steps)


async def in_order(
    whole: dict[str, dict[str, bytes]],
    first_writes: bool,
    stop_first: int,
    stop_second: int,
    dies: str,
    storage: type[MemoryStorage] = MemoryStorage,
) -> tuple[Actor, Actor, Stage]:
    """Let the first run to a point, then the second; then let the first run to its end, and the second last."""
    stage = Stage(whole, storage)
    first, second = Actor(stop_first), Actor(stop_second)
    does = (stage.write, stage.remove) if first_writes else (stage.remove, stage.write)
    async with asyncio.TaskGroup() as group:
        group.create_task(first.act(does[0]))
        await first.stopped.wait()
        group.create_task(second.act(does[1]))
        await second.stopped.wait()
        await first.goes_on(dies=dies == "first")
        await second.goes_on(dies=dies == "second")
    await stage.close(*((first, second) if first_writes else (second, first)))
    return first, second, stage


async def in_every_order(first_writes: bool, storage: type[MemoryStorage] = MemoryStorage) -> tuple[int, set[str]]:
    """Return how many orders there were, and what was seen in them."""
    whole = await saved()
    orders, seen = 0, set[str]()
    stop_first = 1
    while True:
        stop_second = 1
        while True:
            # Where the second has stopped makes no difference to a first that dies.
            for dies in ("none", "second") if stop_second > 1 else ("none", "first", "second"):
                first, second, stage = await in_order(whole, first_writes, stop_first, stop_second, dies, storage)
                orders += 1
                seen |= stage.seen
            if second.operations < stop_second:
                break
            stop_second += 1
        if first.operations < stop_first:
            return orders, seen
        stop_first += 1


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("first_writes", [True, False])
def test_what_is_there_can_be_read_in_every_order(first_writes: bool) -> None:
    orders, seen = asyncio.run(in_every_order(first_writes))
    assert orders > 400
    assert seen == {"locked"}


@pytest.mark.slow
def test_the_orders_show_what_goes_wrong_without_locks() -> None:
    class ShowsNoLocks(MemoryStorage):
        async def pending(self) -> list[str]:
            return []

    with pytest.raises((AssertionError, KeyError, BaseExceptionGroup)):
        asyncio.run(in_every_order(True, ShowsNoLocks))


@pytest.mark.asyncio
async def test_what_is_written_meanwhile_is_right() -> None:
    whole = await saved()
    for stop in (4, 8, 12):
        _, _, stage = await in_order(whole, True, stop, 1, "none")
        assert_same(stage.new, await aiostage.load((stage.storage, name_of(NEW))))


@pytest.mark.asyncio
@pytest.mark.parametrize("dies_before", ["", "prune_files"])
async def test_a_writer_that_lost_its_lock_commits_nothing_that_refers_to_what_goes(dies_before: str) -> None:
    """It was suspended for longer than the lease of its lock, and not than that of the checkpoint that it writes."""
    storage = MemoryStorage()
    storage.checkpoints = {name: dict(files) for name, files in (await saved()).items()}
    looked: list[str] = []

    async def meanwhile(operation: str, name: str) -> None:
        if operation == dies_before:
            raise Killed
        if (operation, name) != ("commit", name_of(NEW)) or looked:
            return
        looked.append(name)
        storage.under_way = [pending for pending in storage.under_way if pending.name == name]
        with suppress(Killed):
            await CheckpointIndex(storage).remove([0, 1, 2])

    storage.before = meanwhile
    with pytest.raises(aiostage.CheckpointError, match="whose files it refers to, was removed by another process"):
        await write(IncrementalSaver(storage), name_of(NEW), state(NEW - 1))
    assert looked
    assert name_of(NEW) not in storage.checkpoints


@pytest.mark.asyncio
async def test_a_cancelled_writer_that_lost_its_lock_leaves_nothing_that_refers_to_what_goes() -> None:
    storage = MemoryStorage()
    storage.checkpoints = {name: dict(files) for name, files in (await saved()).items()}
    committed: list[str] = []

    async def meanwhile(operation: str, name: str) -> None:
        if (operation, name) == ("commit", name_of(NEW)):
            committed.append(name)
            storage.under_way = [pending for pending in storage.under_way if pending.name == name]
            storage.before = None
            await CheckpointIndex(storage).remove([0, 1, 2])
            storage.before = meanwhile
        elif committed and len(committed) == 1:
            committed.append(operation)
            task.cancel()

    storage.before = meanwhile
    task = asyncio.ensure_future(write(IncrementalSaver(storage), name_of(NEW), state(NEW - 1)))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(committed) == 2
    assert name_of(NEW) not in storage.checkpoints


@pytest.mark.asyncio
async def test_a_lock_that_is_lost_does_no_harm_where_nothing_is_removed() -> None:
    storage = MemoryStorage()
    storage.checkpoints = {name: dict(files) for name, files in (await saved()).items()}

    async def lose(operation: str, name: str) -> None:
        if operation == "commit":
            storage.under_way = [pending for pending in storage.under_way if pending.name == name]

    storage.before = lose
    await write(IncrementalSaver(storage), name_of(NEW), state(NEW - 1))
    storage.before = None
    assert_same(state(NEW - 1), await aiostage.load((storage, name_of(NEW))))


@pytest.mark.asyncio
async def test_the_lock_of_another_writer_says_nothing_of_a_lost_one() -> None:
    storage = MemoryStorage()
    storage.checkpoints = {name: dict(files) for name, files in (await saved()).items()}
    base = name_of(NEW - 1)
    async with AsyncExitStack() as others:

        async def meanwhile(operation: str, name: str) -> None:
            if (operation, name) == ("commit", name_of(NEW)):
                storage.before = None
                # The heartbeat has expired, and a removal that has found no lock is about to delete the base. Another
                # writer locks it, and has not yet looked for its tombstone.
                storage.under_way = [pending for pending in storage.under_way if pending.name == name]
                await CheckpointIndex(storage)._write_tombstone(base)
                await others.enter_async_context(locked(storage, base))

        storage.before = meanwhile
        with pytest.raises(aiostage.CheckpointError, match="heartbeat of this one expired"):
            await write(IncrementalSaver(storage), name_of(NEW), state(NEW - 1))
    assert name_of(NEW) not in storage.checkpoints
