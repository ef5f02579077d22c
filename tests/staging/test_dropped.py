"""Stagers that are not closed."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest
import torch

from aiostage import AsyncStager, StagingOptions, TornSnapshotError
from aiostage.testing import SimulatedAccelerator
from tests.patience import seconds

MIB = 2**20
SOURCE = {"w": torch.arange(4.0 * MIB)}


class Registering(SimulatedAccelerator):
    """Notes which threads unregister."""

    def __init__(self) -> None:
        super().__init__(seed=1, spontaneous=True)
        self.threads: list[int] = []

    def unregister(self, address: int, device: torch.device) -> None:
        super().unregister(address, device)
        self.threads.append(threading.get_ident())


class Watched:
    """A lock that notes which threads take it."""

    def __init__(self, lock: threading.Lock) -> None:
        self.lock = lock
        self.threads: list[int] = []

    def __enter__(self) -> None:
        self.threads.append(threading.get_ident())
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


@contextmanager
def warned(times: int) -> Iterator[None]:
    # What other tests have left would be found, too.
    gc.collect()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
        gc.collect()
    ours = [found for found in caught if "AsyncStager" in str(found.message)]
    assert [(found.category, "never closed" in str(found.message)) for found in ours] == [
        (ResourceWarning, True)
    ] * times
    # They refer to what they warn of.
    caught.clear()
    ours.clear()


def is_mapped(address: int) -> bool:
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(start, 16) <= address < int(stop, 16) for start, stop in ranges)


async def until_unregistered(accelerator: Registering) -> None:
    with anyio.fail_after(seconds(20)):
        while not accelerator.threads:
            await anyio.sleep(0.001)
    assert threading.get_ident() not in accelerator.threads


@pytest.mark.asyncio
class TestDropped:
    async def test_one_that_has_staged_nothing_says_nothing(self):
        stager = AsyncStager()
        await stager.stage({"step": 1})
        with warned(0):
            del stager

    async def test_a_closed_one_says_nothing(self):
        stager = AsyncStager()
        await stager.stage(SOURCE)
        with warned(0):
            await stager.aclose()
            del stager

    @pytest.mark.parametrize("use_shared_memory", [False, True])
    async def test_it_warns_and_a_thread_gives_its_memory_back(self, use_shared_memory: bool):
        stager = AsyncStager(StagingOptions(use_shared_memory=use_shared_memory))
        address = (await stager.stage(SOURCE))["w"].data_ptr()
        assert is_mapped(address)
        with warned(1):
            del stager
        with anyio.fail_after(seconds(20)):
            while is_mapped(address):
                await anyio.sleep(0.001)

    async def test_it_takes_no_lock_where_it_is_dropped(self):
        stager = AsyncStager()
        await stager.stage(SOURCE)
        # The collector may drop it in any code, also in code that holds this lock.
        pool = stager._resources.pool
        lock = pool._lock = Watched(pool._lock)  # type: ignore[assignment]
        with warned(1):
            del stager
        with anyio.fail_after(seconds(20)):
            while not lock.threads:
                await anyio.sleep(0.001)
        assert threading.get_ident() not in lock.threads

    async def test_a_thread_unregisters_its_memory(self):
        with Registering() as accelerator:
            stager = AsyncStager(backend=accelerator)
            staged = await stager.stage({"w": accelerator.empty(MIB)})
            del staged
            with warned(1):
                del stager
            await until_unregistered(accelerator)

    async def test_what_it_has_staged_outlives_it(self):
        with Registering() as accelerator:
            stager = AsyncStager(backend=accelerator)
            staged = await stager.stage({"w": accelerator.to_device(torch.full((MIB,), 7.0))})
            with warned(1):
                del stager
            assert torch.equal(staged["w"], torch.full((MIB,), 7.0))
            assert not accelerator.threads
            del staged
            await until_unregistered(accelerator)

    async def test_a_snapshot_is_as_good_as_the_stager(self):
        with warned(1):
            snapshot = AsyncStager().snapshot(SOURCE)
            async with snapshot:
                gc.collect()
                staged = await snapshot.result()
                assert torch.equal(staged["w"], SOURCE["w"])
            del snapshot


@pytest.mark.asyncio
async def test_a_failed_staging_lets_go_of_its_leaves_in_steps() -> None:
    # Destructors of 50,000 leaves take 20 ms in one piece.
    count = 4000
    source = {str(number): torch.ones(1) for number in range(count)}
    alive: list[weakref.ref[torch.Tensor]] = []
    most = before = 0

    async def watch() -> None:
        nonlocal most, before
        while True:
            gone = sum(reference() is None for reference in alive)
            most, before = max(most, gone - before), gone
            await anyio.lowlevel.checkpoint()

    async def change_and_wait(stager: AsyncStager, group: anyio.abc.TaskGroup) -> None:
        async with stager.snapshot(source) as snapshot:
            async for leaf in snapshot:
                alive.append(weakref.ref(leaf.tensor))
                del leaf
                if len(alive) == count - 1:
                    break
            group.start_soon(watch)
            await anyio.lowlevel.checkpoint()
            source["7"].add_(1)
            await snapshot.result()

    async with AsyncStager(StagingOptions(max_loop_hold=1e-9)) as stager, anyio.create_task_group() as group:
        with pytest.raises(TornSnapshotError):
            await change_and_wait(stager, group)
        assert sum(reference() is None for reference in alive) == len(alive)
        most = max(most, len(alive) - before)
        group.cancel_scope.cancel()
    assert most < count / 4
