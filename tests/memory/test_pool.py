from __future__ import annotations

import _thread
import asyncio
import gc
import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

import anyio
import pytest
import torch
import trio.testing

from aiostage._loop.workers import Workers
from aiostage._memory.pool import Lease, Pool, PoolStatistics
from aiostage._platform.memory import PAGE_BYTES
from aiostage.errors import HostMemoryError, StagerClosedError
from aiostage.testing import at_every_await
from tests.descriptors import SHARED_MEMORY, opened
from tests.patience import seconds

MIB = 1 << 20
SOON = seconds(10.0)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another thread is about to do."""
    with anyio.fail_after(SOON):
        while not condition():
            await anyio.sleep(0.001)


def refuse(*_: object) -> None:
    """Start no thread."""
    raise RuntimeError("can't start new thread")


async def settle() -> None:
    """Let every task that can run do so."""
    for _ in range(10):
        await anyio.lowlevel.checkpoint()


@pytest.fixture(params=["pageable", "shared"])
def shared(request: pytest.FixtureRequest) -> bool:
    return request.param == "shared"


@pytest.mark.asyncio
class TestLeases:
    async def test_a_buffer_is_exactly_what_was_asked_for(self, workers: Workers, shared: bool):
        pool = Pool(workers, shared=shared)
        lease = await pool.acquire(PAGE_BYTES + 1)
        assert lease.buffer.nbytes == PAGE_BYTES + 1
        assert lease.buffer.ctypes.data % PAGE_BYTES == 0
        size = 2 * PAGE_BYTES
        assert pool.statistics() == PoolStatistics(
            arenas=1,
            leases=1,
            waiting=0,
            pageable_bytes=0 if shared else size,
            shared_bytes=size if shared else 0,
            pinned_bytes=0,
        )

    async def test_nothing_is_something_too(self, workers: Workers):
        lease = await Pool(workers).acquire(0)
        assert lease.buffer.nbytes == 0

    async def test_faulting_in_is_left_to_the_writer(self, workers: Workers, shared: bool):
        lease = await Pool(workers, shared=shared).acquire(20 * MIB)
        assert not lease.arena.is_warm(0, 1)

    async def test_shared_memory_is_reserved(self, workers: Workers):
        lease = await Pool(workers, shared=True).acquire(2 * MIB)
        assert lease.arena.reserved
        descriptor = lease.share().descriptor
        assert os.fstat(descriptor).st_blocks * 512 >= 2 * MIB

    async def test_memory_is_reused_once_the_last_tensor_is_gone(self, workers: Workers, shared: bool):
        pool = Pool(workers, shared=shared)
        lease = await pool.acquire(MIB)
        address = lease.arena.address
        tensor = torch.from_numpy(lease.buffer[16:32]).view(torch.float32)
        del lease
        assert pool.statistics().leases == 1
        view = tensor[1:]
        del tensor
        assert pool.statistics().leases == 1
        del view
        assert pool.statistics().leases == 0
        again = await pool.acquire(MIB)
        assert again.arena.address == address
        assert pool.statistics().arenas == 1

    async def test_and_never_before(self, workers: Workers, shared: bool):
        pool = Pool(workers, shared=shared)
        kept = []
        for number in range(1, 9):
            lease = await pool.acquire(MIB)
            lease.buffer[:] = number
            kept.append(torch.from_numpy(lease.buffer)[100:200])
            del lease
        assert [tensor.unique().tolist() for tensor in kept] == [[number] for number in range(1, 9)]

    async def test_the_lease_itself_holds_too(self, workers: Workers):
        pool = Pool(workers)
        lease = await pool.acquire(MIB)
        assert pool.statistics().leases == 1
        del lease
        assert pool.statistics().leases == 0

    async def test_a_lease_may_end_in_a_collection_of_another_thread(self, workers: Workers):
        pool = Pool(workers)
        cycle: list[object] = [await pool.acquire(MIB)]
        cycle.append(cycle)
        del cycle
        thread = threading.Thread(target=gc.collect)
        thread.start()
        thread.join()
        assert pool.statistics().leases == 0

    async def test_a_lease_may_end_inside_the_pools_own_lock(self, workers: Workers):
        """The collector may run in any allocation, also in one made while this thread has the lock."""
        pool = Pool(workers, max_bytes=MIB)
        lease = await pool.acquire(MIB)
        waiting = asyncio.create_task(pool.acquire(MIB))
        await settle()
        with pool._lock:
            del lease
        await waiting

    async def test_a_waiter_may_be_closed_inside_the_pools_own_lock(self, workers: Workers):
        pool = Pool(workers, max_bytes=MIB)
        lease = await pool.acquire(MIB)
        abandoned = pool.acquire(MIB)
        abandoned.send(None)
        waiting = asyncio.create_task(pool.acquire(MIB))
        await settle()
        with pool._lock:
            abandoned.close()
        del lease
        await waiting

    async def test_private_memory_cannot_be_shared(self, workers: Workers):
        lease = await Pool(workers).acquire(MIB)
        with pytest.raises(HostMemoryError, match="use_shared_memory=True"):
            lease.share()

    async def test_nothing_grows_with_the_number_of_leases(self, workers: Workers, shared: bool):
        pool = Pool(workers, shared=shared)

        async def round_trip(number: int) -> None:
            lease = await pool.acquire(MIB + number % 7 * PAGE_BYTES)
            lease.buffer[0] = 1

        async def held() -> int:
            await until(lambda: pool.statistics().arenas == 1)
            assert workers.threads <= 2
            return len(opened(SHARED_MEMORY))

        for number in range(20):
            await round_trip(number)
        before = await held()
        for number in range(200):
            await round_trip(number)
        # Fewer, if the collector closes what other tests have left.
        assert await held() <= before

    async def test_a_pool_dropped_without_closing_gives_everything_back(self, workers: Workers):
        pool = Pool(workers, shared=True)
        before = opened(SHARED_MEMORY)
        idle, lease = await pool.acquire(MIB), await pool.acquire(2 * MIB)
        tensor = torch.from_numpy(lease.buffer)
        tensor.fill_(5)
        del idle, pool, lease
        assert tensor.unique().tolist() == [5]
        del tensor
        gc.collect()
        await until(lambda: not opened(SHARED_MEMORY) - before)

    async def test_an_ended_lease_of_a_closed_pool_does_not_count(self, workers: Workers):
        """Also when the thread that outlives the leases is stopped as soon as it knows."""
        pool = Pool(workers)
        go = threading.Event()

        class Stopping:
            def __init__(self) -> None:
                self.queue: SimpleQueue[object] = SimpleQueue()
                self.put, self.get_nowait = self.queue.put, self.queue.get_nowait

            def get(self) -> object:
                item = self.queue.get()
                go.wait(SOON)
                return item

        pool._returned = Stopping()  # type: ignore[assignment]
        lease = await pool.acquire(MIB)
        pool.close()
        del lease
        # Long enough for that thread to get a notification, if there is one.
        await anyio.sleep(0.05)
        try:
            with anyio.fail_after(SOON / 2):
                while pool.statistics().leases:
                    await anyio.sleep(0.001)
        finally:
            go.set()

    @pytest.mark.parametrize(("budget", "said"), [(None, "the first copy"), (4 * MIB, "max_host_bytes")])
    async def test_more_than_the_container_has(
        self, workers: Workers, budget: int | None, said: str, monkeypatch, caplog
    ):
        monkeypatch.setattr("aiostage._memory.pool.MEMORY_LIMIT", MIB)
        pool = Pool(workers, max_bytes=budget)
        for _ in range(2):
            await pool.acquire(2 * MIB)
        (record,) = [record for record in caplog.records if "control group" in record.message]
        assert said in record.message
        assert str(MIB) in record.message

    async def test_repr(self, workers: Workers):
        pool = Pool(workers)
        assert repr(pool) == f"<Pool {pool.statistics()}>"
        pool.close()
        assert repr(pool).startswith("<Pool closed, ")


@pytest.mark.asyncio
class TestBudget:
    async def test_what_can_never_fit_is_refused_at_once_with_both_numbers(self, workers: Workers):
        pool = Pool(workers, max_bytes=MIB)
        with pytest.raises(HostMemoryError, match=f"{2 * MIB} bytes .* max_host_bytes is {MIB}.*at least {2 * MIB}"):
            await pool.acquire(2 * MIB)
        assert pool.statistics().arenas == 0

    async def test_waits_until_a_lease_ends(self, workers: Workers, shared: bool):
        pool = Pool(workers, max_bytes=3 * MIB, shared=shared)
        first, second = await pool.acquire(2 * MIB), await pool.acquire(MIB)
        waiting = asyncio.create_task(pool.acquire(2 * MIB))
        await settle()
        assert pool.statistics().waiting == 1
        del second
        await settle()
        assert not waiting.done()
        del first
        lease = await waiting
        assert lease.buffer.nbytes == 2 * MIB
        assert pool.statistics().waiting == 0

    async def test_woken_when_a_lease_ends_in_another_thread(self, workers: Workers):
        pool = Pool(workers, max_bytes=MIB)
        holder = [await pool.acquire(MIB)]
        waiting = asyncio.create_task(pool.acquire(MIB))
        await settle()
        threading.Thread(target=holder.clear).start()
        await waiting

    async def test_in_turn(self, workers: Workers):
        pool = Pool(workers, max_bytes=4 * MIB)
        holder = [await pool.acquire(4 * MIB)]
        order: list[int] = []

        async def wait(number: int, nbytes: int) -> None:
            await pool.acquire(nbytes)
            order.append(number)

        tasks = []
        for number, nbytes in enumerate((4 * MIB, MIB, 3 * MIB, 2 * MIB)):
            tasks.append(asyncio.create_task(wait(number, nbytes)))
            await settle()
        holder.clear()
        await asyncio.gather(*tasks)
        assert order == [0, 1, 2, 3]

    async def test_idle_memory_makes_room(self, workers: Workers):
        pool = Pool(workers, max_bytes=4 * MIB)
        leases = [await pool.acquire(MIB) for _ in range(4)]
        leases.clear()
        assert pool.statistics().arenas == 4
        lease = await pool.acquire(4 * MIB)
        assert lease.buffer.nbytes == 4 * MIB
        assert pool.statistics().pageable_bytes == 4 * MIB

    async def test_a_cancelled_waiter_lets_the_next_one_through(self, workers: Workers):
        pool = Pool(workers, max_bytes=4 * MIB)
        kept = await pool.acquire(2 * MIB)
        large, small = asyncio.create_task(pool.acquire(4 * MIB)), asyncio.create_task(pool.acquire(MIB))
        await settle()
        assert pool.statistics().waiting == 2
        large.cancel()
        with pytest.raises(asyncio.CancelledError):
            await large
        await small
        assert kept.buffer.nbytes == 2 * MIB

    async def test_cancelled_at_every_await(self, workers: Workers, shared: bool):
        pool = Pool(workers, max_bytes=20 * MIB, shared=shared)
        rounds = 0

        async def wait() -> Lease:
            holder = [await pool.acquire(20 * MIB)]
            asyncio.get_running_loop().call_soon(holder.clear)
            # Another size, so that the idle arena is closed and a new one reserved.
            return await pool.acquire(MIB * (8 if rounds % 2 else 9))

        async for _ in at_every_await(wait):
            gc.collect()
            assert pool.statistics().waiting == 0
            await until(lambda: pool.statistics().leases == 0)
            rounds += 1
            if rounds == 20:
                break
        assert rounds >= 1
        lease = await pool.acquire(20 * MIB)
        assert lease.buffer.nbytes == 20 * MIB

    async def test_cancelled_with_the_grant_on_its_way(self, workers: Workers):
        pool = Pool(workers, max_bytes=MIB)
        lease = await pool.acquire(MIB)
        first, second = asyncio.create_task(pool.acquire(MIB)), asyncio.create_task(pool.acquire(MIB))
        await settle()
        del lease
        pool.statistics()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await second


@pytest.mark.asyncio
class TestClosing:
    async def test_idle_memory_is_given_back_now(self, workers: Workers):
        pool = Pool(workers)
        leases = [await pool.acquire(MIB) for _ in range(3)]
        leases.clear()
        assert pool.statistics().arenas == 3
        await pool.aclose()
        assert pool.statistics().arenas == 0

    async def test_leased_memory_when_its_lease_ends(self, workers: Workers, shared: bool):
        pool = Pool(workers, shared=shared)
        lease = await pool.acquire(MIB)
        tensor = torch.from_numpy(lease.buffer)
        tensor.fill_(5)
        del lease
        await pool.aclose()
        workers.stop()
        assert pool.statistics().leases == 1
        assert tensor.unique().tolist() == [5]
        del tensor
        await until(lambda: pool.statistics().arenas == 0)

    async def test_and_without_anybody_asking(self, workers: Workers):
        pool = Pool(workers, shared=True)
        lease = await pool.acquire(MIB)
        descriptor = lease.share().descriptor
        await pool.aclose()
        file = os.fstat(descriptor)
        assert file.st_size
        del lease

        def is_closed() -> bool:
            try:
                # Another thread may have been given the number.
                return not os.path.samestat(os.fstat(descriptor), file)
            except OSError:
                return True

        await until(is_closed)

    async def test_cancelled_waits_for_all_that_is_given_back(self, workers: Workers):
        pool = Pool(workers)
        gates = {workers.job(): threading.Event() for _ in range(2)}
        for job, gate in gates.items():
            job.put(partial(gate.wait, SOON))
            job.close()
            pool._closings.add(job)
        closing = asyncio.create_task(pool.aclose())
        await asyncio.sleep(0)
        closing.cancel()
        # In the order in which they are waited for.
        first, second = pool._closings
        gates[first].set()
        await until(first.finished)
        await settle()
        assert not closing.done()
        gates[second].set()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert second.finished()

    async def test_though_the_system_grants_one_more_thread_only(
        self, workers: Workers, monkeypatch: pytest.MonkeyPatch
    ):
        pool = Pool(workers)
        leases = [await pool.acquire(MIB), await pool.acquire(MIB)]
        leases.pop()
        monkeypatch.setattr(threading.Thread, "start", refuse)
        await pool.aclose()
        leases.clear()
        await until(lambda: pool.statistics().arenas == 0)

    async def test_though_the_system_grants_no_thread(self, workers: Workers, monkeypatch: pytest.MonkeyPatch):
        pool = Pool(workers)
        lease = await pool.acquire(MIB)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            patch.setattr(_thread, "start_new_thread", refuse)
            await pool.aclose()
        with pytest.raises(StagerClosedError):
            await pool.acquire(MIB)
        del lease

    async def test_arenas_are_given_back_though_the_system_grants_no_thread(
        self, workers: Workers, monkeypatch: pytest.MonkeyPatch
    ):
        pool = Pool(workers)
        leases = [await pool.acquire(MIB), await pool.acquire(MIB)]
        last = await pool.acquire(MIB)
        leases.clear()
        monkeypatch.setattr(_thread, "start_new_thread", refuse)
        assert workers.threads == 0
        await pool.aclose()
        assert pool.statistics().arenas == 1
        del last
        assert pool.statistics().arenas == 0

    async def test_waiters_get_an_error(self, workers: Workers):
        pool = Pool(workers, max_bytes=MIB)
        lease = await pool.acquire(MIB)
        waiting = [asyncio.create_task(pool.acquire(MIB)) for _ in range(3)]
        await settle()
        pool.close()
        for task in waiting:
            with pytest.raises(StagerClosedError):
                await task
        assert lease.buffer.nbytes == MIB

    async def test_a_request_that_was_granted_but_not_served_too(self, workers: Workers):
        # Shared memory has to be reserved before it is handed over.
        pool = Pool(workers, shared=True)
        blocked = threading.Event()
        for _ in range(2):
            job = workers.job()
            job.put(lambda: blocked.wait(SOON))
            job.close()
        reserving = asyncio.create_task(pool.acquire(MIB))
        await settle()
        pool.close()
        blocked.set()
        with pytest.raises(StagerClosedError):
            await reserving
        await until(lambda: pool.statistics().arenas == 0)

    async def test_closed_is_closed(self, workers: Workers):
        pool = Pool(workers)
        for _ in range(2):
            pool.close()
            await pool.aclose()
        with pytest.raises(StagerClosedError):
            await pool.acquire(MIB)

    async def test_cancelled_closing_closes_all_the_same(self, workers: Workers):
        async def close_one_with_idle_memory() -> None:
            pool = pools[-1]
            await pool.aclose()

        async def fresh() -> Pool:
            pool = Pool(workers)
            await pool.acquire(MIB)
            return pool

        pools = [await fresh()]
        async for _ in at_every_await(close_one_with_idle_memory):
            pool = pools[-1]
            await until(lambda pool=pool: pool.statistics().arenas == 0)
            with pytest.raises(StagerClosedError):
                await pool.acquire(MIB)
            if len(pools) == 5:
                break
            pools.append(await fresh())


class TestSeveralLoops:
    def test_share_a_budget(self, workers: Workers):
        pool = Pool(workers, max_bytes=3 * MIB)
        largest: list[int] = []
        failures: list[BaseException] = []

        async def work() -> None:
            async def one(number: int) -> None:
                lease = await pool.acquire(MIB * (1 + number % 3))
                lease.buffer[0] = number
                await asyncio.sleep(0)
                assert lease.buffer[0] == number
                largest.append(pool.statistics().pageable_bytes)

            for _ in range(10):
                await asyncio.gather(*(one(number) for number in range(6)))

        def run() -> None:
            try:
                asyncio.run(work())
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * SOON)
            assert not thread.is_alive(), f"hangs with {pool.statistics()}"
        assert failures == []
        assert len(largest) == 3 * 10 * 6
        assert max(largest) <= 3 * MIB
        statistics = pool.statistics()
        assert (statistics.leases, statistics.waiting) == (0, 0)

    @pytest.mark.parametrize("ended_by", ["a finalizer", "another call"])
    def test_a_waiter_whose_loop_has_closed_is_passed_over(self, workers: Workers, ended_by: str):
        pool = Pool(workers, max_bytes=MIB)
        holder = [asyncio.run(pool.acquire(MIB))]
        closed = asyncio.new_event_loop()
        lost = closed.create_task(pool.acquire(MIB))
        closed.run_until_complete(settle())
        closed.close()

        async def wait() -> None:
            waiting = asyncio.create_task(pool.acquire(MIB))
            await settle()
            holder.clear()
            if ended_by == "another call":
                pool.statistics()
            await asyncio.wait_for(waiting, SOON)

        asyncio.run(wait())
        assert pool.statistics().waiting == 0
        assert pool.statistics().leases == 0
        lost._log_destroy_pending = False
        coroutine = lost.get_coro()
        del lost
        coroutine.close()
        assert pool.statistics().leases == 0

    def test_a_pool_can_be_closed_without_any_loop(self, workers: Workers):
        pool = Pool(workers)
        asyncio.run(pool.acquire(MIB))
        pool.close()
        asyncio.run(until(lambda: pool.statistics().arenas == 0))


@pytest.mark.anyio
class TestTrio:
    @pytest.fixture(params=[("trio", {"clock": trio.testing.MockClock(autojump_threshold=0.01)})], ids=["trio"])
    def anyio_backend(self, request: pytest.FixtureRequest) -> object:
        return request.param

    async def test_waiting_cancelling_and_closing(self, workers: Workers):
        pool = Pool(workers, max_bytes=MIB)
        holder = [await pool.acquire(MIB)]
        got: list[str] = []

        async def wait(name: str) -> None:
            try:
                await pool.acquire(MIB)
                got.append(name)
            except StagerClosedError:
                got.append(f"{name} closed")

        async with anyio.create_task_group() as group:
            with anyio.CancelScope() as scope:
                scope.cancel()
                await pool.acquire(MIB)
            assert scope.cancelled_caught
            group.start_soon(wait, "first")
            await anyio.wait_all_tasks_blocked()
            holder.clear()
        assert got == ["first"]
        holder.append(await pool.acquire(MIB))
        async with anyio.create_task_group() as group:
            group.start_soon(wait, "second")
            await anyio.wait_all_tasks_blocked()
            await pool.aclose()
        assert got == ["first", "second closed"]

    async def test_a_long_wait_says_once_what_it_waits_for(self, workers: Workers, caplog: pytest.LogCaptureFixture):
        caplog.set_level(logging.INFO, "aiostage")
        pool = Pool(workers, max_bytes=2 * MIB)
        holder = [await pool.acquire(MIB) for _ in range(2)]
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: pool.acquire(2 * MIB))
            await anyio.sleep(9.9)
            assert caplog.messages == []
            await anyio.sleep(0.2)
            (message,) = caplog.messages
            assert f"waits for {2 * MIB} bytes" in message
            assert f"max_host_bytes={2 * MIB}" in message
            assert "2 staged copies" in message
            await anyio.sleep(1000)
            assert len(caplog.messages) == 1
            holder.clear()


@pytest.mark.asyncio
async def test_a_lease_that_ended_after_closing_counts_no_more_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(Workers(1, "test"))
    lease = await pool.acquire(100)
    # As if the thread that outlives the leases were switched away from before it has done anything.
    held = threading.Event()
    advance = pool._advance

    def held_back() -> None:
        if threading.current_thread().name == "aiostage-leases":
            held.wait(5)
        advance()

    monkeypatch.setattr(pool, "_advance", held_back)
    pool.close()
    del lease
    try:
        for _ in range(50):
            assert pool.statistics().leases == 0
            await asyncio.sleep(0.001)
    finally:
        held.set()
