"""Saves that write while they copy, and saves of more than the budget for host memory."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import aiostage
from aiostage import AsyncStager, HostMemoryError, StagingError, StagingOptions, TornSnapshotError
from aiostage._capture import plan
from aiostage._copy import staging, window
from aiostage._copy.host import HostCopy
from aiostage._loop.workers import Job
from aiostage.checkpoint import writer
from aiostage.observe import observing
from aiostage.testing import at_every_await
from aiostage.testing.simulator import SimulatedAccelerator
from tests.checkpoint.comparing import assert_same
from tests.checkpoint.leftovers import nothing_left
from tests.checkpoint.memory_storage import MemoryStorage
from tests.checkpoint.programs import output_of
from tests.checkpoint.trees import trees
from tests.patience import seconds
from tests.spans import Recorder

KIB = 1 << 10
BATCH = 64 * KIB
PART = 16 * KIB
BUDGET = 5 * (BATCH + 4 * KIB)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make batches, chunks and parts small, so that a small tree has many."""
    monkeypatch.setattr(plan, "BATCH_BYTES", BATCH)
    monkeypatch.setattr(window, "BATCH_BYTES", BATCH)
    monkeypatch.setattr(writer, "PART_BYTES", PART)


def large(count: int = 40) -> dict[str, Any]:
    """Return a tree several times the budget: of all sizes, tied, cut in two by the ends of chunks, turned."""
    tree: dict[str, Any] = {f"w{n}": torch.full((7_000 + 13 * n,), float(n)) for n in range(count)}
    tree["bytes"] = torch.arange(70_001, dtype=torch.int64).to(torch.uint8)
    tree["doubles"] = torch.arange(9_999, dtype=torch.float64)
    tree["tied"] = tree["w3"]
    tree["part"] = tree["w5"][100:200]
    tree["turned"] = torch.arange(12_000.0).view(120, 100).t()
    return tree | {"step": 7, "nested": [{"scalar": torch.tensor(3)}]}


def budgeted(nbytes: int = BUDGET) -> AsyncStager:
    return AsyncStager(StagingOptions(max_host_bytes=nbytes))


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage()


def third_copy_waits(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let the third batch and later ones be copied only when the event that is returned is set."""
    run, started, written = HostCopy.run, iter(range(1000)), threading.Event()

    def held(self: HostCopy, job: Job, *cold: Any) -> bool:
        if next(started) >= 2:
            assert written.wait(seconds(30))
        return run(self, job, *cold)

    monkeypatch.setattr(HostCopy, "run", held)
    return written


@pytest.mark.asyncio
@pytest.mark.usefixtures("small")
class TestStreaming:
    async def test_parts_leave_while_later_leaves_are_copied(
        self, storage: MemoryStorage, monkeypatch: pytest.MonkeyPatch
    ):
        """The third batch is not copied before the third part is written: a save that staged first would never end."""
        written = third_copy_waits(monkeypatch)

        async def before(operation: str, name: str) -> None:
            if storage.operations["part"] == 3:
                written.set()

        storage.before = before
        await aiostage.save(large(), (storage, "a"))
        assert_same(large(), await aiostage.load((storage, "a")))

    async def test_what_changes_while_it_is_written_is_never_committed(
        self, storage: MemoryStorage, monkeypatch: pytest.MonkeyPatch
    ):
        tree, written = large(), third_copy_waits(monkeypatch)

        async def before(operation: str, name: str) -> None:
            if storage.operations["part"] == 3:
                tree["w39"].add_(1)
                written.set()

        storage.before = before
        with pytest.raises(TornSnapshotError, match="w39"):
            await aiostage.save(tree, (storage, "a"))
        assert not storage.checkpoints
        assert not storage.under_way

    async def test_a_file_is_the_memory_itself(self, storage: MemoryStorage):
        """Only the part with the header in it is put together."""
        tree = {
            str(n): torch.full((5_000,), n, dtype=dtype) for n, dtype in enumerate([torch.uint8, torch.float32] * 9)
        }
        recorder = Recorder()
        with observing(recorder):
            await aiostage.save(tree, (storage, "a"))
        assert recorder.names.count("gather") == 1
        assert recorder.names.count("digest") == storage.operations["part"] > 10

    async def test_a_snapshot_has_several_consumers(self, storage: MemoryStorage):
        other = MemoryStorage()
        async with AsyncStager() as stager:
            async with stager.snapshot(large()) as snapshot, anyio.create_task_group() as group:
                group.start_soon(aiostage.save, snapshot, (storage, "a"))
                group.start_soon(aiostage.save, snapshot, (other, "b"))
                copy = await snapshot.result()
                assert stager.statistics().leases == 1
            assert stager.statistics().leases == 1
            assert_same(large(), copy)
            del copy
            assert stager.statistics().leases == 0
        assert storage.checkpoints["a"].keys() == other.checkpoints["b"].keys()
        assert_same(large(), await aiostage.load((other, "b")))


@pytest.mark.asyncio
@pytest.mark.usefixtures("small")
class TestBudget:
    async def test_more_than_the_budget(self, storage: MemoryStorage):
        tree = large()
        with nothing_left():
            async with budgeted() as stager:
                for name in "ab":
                    info = await aiostage.save(tree, (storage, name), stager=stager)
                    assert info.nbytes > 3 * BUDGET
                    assert stager.statistics().leases == 0
                    assert stager.statistics().pageable_bytes <= BUDGET
                assert stager.statistics().stagings == 2
        assert_same(tree, await aiostage.load((storage, "a")))
        assert storage.checkpoints["a"] == storage.checkpoints["b"]

    async def test_files_are_the_same_as_without_a_budget(self, storage: MemoryStorage):
        async with budgeted() as stager:
            await aiostage.save(large(), (storage, "a"), stager=stager, max_shard_bytes=300 * KIB)
        await aiostage.save(large(), (storage, "b"), max_shard_bytes=300 * KIB)
        assert storage.checkpoints["a"] == storage.checkpoints["b"]

    async def test_captured_when_the_last_byte_has_been_copied(self, storage: MemoryStorage):
        """The storage holds the save up, and with it the capture, until the source may change."""
        tree = large()
        goes_on = anyio.Event()
        stalled = anyio.Event()

        async def before(operation: str, name: str) -> None:
            if storage.operations["part"] == 20:
                stalled.set()
                await goes_on.wait()

        storage.before = before
        async with budgeted() as stager, stager.snapshot(tree, streamed=True) as snapshot:
            saving = asyncio.ensure_future(aiostage.save(snapshot, (storage, "a")))
            capturing = asyncio.ensure_future(snapshot.captured())
            await stalled.wait()
            # As much as fits has been copied, and the rest waits.
            while stager.statistics().waiting == 0:
                await asyncio.sleep(0)
            assert not capturing.done()
            goes_on.set()
            await capturing
            tree["w0"].zero_()
            await saving
        assert_same(large(), await aiostage.load((storage, "a")))

    async def test_saves_share_a_budget(self, storage: MemoryStorage):
        async with budgeted(3 * (BATCH + 4 * KIB)) as stager, anyio.create_task_group() as group:
            for number in range(6):
                group.start_soon(
                    lambda number: aiostage.save(large() | {"step": number}, (storage, str(number)), stager=stager),
                    number,
                )
        for number in range(6):
            assert_same(large() | {"step": number}, await aiostage.load((storage, str(number))))

    async def test_a_storage_that_fails(self, storage: MemoryStorage):
        async def before(operation: str, name: str) -> None:
            # Files can still be removed from a full disk.
            if operation == "part" and storage.operations["part"] == 20:
                raise OSError("the disk is full")

        storage.before = before
        async with budgeted() as stager:
            with pytest.raises(OSError, match="the disk is full"):
                await aiostage.save(large(), (storage, "a"), stager=stager)
            assert not storage.checkpoints
            assert not storage.under_way
            storage.before = None
            await aiostage.save(large(), (storage, "a"), stager=stager)

    async def test_a_source_that_changes(self, storage: MemoryStorage):
        tree = large()

        async def before(operation: str, name: str) -> None:
            if storage.operations["part"] == 20:
                tree["w39"].add_(1)

        storage.before = before
        async with budgeted() as stager:
            with pytest.raises(TornSnapshotError, match="w39"):
                await aiostage.save(tree, (storage, "a"), stager=stager)
        assert not storage.checkpoints

    async def test_a_stager_that_closes(self, storage: MemoryStorage):
        stager = budgeted()

        async def before(operation: str, name: str) -> None:
            if storage.operations["part"] == 20:
                await stager.aclose()

        storage.before = before
        with nothing_left(), pytest.raises(aiostage.StagerClosedError):
            await aiostage.save(large(), (storage, "a"), stager=stager)
        assert not storage.checkpoints

    async def test_cancelled_at_every_await(self, storage: MemoryStorage):
        tree = large(6)
        rounds = 0
        with nothing_left():
            async with budgeted(3 * (BATCH + 4 * KIB)) as stager:

                async def save() -> None:
                    await aiostage.save(tree, (storage, "a"), stager=stager)

                async for _ in at_every_await(save):
                    assert not storage.under_way
                    if storage.checkpoints:
                        # What is committed is not taken back.
                        break
                    rounds += 1
                assert stager.statistics().leases == 0
        assert rounds > 30

    async def test_cancelled_after_any_turn_of_the_loop(self, storage: MemoryStorage):
        """Also where the awaits are those of the copying beside."""
        tree = large(6)
        async with budgeted(3 * (BATCH + 4 * KIB)) as stager:
            for turns in range(0, 200, 3):
                task = asyncio.ensure_future(aiostage.save(tree, (storage, "a"), stager=stager))
                for _ in range(turns):
                    await asyncio.sleep(0)
                    if task.done():
                        break
                task.cancel()
                await asyncio.wait([task])
                if not task.cancelled():
                    await task
                if storage.checkpoints:
                    # What is committed is not taken back.
                    break
                assert not storage.under_way
                del task
                assert stager.statistics().leases == 0
            await aiostage.save(tree, (storage, "b"), stager=stager)
        assert_same(tree, await aiostage.load((storage, "b")))

    async def test_what_cannot_pass(self, storage: MemoryStorage):
        turned = large() | {"wide": torch.zeros(200, 200, dtype=torch.float64).t()}
        async with budgeted() as stager:
            with pytest.raises(HostMemoryError, match="not contiguous"):
                await aiostage.save(turned, (storage, "a"), stager=stager)
            with pytest.raises(HostMemoryError, match="max_host_bytes"):
                await stager.stage(large())
            async with stager.snapshot(large(), streamed=True) as snapshot:
                with pytest.raises(HostMemoryError, match="only pass through"):
                    await snapshot.result()
                with pytest.raises(HostMemoryError, match="only pass through"):
                    async for _ in snapshot:
                        pass
                with pytest.raises(StagingError, match="wait for memory"):
                    snapshot.order_before()
                await aiostage.save(snapshot, (storage, "a"))
                with pytest.raises(StagingError, match="one consumer"):
                    await aiostage.save(snapshot, (storage, "b"))
            assert stager.statistics().leases == 0
        assert list(storage.checkpoints) == ["a"]
        assert not storage.under_way

    async def test_a_batch_larger_than_the_budget(self, storage: MemoryStorage):
        async with budgeted(BATCH) as stager:
            with pytest.raises(HostMemoryError, match="max_host_bytes"):
                await aiostage.save(large(), (storage, "a"), stager=stager)

    async def test_two_that_fit_do_not_pass_through_chunks(self, storage: MemoryStorage):
        async with budgeted(1 << 30) as stager, stager.snapshot(large(), streamed=True) as snapshot:
            assert_same(large(), await snapshot.result())

    async def test_from_devices(self, storage: MemoryStorage):
        with SimulatedAccelerator(seed=3, spontaneous=True) as accelerator:
            tree = {f"w{n}": accelerator.to_device(torch.full((9_000,), float(n))) for n in range(20)}
            tree |= {f"h{n}": torch.full((9_000,), float(n)) for n in range(20)}
            tree |= {f"b{n}": accelerator.to_device(torch.full((33,), n, dtype=torch.uint8)) for n in range(20)}
            accelerator.synchronize()
            async with AsyncStager(StagingOptions(max_host_bytes=BUDGET), backend=accelerator) as stager:
                await aiostage.save(tree, (storage, "a"), stager=stager)
                assert stager.statistics().leases == 0
                assert stager.statistics().pinned_bytes > 0
            found = await aiostage.load((storage, "a"))
            assert all(torch.equal(found[name], tensor.cpu()) for name, tensor in tree.items())


@pytest.mark.anyio
@pytest.mark.usefixtures("small")
async def test_on_trio(storage: MemoryStorage) -> None:
    async with budgeted() as stager:
        await aiostage.save(large(), (storage, "a"), stager=stager)
    assert_same(large(), await aiostage.load((storage, "a")))


@pytest.fixture(scope="module")
def shrunk() -> Iterator[None]:
    """As small, for examples that hypothesis makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "BATCH_BYTES", 512)
        patch.setattr(window, "BATCH_BYTES", 512)
        patch.setattr(writer, "PART_BYTES", 4 * KIB)
        yield


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(tree=trees())
@pytest.mark.usefixtures("shrunk")
def test_any_tree_passes_or_is_refused(tree: Any) -> None:
    async def save() -> None:
        storage = MemoryStorage()
        # Larger than any budget that it passes through: it passes.
        tree_of_chunks = {"tree": tree, "filling": [torch.full((100,), n) for n in range(40)]}
        async with AsyncStager(StagingOptions(max_host_bytes=6 * 4 * KIB)) as stager:
            try:
                await aiostage.save(tree_of_chunks, (storage, "a"), stager=stager)
            except HostMemoryError:
                assert not storage.checkpoints
            else:
                assert_same(tree_of_chunks, await aiostage.load((storage, "a")))
            assert stager.statistics().leases == 0

    asyncio.run(save())


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_memory_stays_within_the_budget(tmp_path: Path) -> None:
    found = json.loads(output_of("tests.checkpoint.measuring", str(tmp_path / "checkpoint")))
    assert found["nbytes"] > 3 * found["budget"]
    assert found["peak"] <= found["budget"] + 64 * (1 << 20)


@pytest.mark.asyncio
async def test_a_tree_that_is_being_built_when_the_copy_fails_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = staging.Staging._rebuilding
    ended: list[staging.State] = []

    # Ended here and not by a copy that really fails: a writer that has no tree yet makes no room for the next one.
    def ended_meanwhile(self: staging.Staging[Any]) -> Iterator[None]:
        yield
        self.move(staging.State.FAILED, HostMemoryError("there is none for the rest"))
        self.staged.clear()
        ended.append(self.state)
        yield from build(self)

    monkeypatch.setattr(staging.Staging, "_rebuilding", ended_meanwhile)
    shared = torch.zeros(1 << 20)
    tree = {"a": torch.zeros(1 << 20), "b": shared, "c": shared}
    async with AsyncStager(StagingOptions(max_host_bytes=1 << 20)) as stager:
        # The memory of two that are tied does not fit either, which may be found out first.
        with pytest.raises(HostMemoryError):
            await aiostage.save(tree, tmp_path / "checkpoint", stager=stager)
        assert stager.statistics().leases == 0
    assert set(ended) <= {staging.State.FAILED}
    assert list(tmp_path.iterdir()) == []
