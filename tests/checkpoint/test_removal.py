"""What is removed of a run, and what stays because others refer to it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import obstore
import pytest
from fsspec.implementations.local import LocalFileSystem
from obstore.store import MemoryStore

import aiostage
from aiostage import CheckpointCorruptError, Checkpointer, CheckpointNotFoundError
from aiostage.abc import Storage
from aiostage.storage import FsspecStorage, LocalStorage, ObjectStorage
from tests.checkpoint.comparing import assert_same
from tests.checkpoint.memory_storage import MANIFEST, MemoryStorage
from tests.checkpoint.names import name_of, tombstone_of
from tests.checkpoint.programs import ROOT, output_of
from tests.checkpoint.runs import MIB, LoRA, Run, apart_from_the_small, copied, in_directory, needed, numbers
from tests.checkpoint.test_checkpointer import Gate, until
from tests.checkpoint.test_incremental import settled
from tests.patience import seconds
from tests.warm import PYTHON


class Killed(BaseException):
    """Ends a process of the test where it is raised."""


async def saved_incrementally(steps: int) -> MemoryStorage:
    storage, model = MemoryStorage(), LoRA(2)
    async with Checkpointer(storage, incremental=True) as checkpoints:
        for step in range(steps):
            await checkpoints.save(step, model.state_dict(step))
    return storage


async def saved_between_steps(steps: int, model: Run) -> MemoryStorage:
    storage = MemoryStorage()
    async with Checkpointer(storage, incremental=True) as checkpoints:
        for step in range(steps):
            await checkpoints.save(step, model.state_dict(step))
            model.train(step)
    return storage


@pytest.mark.asyncio
async def test_what_others_refer_to_stays() -> None:
    storage, model = MemoryStorage(), LoRA()
    async with Checkpointer(storage, incremental=True, keep=2) as checkpoints:
        for step in range(5):
            await checkpoints.save(step, model.state_dict(step))
            await settled(checkpoints)
            model.train()
        assert await checkpoints.steps() == [3, 4]
        # The first has the tower. Those between had only adapters, to which no checkpoint refers any more.
        assert set(storage.checkpoints) == {name_of(0), f"{name_of(0)}.removed", name_of(3), name_of(4)}
        with pytest.raises(CheckpointNotFoundError):
            await checkpoints.restore(step=0)
        for step in (3, 4):
            assert (await checkpoints.restore(step=step))["step"] == step
        # Now everything changes; when the last that refers to it has gone, it goes.
        for tensor in model.tower.values():
            tensor.neg_()
        for step in (5, 6):
            await checkpoints.save(step, model.state_dict(step))
            await settled(checkpoints)
            model.train()
    assert set(storage.checkpoints) == {name_of(5), name_of(6)}
    assert (await checkpoints.restore())["step"] == 6


@pytest.mark.one_loop
@pytest.mark.asyncio
async def test_no_more_than_about_twice_what_is_needed_is_held() -> None:
    storage = MemoryStorage()
    state = {f"p{n:02}": numbers(MIB // 4, n) for n in range(32)}
    needed, most = 32 * MIB, 0
    async with Checkpointer(storage, incremental=True, keep=1) as checkpoints:
        for step in range(40):
            await checkpoints.save(step, state)
            await settled(checkpoints)
            held = sum(len(data) for files in storage.checkpoints.values() for data in files.values())
            most = max(most, held)
            assert_same(state, await checkpoints.restore())
            # Another tensor each time.
            state[f"p{step % 32:02}"].add_(1)
    assert most < 2 * needed + 8 * MIB
    assert sum(storage.written_bytes.values()) < 40 * needed / 4


@pytest.mark.asyncio
async def test_runs_that_are_no_longer_incremental_respect_references() -> None:
    storage, model = MemoryStorage(), LoRA(3)
    async with Checkpointer(storage, incremental=True) as checkpoints:
        for step in range(3):
            await checkpoints.save(step, model.state_dict(step))
            model.train()
    async with Checkpointer(storage, keep=2) as checkpoints:
        await checkpoints.save(3, model.state_dict(3))
        await settled(checkpoints)
        assert await checkpoints.steps() == [2, 3]
        assert_same(await checkpoints.restore(step=2), await checkpoints.restore(step=2))
        await checkpoints.delete(2)
        assert set(storage.checkpoints) == {name_of(3)}


@pytest.mark.asyncio
async def test_another_process_removes_what_a_save_refers_to() -> None:
    storage, model = MemoryStorage(), LoRA(3)
    async with Checkpointer(storage, incremental=True) as checkpoints:
        await (await checkpoints.save(0, model.state_dict(0))).committed()
        gate = Gate(storage)
        handle = await checkpoints.save(1, model.state_dict(1))
        await until(lambda: gate.waiting == 1)
        storage.before = None
        await Checkpointer(storage).delete(0)
        assert await checkpoints.steps() == []
        gate.open.set()
        await handle.committed()
        assert await checkpoints.steps() == [1]
        await checkpoints.save(2, model.state_dict(2))
    for step in (1, 2):
        assert_same(model.state_dict(step), await checkpoints.restore(step=step))


@pytest.mark.asyncio
async def test_what_others_remove_just_when_it_is_chosen_is_not_referred_to() -> None:
    whole, model = MemoryStorage(), LoRA(3)
    async with Checkpointer(whole, incremental=True) as checkpoints:
        for step in range(3):
            await checkpoints.save(step, model.state_dict(step))

    async def written_beside(removals: int) -> set[str]:
        storage = MemoryStorage()
        storage.checkpoints = {name: dict(files) for name, files in whole.checkpoints.items()}
        left = removals

        async def remove(operation: str, name: str) -> None:
            nonlocal left
            if left and operation == "open" and name.endswith(".pinned"):
                left -= 1
                before, storage.before = storage.before, None
                await Checkpointer(storage).delete(int(name[5:13]))
                storage.before = before

        async with Checkpointer(storage, incremental=True) as checkpoints:
            storage.before = remove
            await checkpoints.save(3, model.state_dict(3))
        assert_same(model.state_dict(3), await checkpoints.restore())
        return {source for source, _, _ in json.loads(storage.checkpoints[name_of(3)][MANIFEST])["sources"]}

    # No checkpoint refers to the first any more, and everything is written.
    assert [await written_beside(removals) for removals in range(4)] == [{name_of(0)}] * 3 + [{None}]


@pytest.mark.asyncio
async def test_another_process_removes_what_a_save_refers_to_and_sees_it_in_time() -> None:
    storage, model = MemoryStorage(), LoRA()
    async with Checkpointer(storage, incremental=True) as checkpoints:
        for step in (0, 1):
            await (await checkpoints.save(step, model.state_dict(step))).committed()
        await checkpoints.save(2, model.state_dict(2))
        await settled(checkpoints)
        other = Checkpointer(storage)
        for step in (0, 1):
            await other.delete(step)
        await checkpoints.save(3, model.state_dict(3))
    assert await checkpoints.steps() == [2, 3]
    assert_same(model.state_dict(3), await checkpoints.restore())


# --------------------------------------------------------------------------------------------- files without references


@pytest.fixture
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let changes go to several files without being many gigabytes."""
    monkeypatch.setattr("aiostage.incremental.writing._GROUP_BYTES", MIB)


def in_memory(storage: MemoryStorage) -> dict[tuple[str, str], int]:
    return {(name, file): len(data) for name, files in storage.checkpoints.items() for file, data in files.items()}


def in_store(store: MemoryStore, prefix: str) -> dict[tuple[str, str], int]:
    found = {}
    for meta in obstore.list(store, prefix).collect():
        _, name, *_, file = meta["path"].split("/")
        found[name, file] = meta["size"]
    return found


Holding = tuple[Storage, Callable[[], dict[tuple[str, str], int]]]


@pytest.fixture(params=["memory", "local", "objects", "fsspec"])
def holding(request: pytest.FixtureRequest, tmp_path: Path) -> Holding:
    """A storage, and what says which files lie in it."""
    if request.param == "memory":
        memory = MemoryStorage()
        return memory, lambda: in_memory(memory)
    if request.param == "local":
        return LocalStorage(tmp_path), lambda: in_directory(tmp_path)
    if request.param == "objects":
        store = MemoryStore()
        return ObjectStorage(store, "run"), lambda: in_store(store, "run")
    return FsspecStorage(LocalFileSystem(), str(tmp_path)), lambda: in_directory(tmp_path)


@pytest.mark.one_loop
@pytest.mark.asyncio
@pytest.mark.usefixtures("_small_groups")
async def test_nothing_is_held_but_what_is_referred_to(holding: Holding) -> None:
    storage, files = holding
    model, trimmed = Run(), 0
    async with Checkpointer(storage, incremental=True, keep=2) as checkpoints:
        for step in range(20):
            await checkpoints.save(step, model.state_dict(step))
            await settled(checkpoints)
            expected = copied(model.state_dict(step))
            model.train(step)
            steps = await checkpoints.steps()
            assert steps == list(range(max(0, step - 1), step + 1))
            held = apart_from_the_small(files())
            assert held == await needed(storage, steps)
            # What is half dead is written anew, so that this is not much more than the latest one alone.
            assert sum(held.values()) < 3 * 10 * MIB
            assert_same(expected, await checkpoints.restore())
            for name in {name for name, _ in held} - {name_of(step) for step in steps}:
                # Of some that were removed, some files are gone; their numbers say so.
                numbers_left = [int(file[-5:]) for source, file in held if source == name and file[-1].isdigit()]
                trimmed += bool(numbers_left) and numbers_left != list(range(1, len(numbers_left) + 1))
    assert trimmed > 3


@pytest.mark.asyncio
@pytest.mark.usefixtures("_small_groups")
async def test_a_storage_that_cannot_remove_single_files_keeps_them_until_all_go() -> None:
    class KeepsAll(MemoryStorage):
        prune_files = Storage.prune_files

    storage, model = KeepsAll(), Run()
    async with Checkpointer(storage, incremental=True, keep=2) as checkpoints:
        for step in range(10):
            await checkpoints.save(step, model.state_dict(step))
            await settled(checkpoints)
            held, least = apart_from_the_small(in_memory(storage)), await needed(storage, await checkpoints.steps())
            assert least.items() <= held.items()
            assert {name for name, _ in held} == {name for name, _ in least}
            model.train(step)
    assert held != least
    assert (await checkpoints.restore())["step"] == 9


@pytest.mark.asyncio
@pytest.mark.usefixtures("_small_groups")
async def test_each_file_is_asked_for_once() -> None:
    storage, model = MemoryStorage(), Run()
    async with Checkpointer(storage, incremental=True, keep=1) as checkpoints:
        for step in range(3):
            await checkpoints.save(step, model.state_dict(step))
            await settled(checkpoints)
        prunes = storage.operations["prune_files"]
        manifests = storage.operations["manifest"]
        for step in range(3, 6):
            # Nothing changes, so that nothing more can go.
            await checkpoints.save(step, model.state_dict(0))
            await settled(checkpoints)
        assert storage.operations["prune_files"] == prunes
        # What a save is compared with is read once it is locked.
        assert storage.operations["manifest"] == manifests + 3


@pytest.mark.one_loop
@pytest.mark.asyncio
@pytest.mark.usefixtures("_small_groups")
async def test_removing_killed_at_each_step() -> None:
    whole, model = MemoryStorage(), Run()
    states = []
    async with Checkpointer(whole, incremental=True) as checkpoints:
        for step in range(6):
            await checkpoints.save(step, model.state_dict(step))
            states.append(copied(model.state_dict(step)))
            model.train(step)

    async def run(die_at: int, kinds: set[str]) -> bool:
        storage = MemoryStorage()
        storage.checkpoints = {name: dict(files) for name, files in whole.checkpoints.items()}
        operations = 0

        async def die(operation: str, name: str) -> None:
            nonlocal operations
            operations += 1
            if operations > die_at:
                kinds.add(operation)
                raise Killed

        storage.before = die
        try:
            remover = Checkpointer(storage)
            for step in (1, 0, 2, 3):
                await remover.delete(step)
        except Killed:
            died = True
        else:
            died = False
        storage.before = None
        storage.under_way.clear()
        reader = Checkpointer(storage)
        steps = await reader.steps()
        assert steps[-2:] == [4, 5]
        for step in steps:
            assert_same(states[step], await reader.restore(step=step))
        async with Checkpointer(storage):
            # Entering goes on where the dead one has stopped.
            assert await reader.steps() == steps
        assert apart_from_the_small(in_memory(storage)) == await needed(storage, steps)
        return died

    die_at, kinds = 0, set[str]()
    while await run(die_at, kinds):
        die_at += 1
    assert kinds >= {"list", "manifest", "open", "write", "commit", "prune_files", "delete"}


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_removing_on_a_disk_killed_before_each_operation(tmp_path: Path) -> None:
    output = output_of("tests.checkpoint.dying_removal", str(tmp_path))
    # The number of runs, and of those in which files without references were there.
    lives, untidy = map(int, output.split())
    assert lives > 20
    assert untidy > 5


# ---------------------------------------------------------------------------------------------------- several at once


@pytest.mark.one_loop
@pytest.mark.asyncio
@pytest.mark.usefixtures("_small_groups")
@pytest.mark.parametrize("who", ["remover in between", "writer in between"])
async def test_removing_beside_a_writer_that_is_about_to_refer(who: str) -> None:
    """Each does all that it has to do before each operation of the other's in turn."""
    whole, model = MemoryStorage(), Run()
    states = [copied(model.state_dict(0))]
    async with Checkpointer(whole, incremental=True) as checkpoints:
        for step in range(4):
            await checkpoints.save(step, model.state_dict(step))
            model.train(step)
            states.append(copied(model.state_dict(step + 1)))

    async def run(at: int) -> bool:
        storage = MemoryStorage()
        storage.checkpoints = {name: dict(files) for name, files in whole.checkpoints.items()}
        operations, interrupted = 0, False

        async def write() -> None:
            async with Checkpointer(storage, incremental=True) as writer:
                await (await writer.save(4, states[4])).committed()

        async def remove() -> None:
            remover = Checkpointer(storage)
            for step in (2, 3, 0):
                await remover.delete(step)

        first, second = (write, remove) if who == "remover in between" else (remove, write)

        async def interrupt(operation: str, name: str) -> None:
            nonlocal operations, interrupted
            operations += 1
            if operations == at and not interrupted:
                interrupted = True
                storage.before = None
                await second()

        storage.before = interrupt
        await first()
        storage.before = None
        if not interrupted:
            return False
        reader = Checkpointer(storage)
        # No process hinders the other, and what is there can be read.
        steps = await reader.steps()
        assert steps == [1, 4]
        for step in steps:
            assert_same(states[step], await reader.restore(step=step))
        async with Checkpointer(storage):
            pass
        assert apart_from_the_small(in_memory(storage)) == await needed(storage, steps)
        return True

    at = 1
    while await run(at):
        at += 1
    assert at > 20


@pytest.mark.asyncio
@pytest.mark.usefixtures("_small_groups")
async def test_a_writer_that_is_killed_beside_a_removal() -> None:
    """Another process removes what it refers to before one of its operations; before the next one it dies."""

    model = Run()
    whole = await saved_between_steps(4, model)

    async def run(at: int) -> bool:
        storage = MemoryStorage()
        storage.checkpoints = {name: dict(files) for name, files in whole.checkpoints.items()}
        operations = 0

        async def interrupt(operation: str, name: str) -> None:
            nonlocal operations
            operations += 1
            if operations == at:
                storage.before = None
                for step in (2, 3, 0):
                    await Checkpointer(storage).delete(step)
                storage.before = interrupt
            elif operations > at:
                raise Killed

        storage.before = interrupt
        with suppress(Killed, BaseExceptionGroup):
            async with Checkpointer(storage, incremental=True) as writer:
                await (await writer.save(4, model.state_dict(4))).committed()
        storage.before = None
        storage.under_way.clear()
        reader = Checkpointer(storage)
        for step in await reader.steps():
            assert (await reader.restore(step=step))["step"] == step
        return operations >= at

    at = 1
    while await run(at):
        at += 1
    assert at > 20


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_one_process_saves_while_another_removes(tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [*PYTHON, "-m", "tests.checkpoint.removing", str(tmp_path), "save"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        removed = int(output_of("tests.checkpoint.removing", str(tmp_path), "remove"))
        output, _ = writer.communicate(timeout=seconds(60))
    finally:
        writer.kill()
    saved = int(output)
    assert saved > 10
    assert removed > 10


@pytest.mark.asyncio
@pytest.mark.usefixtures("_small_groups")
async def test_a_reader_of_a_checkpoint_that_is_removed_meanwhile_gets_an_error() -> None:
    model = Run()
    storage = await saved_between_steps(3, model)

    async def remove(operation: str, name: str) -> None:
        if operation == "read file":
            storage.before = None
            other = Checkpointer(storage)
            for step in (0, 1):
                await other.delete(step)

    storage.before = remove
    with pytest.raises(CheckpointNotFoundError, match="it was removed; other checkpoints still refer"):
        await aiostage.load((storage, name_of(1)))
    assert tombstone_of(name_of(1)) in storage.checkpoints
    # And so is who comes later.
    with pytest.raises(CheckpointNotFoundError, match="it was removed; other checkpoints still refer"):
        await aiostage.load((storage, name_of(1)))
    # What is damaged is another matter.
    for file in list(storage.checkpoints[name_of(1)]):
        if file != MANIFEST:
            del storage.checkpoints[name_of(1)][file]
    with pytest.raises(CheckpointCorruptError):
        await aiostage.load((storage, name_of(2)))


@pytest.mark.asyncio
async def test_what_no_checkpoint_can_refer_to_gets_no_tombstone() -> None:
    storage = MemoryStorage()
    async with Checkpointer(storage, keep=1) as checkpoints:
        for step in range(4):
            await checkpoints.save(step, {"step": step})
            await settled(checkpoints)
    assert storage.operations["commit"] == 4
    assert set(storage.checkpoints) == {name_of(3)}


@pytest.mark.asyncio
async def test_one_that_is_not_incremental_marks_what_others_may_be_about_to_refer_to() -> None:
    storage = await saved_incrementally(2)
    commits = storage.operations["commit"]
    await Checkpointer(storage).delete(1)
    assert storage.operations["commit"] == commits + 1
    assert set(storage.checkpoints) == {name_of(0)}


@pytest.mark.asyncio
async def test_the_damaged_can_be_removed_and_hinder_only_those_that_they_may_refer_to() -> None:
    storage = await saved_incrementally(3)
    storage.checkpoints[name_of(2)][MANIFEST] = b"{}"
    reader = Checkpointer(storage)
    before = dict(storage.checkpoints)
    with pytest.raises(CheckpointCorruptError):
        await reader.delete(1)
    assert storage.checkpoints == before
    await reader.delete(2)
    await reader.delete(1)
    assert set(storage.checkpoints) == {name_of(0)}
