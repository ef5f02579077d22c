"""Cancelling staging at every one of its awaits: nothing stays behind, and the stager works on."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest
import torch

from aiostage import AsyncStager, StagingError, StagingOptions
from aiostage.testing import LeakProbe, at_every_await
from aiostage.testing.cancelling import CancelledAt
from tests.staging.holding import copies_held, copies_slowed, until

SOURCE = {
    "step": 3,
    "model": {f"p{n}": torch.full((5,), float(n)) for n in range(200)},
    "pair": (torch.ones(2), [torch.zeros(3)]),
    "sparse": torch.eye(3).to_sparse(),
    "big": torch.ones(3_000_000),
    # Ends the short walk, so that both are cancelled.
    "rows": [slice(n) for n in range(4)],
}
EAGER = StagingOptions(max_loop_hold=1e-9)
"""Yields between any two small steps, so that there are many awaits to be cancelled at."""


async def everything_is_back(stager: AsyncStager) -> None:
    """Check that nothing is leased, under way or waited for, without the help of the garbage collector."""
    statistics = stager.statistics()
    assert (statistics.leases, statistics.waiting) == (0, 0)
    assert not stager._resources.running
    staged = await stager.stage(SOURCE)
    assert float(staged["model"]["p7"][0]) == 7
    assert torch.equal(staged["sparse"].to_dense(), torch.eye(3))
    del staged
    assert stager.statistics().leases == 0


async def check(stager: AsyncStager, make: Callable[[], Coroutine[Any, Any, object]]) -> int:
    """Cancel at every await, and check after each; return how many there were."""
    count = 0
    gc.disable()
    try:
        async for _ in at_every_await(make):
            count += 1
            await everything_is_back(stager)
    finally:
        gc.enable()
    return count


@pytest.mark.asyncio
@pytest.mark.parametrize("warm", [False, True])
async def test_stage(warm: bool) -> None:
    async with AsyncStager(EAGER) as stager:
        if warm:
            for _ in range(3):
                await stager.stage(SOURCE)
        assert await check(stager, lambda: stager.stage(SOURCE)) > 10


@pytest.mark.asyncio
async def test_stage_inline() -> None:
    async with AsyncStager(StagingOptions(max_loop_hold=1e-9, use_async_staging=False)) as stager:
        assert await check(stager, lambda: stager.stage(SOURCE)) > 10


@pytest.mark.asyncio
async def test_snapshot_with_everything_in_it() -> None:
    async with AsyncStager(EAGER) as stager:

        async def use() -> None:
            async with stager.snapshot(SOURCE) as snapshot:
                async for leaf in snapshot:
                    # Or the cancellation's traceback would keep it.
                    del leaf
                await snapshot.captured()
                await snapshot.result()

        assert await check(stager, use) > 10


@pytest.mark.asyncio
async def test_prewarm() -> None:
    async with AsyncStager(EAGER) as stager:
        assert await check(stager, lambda: stager.prewarm(SOURCE)) > 10


async def check_twice(stager: AsyncStager, make: Callable[[], Coroutine[Any, Any, object]]) -> int:
    """Cancel at every await, and again at every await of the clean-up; return how often it was cancelled twice.

    Leases, jobs and tasks are counted after each round, threads and descriptors at the end.
    """

    async def cancelled_at(number: int) -> None:
        await CancelledAt(make(), number)

    await make()
    probe = LeakProbe(stager)
    twice = number = 0
    gc.disable()
    try:
        while True:
            again = 0
            while True:
                # The second does not count the await that the first was cancelled at.
                second = CancelledAt(cancelled_at(number), number + again)
                ended = True
                with suppress(asyncio.CancelledError):
                    await second
                    ended = False
                statistics = stager.statistics()
                assert (statistics.leases, statistics.waiting) == (0, 0), (number, again)
                assert not stager._resources.running, (number, again)
                assert asyncio.all_tasks() == {asyncio.current_task()}, (number, again)
                if not second.reached:
                    break
                twice += 1
                again += 1
            if not ended:
                break
            number += 1
    finally:
        gc.enable()
    assert number > 5
    await probe.settled()
    return twice


@pytest.mark.asyncio
async def test_prewarm_cancelled_twice() -> None:
    async with AsyncStager(EAGER) as stager:
        with copies_slowed(stager):
            assert await check_twice(stager, lambda: stager.prewarm(SOURCE)) >= 1
        await everything_is_back(stager)


@pytest.mark.asyncio
async def test_restore_cancelled_twice() -> None:
    staged = {f"p{n}": torch.full((50,), 1.0) for n in range(100)}
    live = {name: torch.zeros(50) for name in staged}

    async def restore() -> None:
        for tensor in live.values():
            tensor.zero_()
        try:
            await stager.restore(staged, into=live)
        finally:
            totals = {float(tensor.sum()) for tensor in live.values()}
            assert totals in ({0.0}, {50.0}), "half restored"

    async with AsyncStager(EAGER) as stager:
        with copies_slowed(stager):
            assert await check_twice(stager, restore) >= 1
        await everything_is_back(stager)


@pytest.mark.asyncio
async def test_share() -> None:
    async with AsyncStager(StagingOptions(use_shared_memory=True)) as stager:
        staged = await stager.stage({"a": torch.ones(10)})
        async for _ in at_every_await(lambda: stager.share(staged)):
            pass
        assert float((await stager.share(staged)).open()["a"].sum()) == 10


@pytest.mark.asyncio
async def test_restore_is_all_or_nothing() -> None:
    async with AsyncStager(EAGER) as stager:
        staged = {f"p{n}": torch.full((5,), 1.0) for n in range(100)}
        live = {name: torch.zeros(5) for name in staged}
        count = 0
        async for _ in at_every_await(lambda: stager.restore(staged, into=live)):
            count += 1
            total = sum(float(tensor.sum()) for tensor in live.values())
            assert total in (0, 500)
            for tensor in live.values():
                tensor.zero_()
        assert count > 10


@pytest.mark.asyncio
async def test_restore_that_has_begun_is_finished() -> None:
    async with AsyncStager() as stager:
        live = {"a": torch.zeros(5)}
        with copies_held(stager) as release:
            task = asyncio.ensure_future(stager.restore({"a": torch.ones(5)}, into=live))
            # Its copy is the only one that waits for a thread.
            await until(lambda: bool(stager._resources.workers._state.queue))
            task.cancel()
            await asyncio.sleep(0)
            release.set()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert float(live["a"].sum()) == 5


@pytest.mark.asyncio
async def test_aclose_closes_all_the_same() -> None:
    number = 0
    reached = True
    while reached:
        stager = AsyncStager()
        staged = await stager.stage(SOURCE)
        staging = asyncio.ensure_future(stager.stage(SOURCE))
        await until(lambda stager=stager: bool(stager._resources.running))  # type: ignore[misc]
        reached = False
        async for reached_number in at_every_await(stager.aclose):
            if reached_number == number:
                reached = True
                break
        with pytest.raises(Exception, match="closed"):
            await staging
        with pytest.raises(Exception, match="closed"):
            stager.stage(SOURCE)
        del staged
        await until(lambda stager=stager: stager.statistics().arenas == 0)  # type: ignore[misc]
        number += 1


@pytest.mark.asyncio
async def test_tasks_cancelled_at_random_moments() -> None:
    import random

    generator = random.Random(7)
    async with AsyncStager(EAGER) as stager:
        for _ in range(60):
            tasks = [asyncio.ensure_future(stager.stage(SOURCE)) for _ in range(3)]
            for _ in range(generator.randrange(200)):
                await asyncio.sleep(0)
            tasks[generator.randrange(3)].cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for result in results:
                assert isinstance(result, (dict, asyncio.CancelledError))
            assert sum(isinstance(result, dict) for result in results) >= 2
            del results, result, tasks
        # Tasks and what gathers them refer to each other, and the loop to both until its next turn.
        await asyncio.sleep(0)
        gc.collect()
        await everything_is_back(stager)


@pytest.mark.asyncio
async def test_cancelled_twice_and_more_while_leaves_are_built() -> None:
    turns = 0
    async with AsyncStager(StagingOptions(max_loop_hold=1e-9, max_host_bytes=20_000_000)) as stager:
        gc.disable()
        try:
            for times in (2, 3, 5):
                for turns in range(0, 240, 6):
                    task = asyncio.ensure_future(stager.stage(SOURCE))
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    for _ in range(times):
                        task.cancel()
                        await asyncio.sleep(0)
                    with suppress(asyncio.CancelledError):
                        await task
                    del task
                    assert not stager._resources.running, turns
                    assert stager.statistics().leases == 0, turns
        finally:
            gc.enable()
        await everything_is_back(stager)


@pytest.mark.asyncio
@pytest.mark.parametrize("source", [SOURCE, {**SOURCE, "set": {1.5}}], ids=["plain", "general"])
async def test_a_waiter_that_is_cancelled_leaves_the_snapshot_to_the_others(source: Any) -> None:
    async with AsyncStager(EAGER) as stager:
        for first in (True, False):
            for turns in range(0, 120, 3):
                async with stager.snapshot(source) as snapshot:
                    waiters = [asyncio.ensure_future(snapshot.result()) for _ in range(3)]
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    waiters[0 if first else 1].cancel()
                    results = await asyncio.gather(*waiters, return_exceptions=True)
                    assert sum(isinstance(result, dict) for result in results) >= 2, (turns, results)
                    assert float(results[2]["model"]["p7"][0]) == 7
                    assert results[2]["step"] == 3
                    del results, waiters
        await everything_is_back(stager)


@pytest.mark.asyncio
async def test_a_waiter_that_is_cancelled_right_after_capture_drops_nothing() -> None:
    async with AsyncStager() as stager:
        with copies_held(stager) as release:
            async with stager.snapshot(SOURCE) as snapshot:

                async def wait_and_cancel() -> Any:
                    staged = await snapshot.result()
                    second.cancel()
                    return staged

                first = asyncio.ensure_future(wait_and_cancel())
                await asyncio.sleep(0)
                second = asyncio.ensure_future(snapshot.result())
                await asyncio.sleep(0)
                release.set()
                staged = await first
                with pytest.raises(asyncio.CancelledError):
                    await second
                assert snapshot.is_captured
                assert await snapshot.result() is staged
                assert float(staged["model"]["p7"][0]) == 7


@pytest.mark.asyncio
async def test_the_last_waiter_that_is_cancelled_abandons_the_snapshot() -> None:
    async with AsyncStager() as stager:
        with copies_held(stager) as release:
            async with stager.snapshot(SOURCE) as snapshot:
                waiters = [asyncio.ensure_future(snapshot.captured()) for _ in range(3)]
                for _ in range(5):
                    await asyncio.sleep(0)
                for waiter in waiters:
                    waiter.cancel()
                release.set()
                results = await asyncio.gather(*waiters, return_exceptions=True)
                assert all(isinstance(result, asyncio.CancelledError) for result in results)
                assert not stager._resources.running
                with pytest.raises(StagingError, match="abandoned"):
                    await snapshot.captured()
