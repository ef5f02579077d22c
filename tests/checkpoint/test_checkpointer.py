from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
import trio
from anyio.lowlevel import checkpoint

import aiostage
from aiostage import (
    AsyncStager,
    Checkpointer,
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CheckpointStager,
    StagingOptions,
    TornSnapshotError,
)
from aiostage.testing import at_every_await
from tests.checkpoint.comparing import assert_same
from tests.checkpoint.leftovers import nothing_left
from tests.checkpoint.memory_storage import MemoryStorage
from tests.patience import seconds
from tests.staging.holding import copies_held, until_copies_wait


def tree(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((100,), float(step)), "turned": torch.full((3, 2), step).t()}


class Gate:
    """Holds commits back until they are let through."""

    def __init__(self, storage: MemoryStorage, operation: str = "commit") -> None:
        self.operation = operation
        self.open = anyio.Event()
        self.waiting = 0
        self.refuse = False
        storage.before = self.pass_through

    async def pass_through(self, operation: str, name: str) -> None:
        if operation == self.operation:
            self.waiting += 1
            await self.open.wait()
            if self.refuse:
                raise OSError(28, "No space left on device", name)


@contextmanager
def without_collector() -> Iterator[None]:
    """Memory has to come back at once, not when the collector comes."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def turns(count: int = 300) -> None:
    for _ in range(count):
        await checkpoint()


async def until(holds: Callable[[], bool]) -> None:
    with anyio.fail_after(seconds(10)):
        while not holds():
            await anyio.sleep(0.001)


async def settled(checkpoints: Checkpointer) -> None:
    """Wait until every save has ended, and every removal after one."""
    await until(lambda: not checkpoints._tasks and not checkpoints._removing.locked())


class Copier(CheckpointStager):
    """A stager of the user's own."""

    def __init__(self) -> None:
        self.closed = False

    async def stage(self, state_dict: Any) -> Any:
        await checkpoint()
        return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state_dict.items()}

    async def aclose(self) -> None:
        self.closed = True


@pytest.mark.asyncio
async def test_save_and_restore(tmp_path: Path) -> None:
    async def run() -> None:
        async with Checkpointer(tmp_path / "run") as checkpoints:
            assert await checkpoints.latest() is None
            handle = await checkpoints.save(7, tree(7))
            assert handle.step == 7
            info = await handle.committed()
            assert handle.done()
            assert info.location == str(tmp_path / "run" / "step-00000007")
            assert 0 < info.captured <= info.committed
            await checkpoints.save(12, tree(12))
        assert await checkpoints.steps() == [7, 12]
        assert await checkpoints.latest() == 12
        assert_same(tree(12), await checkpoints.restore())
        assert_same(tree(7), await checkpoints.restore(step=7))
        live = tree(0)
        assert await checkpoints.restore(live) is live
        assert_same(tree(12), live)
        assert_same(tree(12), await aiostage.load(tmp_path / "run" / "step-00000012"))

    with nothing_left():
        await run()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step-00000007", "step-00000012"]


@pytest.mark.anyio
async def test_on_trio(tmp_path: Path) -> None:
    async with Checkpointer(tmp_path, keep=2, max_in_flight=2) as checkpoints:
        for step in range(5):
            await checkpoints.save(step, tree(step))
    assert await checkpoints.steps() == [3, 4]
    assert_same(tree(4), await checkpoints.restore())


@pytest.mark.anyio
async def test_abandoned_on_trio() -> None:
    storage = MemoryStorage()
    gate = Gate(storage)
    with anyio.CancelScope() as scope:
        async with Checkpointer(storage) as checkpoints:
            await checkpoints.save(1, tree(1))
            await until(lambda: gate.waiting == 1)
            scope.cancel()
    assert (storage.checkpoints, storage.under_way) == ({}, [])


@pytest.mark.asyncio
async def test_the_source_may_change_once_captured() -> None:
    storage = MemoryStorage()
    gate = Gate(storage, "write")
    for stager in (None, Copier()):
        async with Checkpointer(storage, stager) as checkpoints:
            source = tree(1)
            handle = await checkpoints.save(1, source)
            source["weights"].zero_()
            source["step"] = 2
            assert not handle.done()
            gate.open.set()
        assert_same(tree(1), await checkpoints.restore())
        storage.checkpoints.clear()
        gate.open = anyio.Event()
    assert isinstance(stager, Copier)
    assert not stager.closed


@pytest.mark.asyncio
@pytest.mark.parametrize("incremental", [False, True])
async def test_a_snapshot_that_others_use_too(incremental: bool) -> None:
    storage = MemoryStorage()
    gate = Gate(storage, "write")
    async with AsyncStager() as stager, Checkpointer(storage, stager, incremental=incremental) as checkpoints:
        source = tree(1)
        async with stager.snapshot(source) as snapshot:
            handle = await checkpoints.save(1, snapshot)
            staged = await snapshot.result()
        source["weights"].zero_()
        # No second copy.
        assert stager.statistics().stagings == 1
        assert not handle.done()
        gate.open.set()
        await handle.committed()
        assert_same(tree(1), staged)
    assert_same(tree(1), await checkpoints.restore())


@pytest.mark.asyncio
async def test_a_source_that_changes_before_is_torn() -> None:
    async with AsyncStager() as stager, Checkpointer(MemoryStorage(), stager) as checkpoints:
        source = tree(1)
        # Before its copy has run, however long the machine is busy with others.
        with copies_held(stager) as release:
            saving = asyncio.create_task(checkpoints.save(1, source))
            await until_copies_wait(stager)
            source["weights"].add_(1)
            release.set()
            with pytest.raises(TornSnapshotError, match="weights"):
                await saving
    # The error was reported already, so leaving the block does not raise it again.
    assert await checkpoints.steps() == []


@pytest.mark.asyncio
@pytest.mark.parametrize("limit", [1, 2, 3])
async def test_overlapping_saves_are_bounded(limit: int) -> None:
    storage = MemoryStorage()
    gate = Gate(storage)
    async with AsyncStager() as stager, Checkpointer(storage, stager, max_in_flight=limit) as checkpoints:
        saves = [asyncio.create_task(checkpoints.save(step, tree(step))) for step in range(6)]
        await until(lambda: gate.waiting == limit)
        await turns()
        assert gate.waiting == limit
        assert sum(save.done() for save in saves) == limit
        # One more waits before it copies anything.
        assert stager.statistics().leases == limit
        assert len(storage.under_way) == limit
        gate.open.set()
        await asyncio.gather(*saves)
    assert storage.most_pending == limit
    assert await checkpoints.steps() == list(range(6))


@pytest.mark.asyncio
@pytest.mark.parametrize("incremental", [False, True])
async def test_more_than_fits_the_budget(incremental: bool) -> None:
    storage = MemoryStorage()
    options = StagingOptions(max_host_bytes=40 << 20)
    async with AsyncStager(options) as stager, Checkpointer(storage, stager, incremental=incremental) as checkpoints:
        source = {f"p{n}": torch.full((1 << 20,), float(n)) for n in range(16)}
        expected = {name: tensor.clone() for name, tensor in source.items()}
        for step in range(2):
            handle = await checkpoints.save(step, source)
            # Captured, so it may change.
            for tensor in source.values():
                tensor.add_(1)
            await handle.committed()
            assert_same(expected, await checkpoints.restore(step=step))
            for tensor in expected.values():
                tensor.add_(1)
        # The storage refuses in the middle, when not everything is captured.
        gate = Gate(storage, "write")
        saving = asyncio.create_task(checkpoints.save(2, source))
        await until(lambda: gate.waiting == 1)
        await turns()
        # What has changed is copied once more, which makes room for the rest.
        assert incremental or not saving.done()
        gate.refuse = True
        with without_collector():
            gate.open.set()
            with pytest.raises(OSError, match="No space left"):
                await (await saving).committed()
            storage.before = None
            with anyio.fail_after(seconds(10)):
                await checkpoints.save(3, source)
    assert storage.under_way == []
    assert_same(expected, await checkpoints.restore())


@pytest.mark.asyncio
async def test_the_handle_reports_a_failing_storage() -> None:
    storage = MemoryStorage()

    async def refuse(operation: str, name: str) -> None:
        if operation == "commit":
            raise OSError(28, "No space left on device", name)

    async with AsyncStager() as stager, Checkpointer(storage, stager) as checkpoints:
        storage.before = refuse
        with without_collector():
            handle = await checkpoints.save(1, tree(1))
            for _ in range(2):
                with pytest.raises(OSError, match="No space left"):
                    await handle.committed()
            assert "No space left" in repr(handle)
            assert stager.statistics().leases == 0
        storage.before = None
        await (await checkpoints.save(1, tree(1))).committed()
    assert await checkpoints.steps() == [1]
    assert storage.under_way == []


@pytest.mark.asyncio
async def test_the_next_save_reports_a_failed_one(caplog: pytest.LogCaptureFixture) -> None:
    storage = MemoryStorage()

    async def refuse(operation: str, name: str) -> None:
        if operation == "commit" and name == "step-00000000":
            raise OSError(28, "No space left on device", name)

    storage.before = refuse
    async with Checkpointer(storage) as checkpoints:
        await checkpoints.save(0, tree(0))
        with pytest.raises(OSError, match="No space left") as caught:
            await checkpoints.save(1, tree(1))
        assert caught.value.filename == "step-00000000"
        assert "the checkpoint of step 0 failed" in caught.value.__notes__[0]
        # Once is enough.
        await checkpoints.save(2, tree(2))
    assert set(storage.checkpoints) == {"step-00000002"}
    assert caplog.text.count("No space left") == 1


@pytest.mark.asyncio
async def test_a_failed_save_is_reported_once_to_a_waiter() -> None:
    storage = MemoryStorage()
    gate = Gate(storage)
    gate.refuse = True

    async def wait(handle: aiostage.SaveHandle) -> None:
        with pytest.raises(OSError, match="No space left"):
            await handle.committed()

    async with Checkpointer(storage) as checkpoints, anyio.create_task_group() as group:
        group.start_soon(wait, await checkpoints.save(0, tree(0)))
        await until(lambda: gate.waiting == 1)
        saving = asyncio.ensure_future(checkpoints.save(1, tree(1)))
        await turns()
        gate.open.set()
        handle = await saving
        await wait(handle)


@pytest.mark.asyncio
@pytest.mark.parametrize("failing", [1, 2])
async def test_a_failing_storage_is_reported_without_a_waiter(failing: int, caplog: pytest.LogCaptureFixture) -> None:
    storage = MemoryStorage()
    gate = Gate(storage)

    async def refuse(operation: str, name: str) -> None:
        await gate.pass_through(operation, name)
        if operation == "commit" and int(name[-1]) < failing:
            raise OSError(28, "No space left on device", name)

    storage.before = refuse

    async def run() -> None:
        async with Checkpointer(storage, max_in_flight=3) as checkpoints:
            for step in range(3):
                await checkpoints.save(step, tree(step))
            gate.open.set()

    if failing == 1:
        with pytest.raises(OSError, match="No space left"):
            await run()
    else:
        with pytest.raises(ExceptionGroup, match="2 checkpoints failed") as caught:
            await run()
        assert [error.filename for error in caught.value.exceptions] == ["step-00000000", "step-00000001"]
    assert set(storage.checkpoints) == {f"step-0000000{step}" for step in range(failing, 3)}
    assert caplog.text.count("No space left") == failing


@pytest.mark.asyncio
@pytest.mark.parametrize("count", [1, 5000])
async def test_what_no_file_can_carry_is_refused_before_save_returns(count: int) -> None:
    state: dict[str, Any] = {str(number): torch.zeros(3) for number in range(count)} | {"odd": [object()]}
    storage = MemoryStorage()
    async with Checkpointer(storage) as checkpoints:
        for step in range(3 if count > 1 else 30):
            with pytest.raises(aiostage.UnsupportedLeafError, match=r"state_dict\['odd'\]\[0\]"):
                await checkpoints.save(step, state)
    async with Checkpointer(storage, Copier(), max_in_flight=4) as checkpoints:
        for step in range(3):
            with pytest.raises(aiostage.UnsupportedLeafError, match=r"state_dict\['odd'\]\[0\]"):
                await checkpoints.save(step, state)
    assert storage.under_way == []
    assert storage.checkpoints == {}


@pytest.mark.asyncio
async def test_an_error_of_the_block_goes_first() -> None:
    storage = MemoryStorage()

    async def refuse(operation: str, name: str) -> None:
        if operation == "commit" and name == "step-00000001":
            raise OSError(28, "No space left on device", name)

    storage.before = refuse

    async def run() -> None:
        async with Checkpointer(storage, max_in_flight=2) as checkpoints:
            await checkpoints.save(1, tree(1))
            await checkpoints.save(2, tree(2))
            raise LookupError("the training has failed")

    with pytest.raises(LookupError) as caught:
        await run()
    assert "No space left" in caught.value.__notes__[0]
    # What was captured before is good.
    assert set(storage.checkpoints) == {"step-00000002"}


@pytest.mark.asyncio
async def test_save_reports_a_failing_stager() -> None:
    class Failing(Copier):
        async def stage(self, state_dict: Any) -> Any:
            await checkpoint()
            raise LookupError("no copy today")

    storage = MemoryStorage()
    async with Checkpointer(storage, Failing()) as checkpoints:
        with pytest.raises(LookupError, match="no copy today"):
            await checkpoints.save(1, tree(1))
    async with Checkpointer(storage) as checkpoints:
        with pytest.raises(aiostage.UnsupportedLeafError, match="meta"):
            await checkpoints.save(1, {"meta": torch.empty(3, device="meta")})
        # Can be copied, but not carried.
        with pytest.raises(aiostage.UnsupportedLeafError, match="object"):
            await checkpoints.save(1, {"object": object()})
        await checkpoints.save(1, tree(1))
    assert storage.under_way == []
    assert await checkpoints.steps() == [1]


@pytest.mark.asyncio
async def test_one_checkpoint_for_a_step(tmp_path: Path) -> None:
    storage = MemoryStorage()
    gate = Gate(storage)
    async with Checkpointer(storage, max_in_flight=2) as checkpoints:
        await checkpoints.save(1, tree(1))
        with pytest.raises(CheckpointExistsError, match="being saved already"):
            await checkpoints.save(1, tree(1))
        gate.open.set()
    async with Checkpointer(storage) as checkpoints:
        stagings = checkpoints._entered().stager.statistics().stagings
        for step in (1, 2):
            if step == 2:
                await (await checkpoints.save(2, tree(2))).committed()
                await settled(checkpoints)
            # Before anything is copied, and whether it was there before or not.
            with pytest.raises(CheckpointExistsError, match=r"step-0000000.: there is already .* or delete"):
                await checkpoints.save(step, tree(9))
        assert checkpoints._entered().stager.statistics().stagings == stagings + 1
        await checkpoints.delete(1)
        await checkpoints.delete(2)
        await checkpoints.delete(1)
        await checkpoints.save(1, tree(3))
    assert_same(tree(3), await checkpoints.restore())


@pytest.mark.asyncio
@pytest.mark.parametrize("faster", ["open", "copy"])
async def test_the_handle_reports_a_step_that_another_process_has_saved(faster: str) -> None:
    class Slow(Copier):
        async def stage(self, state_dict: Any) -> Any:
            await (turns() if faster == "open" else checkpoint())
            return await super().stage(state_dict)

    storage = MemoryStorage()

    async def wait(operation: str, name: str) -> None:
        if operation == "open" and faster == "copy":
            await turns()

    async with Checkpointer(storage, Slow()) as ours:
        for step in (1, 2):
            async with Checkpointer(storage) as theirs:
                await theirs.save(step, tree(step))
            storage.before = wait
            handle = await ours.save(step, tree(9))
            with pytest.raises(CheckpointExistsError, match="Save another step; or pass replace=True"):
                await handle.committed()
            storage.before = None
            assert_same(tree(step), await ours.restore(step=step))

    async def untold() -> None:
        async with Checkpointer(storage, Slow()) as ours:
            async with Checkpointer(storage) as theirs:
                await theirs.save(3, tree(3))
            await ours.save(3, tree(9))

    with pytest.raises(CheckpointExistsError):
        await untold()


@pytest.mark.asyncio
async def test_a_step_that_was_removed_and_is_still_referred_to() -> None:
    storage = MemoryStorage()
    async with Checkpointer(storage, incremental=True) as checkpoints:
        for step in (1, 2):
            await checkpoints.save(step, tree(0))
    async with Checkpointer(storage, incremental=True) as checkpoints:
        await checkpoints.delete(1)
        assert await checkpoints.steps() == [2]
        with pytest.raises(CheckpointExistsError, match="others still refer to its files"):
            await checkpoints.save(1, tree(1))


@pytest.mark.asyncio
async def test_a_step_that_another_writer_saves_meanwhile() -> None:
    storage = MemoryStorage()
    gate = Gate(storage)
    async with Checkpointer(storage) as ours, Checkpointer(storage) as theirs:
        handles = [await each.save(1, tree(number)) for number, each in enumerate((ours, theirs))]
        await until(lambda: gate.waiting == 2)
        gate.open.set()
        outcomes = await asyncio.gather(*(handle.committed() for handle in handles), return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["CheckpointExistsError", "CheckpointInfo"]
    winner = [isinstance(outcome, aiostage.CheckpointInfo) for outcome in outcomes].index(True)
    assert_same(tree(winner), await ours.restore())


@pytest.mark.asyncio
async def test_misuse(tmp_path: Path) -> None:
    for arguments in ({"keep": 0}, {"max_in_flight": 0}, {"keep_also": bool}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            Checkpointer(tmp_path, **arguments)  # type: ignore[arg-type]
    for arguments in ({"keep": "3"}, {"max_in_flight": 1.5}, {"stager": object()}):
        with pytest.raises(TypeError, match=f"{next(iter(arguments))} must be"):
            Checkpointer(tmp_path, **arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="7"):
        Checkpointer(7)
    checkpoints = Checkpointer(tmp_path)
    with pytest.raises(CheckpointError, match="not entered"):
        checkpoints.save(1, tree(1))
    async with checkpoints:
        with pytest.raises(ValueError, match="-1"):
            checkpoints.save(-1, tree(1))
        with pytest.raises(TypeError, match=r"a step must be an integer, not 1\.5"):
            checkpoints.save(1.5, tree(1))  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match="entered before"):
            await checkpoints.__aenter__()
    with pytest.raises(CheckpointError, match="left"):
        checkpoints.save(1, tree(1))


@pytest.mark.asyncio
async def test_nothing_to_restore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for step, where in ((None, "run"), (3, "run/step-00000003")):
        with pytest.raises(CheckpointNotFoundError, match=r"Save one first, .* load\(\) reads one") as caught:
            await Checkpointer("run").restore(step=step)
        assert caught.value.path == str(tmp_path / where)
    with pytest.raises(CheckpointNotFoundError) as caught:
        await Checkpointer("memory://nothing-here/run").restore()
    assert str(caught.value).startswith("memory://nothing-here/run: there is no checkpoint of a run there")
    async with Checkpointer("run") as checkpoints:
        await checkpoints.save(1, tree(1))
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint of step 3\. There is one of 1\."):
        await checkpoints.restore(step=3)


@pytest.mark.asyncio
async def test_entering_finds_out_whether_the_target_will_do(tmp_path: Path) -> None:
    storage = MemoryStorage()

    async def refuse(operation: str, name: str) -> None:
        raise PermissionError(13, "Permission denied", "somewhere")

    storage.before = refuse
    with pytest.raises(PermissionError):
        await Checkpointer(storage).__aenter__()


@pytest.mark.asyncio
async def test_a_save_that_waits_for_its_turn_when_the_block_is_left() -> None:
    storage = MemoryStorage()
    gate = Gate(storage)
    async with Checkpointer(storage) as checkpoints:
        await checkpoints.save(1, tree(1))
        late = asyncio.create_task(checkpoints.save(2, tree(2)))
        await until(lambda: gate.waiting == 1)
        await turns()
        asyncio.get_running_loop().call_later(0.05, gate.open.set)
    with pytest.raises(CheckpointError, match="left"):
        await late
    assert await checkpoints.steps() == [1]


# ------------------------------------------------------------------------------------------------------ cancellation


@pytest.mark.asyncio
async def test_entering_and_leaving_cancelled_at_every_await() -> None:
    storage = MemoryStorage()
    numbers = []

    async def enter_and_leave() -> None:
        async with Checkpointer(storage):
            pass

    with nothing_left():
        async with aclosing(at_every_await(enter_and_leave)) as rounds:
            async for number in rounds:
                numbers.append(number)
    assert len(numbers) > 1
    assert set(storage.operations) == {"clean_up", "list"}


@pytest.mark.asyncio
@pytest.mark.parametrize("own", [False, True])
async def test_save_cancelled_at_every_await(own: bool) -> None:
    storage = MemoryStorage()
    numbers = []
    async with AsyncStager() as stager, Checkpointer(storage, Copier() if own else stager) as checkpoints:

        async def save() -> None:
            await checkpoints.save(1, tree(1))

        async with aclosing(at_every_await(save)) as rounds:
            async for number in rounds:
                numbers.append(number)
                assert storage.under_way == []
                if await checkpoints.steps():
                    assert_same(tree(1), await checkpoints.restore())
                    await checkpoints.delete(1)
        assert stager.statistics().leases <= 1
    assert numbers
    assert await checkpoints.steps() == [1]


@pytest.mark.asyncio
async def test_a_save_that_waits_for_its_turn_is_cancelled() -> None:
    storage = MemoryStorage()
    gate = Gate(storage)
    async with Checkpointer(storage) as checkpoints:
        await checkpoints.save(1, tree(1))
        late = asyncio.create_task(checkpoints.save(2, tree(2)))
        await until(lambda: gate.waiting == 1)
        await turns()
        late.cancel()
        with pytest.raises(asyncio.CancelledError):
            await late
        gate.open.set()
        # The step is free again, and so is the place.
        await checkpoints.save(2, tree(2))
    assert await checkpoints.steps() == [1, 2]


@pytest.mark.asyncio
async def test_waiting_for_the_commit_may_be_cancelled() -> None:
    storage = MemoryStorage()
    gate = Gate(storage)
    async with Checkpointer(storage) as checkpoints:
        handle = await checkpoints.save(1, tree(1))
        async for _ in at_every_await(handle.committed):
            assert not handle.done()
            gate.open.set()
        assert handle.done()
    assert await checkpoints.steps() == [1]


@pytest.mark.asyncio
@pytest.mark.parametrize("where", ["open", "write", "commit", "list", "delete"])
async def test_leaving_cancelled_while_a_save_is_somewhere(where: str) -> None:
    storage = MemoryStorage()
    async with Checkpointer(storage) as checkpoints:
        await checkpoints.save(0, tree(0))
    gates: list[Gate] = []

    async def run() -> None:
        async with Checkpointer(storage, keep=1) as checkpoints:
            gates.append(Gate(storage, where))
            await checkpoints.save(1, tree(1))

    running = asyncio.create_task(run())
    await until(lambda: bool(gates) and gates[0].waiting == 1)
    await turns()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    storage.before = None
    assert storage.under_way == []
    assert await Checkpointer(storage).steps() == ([0, 1] if where in ("list", "delete") else [0])


@pytest.mark.asyncio
async def test_abandoned_saves_give_memory_back() -> None:
    storage = MemoryStorage()
    gate = Gate(storage)
    async with AsyncStager() as stager:
        with without_collector(), anyio.CancelScope() as scope:
            async with Checkpointer(storage, stager, max_in_flight=2) as checkpoints:
                for step in range(2):
                    await checkpoints.save(step, tree(step))
                await until(lambda: gate.waiting == 2)
                scope.cancel()
        assert stager.statistics().leases == 0


@pytest.mark.asyncio
async def test_an_abandoned_save_says_so() -> None:
    storage = MemoryStorage()
    gate = Gate(storage)
    handles = []

    async def run() -> None:
        async with Checkpointer(storage) as checkpoints:
            handles.append(await checkpoints.save(1, tree(1)))
            await anyio.sleep_forever()

    running = asyncio.create_task(run())
    await until(lambda: gate.waiting == 1)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    with pytest.raises(CheckpointError, match="abandoned"):
        await handles[0].committed()


@pytest.mark.asyncio
async def test_leaving_twice_cancelled() -> None:
    """The second cancellation comes while the first one is being carried out."""
    storage = MemoryStorage()
    gate = Gate(storage)

    async def run() -> None:
        async with Checkpointer(storage) as checkpoints:
            await checkpoints.save(1, tree(1))

    running = asyncio.create_task(run())
    await until(lambda: gate.waiting == 1)
    for _ in range(3):
        running.cancel()
        await checkpoint()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert (storage.checkpoints, storage.under_way) == ({}, [])


@pytest.mark.asyncio
async def test_many_saves_leave_nothing_behind(tmp_path: Path) -> None:
    async def run() -> None:
        async with AsyncStager() as stager, Checkpointer(tmp_path, stager, keep=3, max_in_flight=2) as checkpoints:
            for step in range(20):
                await checkpoints.save(step, tree(step))
            await settled(checkpoints)
            gc.collect()
            assert stager.statistics().leases == 0
            assert stager.statistics().arenas <= 3
        assert await checkpoints.steps() == [17, 18, 19]

    with nothing_left():
        await run()
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.asyncio
async def test_another_event_loop_gets_an_error_and_harms_nothing(tmp_path: Path) -> None:
    async with aiostage.Checkpointer(tmp_path) as checkpoints:

        async def elsewhere() -> None:
            with pytest.raises(aiostage.CheckpointError, match="entered on another event loop"):
                await checkpoints.save(1, tree(1))

        await asyncio.to_thread(asyncio.run, elsewhere())
        await asyncio.to_thread(trio.run, elsewhere)
        await checkpoints.save(2, tree(2))
    assert await checkpoints.steps() == [2]


@pytest.mark.asyncio
async def test_a_forgotten_await_is_warned_of_by_the_name_that_was_called(tmp_path: Path) -> None:
    async with aiostage.AsyncStager() as stager, aiostage.Checkpointer(tmp_path) as checkpoints:
        with pytest.warns(RuntimeWarning, match=r"coroutine 'Checkpointer\.save' was never awaited"):
            checkpoints.save(1, tree(1))  # type: ignore[unused-coroutine]
        with pytest.warns(RuntimeWarning, match=r"coroutine 'AsyncStager\.stage' was never awaited"):
            stager.stage(tree(1))  # type: ignore[unused-coroutine]
    assert await checkpoints.steps() == []
