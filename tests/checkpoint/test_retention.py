from __future__ import annotations

from pathlib import Path

import anyio
import pytest
import torch

import aiostage
from aiostage import Checkpointer
from tests.checkpoint.memory_storage import MemoryStorage
from tests.checkpoint.names import name_of
from tests.checkpoint.test_checkpointer import Gate, settled, tree, until


@pytest.mark.asyncio
@pytest.mark.parametrize("step", [0, 7, 99_999_999, 123_456_789_012])
async def test_names_lead_back_to_steps(step: int) -> None:
    storage = MemoryStorage()
    async with Checkpointer(storage) as checkpoints:
        await checkpoints.save(step, tree(step))
    assert list(storage.checkpoints) == [name_of(step)]
    assert await Checkpointer(storage).steps() == [step]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "name", ["step-7", "step-000000007", "step-0000000x", "step--0000007", "a/step-00000007", "step-00000007.old", ""]
)
async def test_other_names_are_not_steps(name: str) -> None:
    storage = MemoryStorage()
    await aiostage.save(tree(7), (storage, "other"))
    storage.checkpoints[name] = storage.checkpoints["other"]
    assert await Checkpointer(storage).steps() == []


def test_names() -> None:
    assert name_of(100) == "step-00000100"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("keep", "newest", "removed"),
    [(None, 50, []), (9, 50, []), (5, 50, []), (2, 50, [10, 20, 30]), (1, 50, [10, 20, 30, 40]), (2, 10, [20, 30])],
)
async def test_the_last_steps_stay_and_the_one_saved_last(keep: int | None, newest: int, removed: list[int]) -> None:
    storage, steps = MemoryStorage(), [30, 10, 50, 20, 40]
    async with Checkpointer(storage) as checkpoints:
        for step in steps:
            if step != newest:
                await (await checkpoints.save(step, tree(step))).committed()
    async with Checkpointer(storage, keep=keep) as checkpoints:
        await checkpoints.save(newest, tree(newest))
    assert await Checkpointer(storage).steps() == sorted({*steps} - {*removed})


@pytest.mark.asyncio
async def test_milestones_stay() -> None:
    storage = MemoryStorage()
    async with Checkpointer(storage, keep=1, keep_also=lambda step: step % 20 == 0) as checkpoints:
        for step in range(0, 60, 10):
            await (await checkpoints.save(step, tree(step))).committed()
    assert await Checkpointer(storage).steps() == [0, 20, 40, 50]


@pytest.mark.asyncio
async def test_old_checkpoints_go_when_a_new_one_is_committed() -> None:
    storage = MemoryStorage()
    gate = Gate(storage)
    gate.open.set()
    async with Checkpointer(storage, keep=2, keep_also=lambda step: step % 100 == 0) as checkpoints:
        for step in range(100, 160, 10):
            await checkpoints.save(step, tree(step))
        await settled(checkpoints)
        assert await checkpoints.steps() == [100, 140, 150]
        # Not before.
        gate.open = type(gate.open)()
        await checkpoints.save(160, tree(160))
        await until(lambda: gate.waiting == 7)
        assert await checkpoints.steps() == [100, 140, 150]
        gate.open.set()
    assert await checkpoints.steps() == [100, 150, 160]


@pytest.mark.asyncio
async def test_what_is_not_a_step_is_left_alone(tmp_path: Path) -> None:
    for name in ("step-1", "best", "step-00000001"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000002").write_text("text")
    async with Checkpointer(tmp_path, keep=1) as checkpoints:
        for step in (5, 6):
            await checkpoints.save(step, tree(step))
    assert await checkpoints.steps() == [6]
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"step-1", "best", "step-00000001", "step-00000002", "step-00000006"}


@pytest.mark.asyncio
async def test_after_going_back_the_newest_stays() -> None:
    storage = MemoryStorage()
    async with Checkpointer(storage) as checkpoints:
        for step in (1, 2, 3):
            await checkpoints.save(step * 100, tree(step))
    async with Checkpointer(storage, keep=2) as checkpoints:
        await checkpoints.save(110, tree(0))
        await settled(checkpoints)
        assert await checkpoints.steps() == [110, 200, 300]
        await checkpoints.delete(200)
        await checkpoints.delete(300)
        await checkpoints.save(120, tree(0))
        await checkpoints.save(130, tree(0))
    assert await checkpoints.steps() == [120, 130]


@pytest.mark.asyncio
async def test_saves_that_end_in_another_order() -> None:
    storage = MemoryStorage()
    gate = Gate(storage)

    async def hold_back_the_first(operation: str, name: str) -> None:
        if name.endswith("1"):
            await gate.pass_through(operation, name)

    storage.before = hold_back_the_first
    async with Checkpointer(storage, keep=1, max_in_flight=2) as checkpoints:
        first = await checkpoints.save(1, tree(1))
        await (await checkpoints.save(2, tree(2))).committed()
        assert not first.done()
        gate.open.set()
        await first.committed()
    assert await checkpoints.steps() == [2]


@pytest.mark.asyncio
@pytest.mark.parametrize("incremental", [False, True])
async def test_saves_do_not_wait_for_removals(incremental: bool) -> None:
    storage = MemoryStorage()
    removing, may_go_on, removals = anyio.Event(), anyio.Event(), []

    async def wait(operation: str, name: str) -> None:
        if operation == "delete":
            removals.append(name)
            removing.set()
            await may_go_on.wait()

    storage.before = wait
    async with Checkpointer(storage, keep=1, max_in_flight=1, incremental=incremental) as checkpoints:
        for step in range(2):
            await (await checkpoints.save(step, tree(step))).committed()
        await removing.wait()
        try:
            for step in range(2, 6):
                await (await checkpoints.save(step, tree(step))).committed()
            assert removals == [name_of(0)], "one at a time"
            assert set(await checkpoints.steps()) >= {1, 2, 3, 4, 5}
        finally:
            may_go_on.set()
    assert await checkpoints.steps() == [5], "the one that waited has done the work of the others"
    assert torch.equal((await aiostage.load((storage, name_of(5))))["weights"], tree(5)["weights"])


@pytest.mark.asyncio
async def test_a_removal_that_is_abandoned_leaves_later_ones_their_turn() -> None:
    storage = MemoryStorage()
    removing = anyio.Event()

    async def wait(operation: str, name: str) -> None:
        if operation == "delete":
            removing.set()
            await anyio.sleep_forever()

    storage.before = wait
    with anyio.CancelScope() as scope:
        async with Checkpointer(storage, keep=1) as checkpoints:
            for step in range(4):
                await (await checkpoints.save(step, tree(step))).committed()
            await removing.wait()
            scope.cancel()
            await anyio.sleep_forever()
    assert not checkpoints._removal_waits
    storage.before = None
    async with Checkpointer(storage, keep=1) as again:
        await again.save(4, tree(4))
    assert await again.steps() == [4]


@pytest.mark.asyncio
async def test_a_removal_that_fails_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    storage = MemoryStorage()

    async def refuse(operation: str, name: str) -> None:
        if operation == "delete":
            raise PermissionError(13, "Permission denied", name)

    storage.before = refuse
    async with Checkpointer(storage, keep=1) as checkpoints:
        for step in range(3):
            # The save is complete all the same.
            await (await checkpoints.save(step, tree(step))).committed()
        await until(lambda: "Permission denied" in caplog.text)
        assert await checkpoints.steps() == [0, 1, 2]
        storage.before = None
        await checkpoints.save(3, tree(3))
    assert await checkpoints.steps() == [3]
    storage.before = refuse

    async def run() -> None:
        async with Checkpointer(storage, keep=1) as checkpoints:
            await checkpoints.save(4, tree(4))

    with pytest.raises(PermissionError):
        await run()
    assert await checkpoints.steps() == [3, 4]


@pytest.mark.asyncio
async def test_an_error_of_the_predicate_is_reported() -> None:
    async def run() -> None:
        async with Checkpointer(MemoryStorage(), keep=1, keep_also=lambda step: bool(1 // step)) as checkpoints:
            for step in range(2):
                await checkpoints.save(step, tree(step))

    with pytest.raises(ZeroDivisionError):
        await run()


@pytest.mark.asyncio
@pytest.mark.parametrize("incremental", [False, True])
async def test_what_a_step_links_to_is_never_removed(tmp_path: Path, incremental: bool) -> None:
    async with aiostage.Checkpointer(tmp_path / "archive") as checkpoints:
        await checkpoints.save(1, {"a": torch.arange(300_000)})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step-00000001").symlink_to("../archive/step-00000001")
    async with aiostage.Checkpointer(tmp_path / "run", keep=1, incremental=incremental) as checkpoints:
        assert await checkpoints.latest() == 1
        for step in (2, 3, 4):
            await checkpoints.save(step, {"a": torch.arange(300_000) + step})
    assert await checkpoints.steps() == [4]
    assert not (tmp_path / "run" / "step-00000001").is_symlink()
    loaded = await aiostage.load(tmp_path / "archive" / "step-00000001")
    assert torch.equal(loaded["a"], torch.arange(300_000))
