from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import threading

import pytest
import torch

from aiostage._loop.workers import Workers
from aiostage._memory.arena import Arena
from aiostage._memory.pinned import Pinning
from aiostage._memory.pool import Pool
from aiostage.errors import AcceleratorUnavailableError
from aiostage.testing import at_every_await
from tests.patience import seconds

MIB = 1 << 20

DEVICE = torch.device("cuda", 1)


class Registry:
    """What of a backend registers memory: it notes what it is asked for, and refuses on demand."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.registered: dict[int, tuple[int, torch.device]] = {}
        self.calls: list[str] = []
        self.threads: set[str] = set()
        self.entered = threading.Event()
        self.leaving = threading.Event()
        self.go = threading.Event()
        self.go.set()

    def register(self, address: int, nbytes: int, device: torch.device) -> None:
        self.entered.set()
        self.go.wait(seconds(10))
        self.calls.append("register")
        self.threads.add(threading.current_thread().name)
        assert address not in self.registered
        if self.limit is not None and nbytes > self.limit:
            raise OSError(f"cannot pin {nbytes} bytes")
        self.registered[address] = (nbytes, device)

    def unregister(self, address: int, device: torch.device) -> None:
        self.leaving.set()
        self.go.wait(seconds(10))
        self.calls.append("unregister")
        self.threads.add(threading.current_thread().name)
        assert self.registered.pop(address)[1] == device


async def cancelled_in_the_driver(workers: Workers) -> tuple[Registry, Pool]:
    """Return a pool from which a lease was requested and cancelled, while the driver still registers its memory."""
    registry = Registry()
    registry.go.clear()
    pool = Pool(workers, pinning=Pinning(registry))
    task = asyncio.create_task(pool.acquire(MIB, device=DEVICE))
    while not registry.entered.is_set():
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return registry, pool


@pytest.mark.asyncio
async def test_closing_waits_for_the_driver() -> None:
    """Also with several threads, of which one has nothing left to do."""
    workers, registry = Workers(2, "test-memory"), Registry()
    pool = Pool(workers, pinning=Pinning(registry))
    lease = await pool.acquire(MIB, device=DEVICE)
    registry.go.clear()
    del lease
    pool.close()
    await asyncio.to_thread(registry.leaving.wait, seconds(10))
    # Whatever the other thread was given has been done by now.
    await workers.run(lambda: None)
    closing = asyncio.create_task(pool.aclose())
    for _ in range(3):
        await asyncio.sleep(0)
    assert not closing.done()
    registry.go.set()
    await closing
    assert registry.registered == {}
    workers.stop()


@pytest.mark.asyncio
class TestPools:
    async def test_an_arena_is_registered_once_as_a_whole_in_a_worker(self, workers: Workers):
        registry = Registry()
        pool = Pool(workers, pinning=Pinning(registry))
        lease = await pool.acquire(20 * MIB, device=DEVICE)
        assert registry.registered == {lease.arena.address: (20 * MIB, DEVICE)}
        assert lease.arena.is_warm(0, 20 * MIB), "faulted in before, by all workers"
        assert lease.arena.pinned
        assert pool.statistics().pinned_bytes == pool.statistics().pageable_bytes == 20 * MIB
        del lease
        await pool.acquire(20 * MIB, device=DEVICE)
        assert registry.calls == ["register"]
        assert threading.current_thread().name not in registry.threads

    async def test_shared_memory_can_be_pinned_too(self, workers: Workers):
        pool = Pool(workers, shared=True, pinning=Pinning(Registry()))
        lease = await pool.acquire(MIB, device=DEVICE)
        statistics = pool.statistics()
        assert statistics.pinned_bytes == statistics.shared_bytes == MIB
        assert "shared, pinned" in repr(lease.arena)

    async def test_memory_that_no_accelerator_reaches_is_not(self, workers: Workers):
        registry = Registry()
        pool = Pool(workers, pinning=Pinning(registry))
        lease = await pool.acquire(MIB)
        assert registry.calls == []
        del lease
        await pool.acquire(MIB, device=DEVICE)
        assert registry.calls == ["register"], "until one does"

    async def test_unregistered_before_it_is_unmapped(self, workers: Workers):
        registry = Registry()
        pool = Pool(workers, pinning=Pinning(registry))
        await pool.acquire(MIB, device=DEVICE)
        await pool.aclose()
        assert registry.calls == ["register", "unregister"]
        assert registry.registered == {}
        assert threading.current_thread().name not in registry.threads
        assert pool.statistics().pinned_bytes == 0

    async def test_and_also_when_the_pool_is_only_dropped(self, workers: Workers):
        registry = Registry()
        await Pool(workers, pinning=Pinning(registry)).acquire(MIB, device=DEVICE)
        gc.collect()
        assert registry.registered == {}

    async def test_a_driver_that_cannot_unregister_does_not_stop_the_pool(
        self, workers: Workers, caplog: pytest.LogCaptureFixture
    ):
        registry = Registry()
        pool = Pool(workers, max_bytes=4 * MIB, pinning=Pinning(registry))
        await pool.acquire(MIB, device=DEVICE)
        registry.registered.clear()
        lease = await pool.acquire(4 * MIB)
        assert lease.buffer.nbytes == 4 * MIB
        assert "could not be given back properly" in caplog.text

    async def test_a_refusal_is_one_warning_with_the_limit_and_staging_goes_on(
        self, workers: Workers, caplog: pytest.LogCaptureFixture
    ):
        caplog.set_level(logging.WARNING, "aiostage")
        registry = Registry(limit=MIB)
        pool = Pool(workers, pinning=Pinning(registry))
        leases = [await pool.acquire(size * MIB, device=DEVICE) for size in (2, 3, 1)]
        assert [lease.arena.pinned for lease in leases] == [False, False, False]
        assert registry.calls == ["register"]
        (message,) = caplog.messages
        assert f"cuda:1 cannot register {2 * MIB} bytes" in message
        assert "cannot pin 2097152 bytes" in message
        assert "RLIMIT_MEMLOCK" in message
        assert "`ulimit -l`" in message

    async def test_a_refusal_is_an_error_where_pinning_is_required(self, workers: Workers):
        registry = Registry(limit=MIB)
        pool = Pool(workers, max_bytes=2 * MIB, pinning=Pinning(registry, required=True))
        with pytest.raises(AcceleratorUnavailableError, match=r"cannot pin .*RLIMIT_MEMLOCK"):
            await pool.acquire(2 * MIB, device=DEVICE)
        assert pool.statistics().leases == 0
        registry.limit = None
        lease = await pool.acquire(2 * MIB, device=DEVICE)
        assert lease.arena.pinned

    async def test_cancelled_while_registering(self, workers: Workers):
        registry, pool = await cancelled_in_the_driver(workers)
        assert registry.calls == [], "the driver is still registering, and no task has waited for it"
        assert pool.statistics().leases == 0
        following = asyncio.create_task(pool.acquire(MIB, device=DEVICE))
        await asyncio.sleep(0.01)
        assert not following.done(), "the same arena, which is about to be registered"
        registry.go.set()
        lease = await following
        assert list(registry.registered) == [lease.arena.address]
        assert registry.calls == ["register"]

    async def test_closed_while_registering(self, workers: Workers):
        registry, pool = await cancelled_in_the_driver(workers)
        closing = asyncio.create_task(pool.aclose())
        await asyncio.sleep(0.01)
        assert not closing.done()
        registry.go.set()
        await closing
        assert registry.calls == ["register", "unregister"]

    async def test_cancelled_at_every_await(self, workers: Workers):
        registry = Registry()
        pool = Pool(workers, pinning=Pinning(registry))
        sizes = (MIB * 3 ** (number % 5) for number in itertools.count())
        async for number in at_every_await(lambda: pool.acquire(next(sizes), device=DEVICE)):
            assert pool.statistics().leases == 0
            if number == 10:
                break
        await pool.aclose()
        assert registry.registered == {}


def test_an_arena_that_is_dropped_is_unregistered_first():
    registry = Registry()
    arena = Arena.pageable(MIB)
    Pinning(registry).register(arena, DEVICE)
    assert arena.pinned
    del arena
    assert registry.registered == {}


def test_an_arena_that_was_closed_in_the_meantime_is_not_registered():
    registry = Registry()
    arena = Arena.pageable(MIB)
    arena.close()
    Pinning(registry).register(arena, DEVICE)
    assert registry.calls == []


def test_a_closed_arena_is_not_pinned():
    registry = Registry()
    arena = Arena.pageable(MIB)
    Pinning(registry).register(arena, DEVICE)
    arena.close()
    assert not arena.pinned
    arena.close()
    assert registry.calls == ["register", "unregister"]
