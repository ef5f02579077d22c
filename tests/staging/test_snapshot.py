"""Snapshot: a handle on a staging under way."""

from __future__ import annotations

import asyncio
import gc

import pytest
import torch

from aiostage import AsyncStager, Snapshot, StagerClosedError, StagingError, StagingOptions, TornSnapshotError
from tests.staging.holding import copies_held, until

MIB = 2**20


def tree() -> dict[str, object]:
    layer = torch.arange(12.0).reshape(3, 4)
    return {"layer": layer, "tied": layer, "row": layer[1], "empty": torch.empty(0), "step": 7, "big": torch.ones(MIB)}


@pytest.mark.asyncio
class TestSnapshot:
    async def test_reports_what_it_holds_once_entered(self):
        async with AsyncStager() as stager:
            snapshot = stager.snapshot(tree())
            assert (snapshot.nbytes, snapshot.leaves) == (0, 0)
            async with snapshot:
                assert snapshot.leaves == 4
                assert snapshot.nbytes == 48 + 4 * MIB
                await snapshot.captured()
                assert snapshot.timings.walk > 0
                assert isinstance(snapshot, Snapshot)

    async def test_result_is_the_captured_tree_and_outlives_the_block(self):
        source = tree()
        async with AsyncStager() as stager:
            async with stager.snapshot(source) as snapshot:
                await snapshot.captured()
                source["layer"].zero_()  # type: ignore[attr-defined]
                staged = await snapshot.result()
                assert await snapshot.result() is staged
            assert staged["layer"].sum() == 66
            assert staged["tied"] is staged["layer"]
            assert staged["row"].untyped_storage().data_ptr() == staged["layer"].untyped_storage().data_ptr()

    async def test_leaving_drops_the_tree(self):
        async with AsyncStager() as stager:
            async with stager.snapshot(tree()) as snapshot:
                await snapshot.captured()
                assert stager.statistics().leases == 1
            assert stager.statistics().leases == 0

    async def test_leaving_drops_many_leaves_in_steps_and_all_at_once_when_cancelled(self):
        source = {str(number): torch.ones(1) for number in range(20_000)}
        options = StagingOptions(max_loop_hold=1e-9)
        async with AsyncStager(options) as stager:
            snapshot = stager.snapshot(source)
            await snapshot.__aenter__()
            await snapshot.captured()
            turns = 0

            async def count() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            counting = asyncio.ensure_future(count())
            await snapshot.__aexit__(None, None, None)
            counting.cancel()
            assert turns >= 20
            assert stager.statistics().leases == 0

            await (cancelled := stager.snapshot(source)).__aenter__()
            await cancelled.captured()
            leaving = asyncio.ensure_future(cancelled.__aexit__(None, None, None))
            await asyncio.sleep(0)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            del leaving
            assert stager.statistics().leases == 0

    async def test_leaving_early_abandons_the_staging(self):
        async with AsyncStager() as stager:
            with copies_held(stager) as release:
                snapshot = stager.snapshot(tree())
                await snapshot.__aenter__()
                leaving = asyncio.ensure_future(snapshot.__aexit__(None, None, None))
                release.set()
                await leaving
            assert stager.statistics().leases == 0
            assert stager.statistics().stagings == 0

    async def test_an_error_in_the_block_is_passed_on(self):
        async with AsyncStager() as stager:
            with pytest.raises(ZeroDivisionError):
                async with stager.snapshot(tree()):
                    1 / 0  # noqa: B018
            assert stager.statistics().leases == 0

    async def test_several_tasks_may_wait(self):
        async with AsyncStager() as stager, stager.snapshot(tree()) as snapshot:
            first, second, _ = await asyncio.gather(snapshot.result(), snapshot.result(), snapshot.captured())
            assert first is second

    async def test_a_waiter_that_is_cancelled_while_queueing_leaves_the_others(self):
        async with AsyncStager() as stager:
            with copies_held(stager) as release:
                async with stager.snapshot(tree()) as snapshot:
                    first = asyncio.ensure_future(snapshot.result())
                    await until(lambda: snapshot._staging._waiters == 1)
                    second = asyncio.ensure_future(snapshot.result())
                    await until(lambda: snapshot._staging._waiters == 2)
                    second.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await second
                    release.set()
                    assert (await first)["step"] == 7

    async def test_the_waiter_that_is_cancelled_while_it_completes_leaves_it_to_the_others(self):
        async with AsyncStager() as stager:
            with copies_held(stager) as release:
                async with stager.snapshot(tree()) as snapshot:
                    first = asyncio.ensure_future(snapshot.result())
                    await until(lambda: snapshot._staging._waiters == 1)
                    second = asyncio.ensure_future(snapshot.result())
                    await until(lambda: snapshot._staging._waiters == 2)
                    first.cancel()
                    await asyncio.sleep(0)
                    release.set()
                    with pytest.raises(asyncio.CancelledError):
                        await first
                    assert (await second)["step"] == 7
                    del first, second
                    # The loop refers to the task that woke this one until its next turn.
                    await asyncio.sleep(0)
            assert stager.statistics().leases == 0

    async def test_must_be_entered_and_entered_once(self):
        async with AsyncStager() as stager:
            snapshot = stager.snapshot(tree())
            with pytest.raises(StagingError, match="not entered"):
                await snapshot.captured()
            async with snapshot:
                with pytest.raises(StagingError, match="entered before"):
                    await snapshot.__aenter__()
            with pytest.raises(StagingError, match="context was exited"):
                await snapshot.result()

    async def test_torn_is_raised_for_every_waiter(self):
        source = tree()
        async with AsyncStager() as stager:
            with copies_held(stager) as release:
                async with stager.snapshot(source) as snapshot:
                    source["big"].add_(1)  # type: ignore[attr-defined]
                    release.set()
                    for _ in range(2):
                        with pytest.raises(TornSnapshotError, match="big"):
                            await snapshot.captured()

    async def test_a_stager_that_closes_ends_it(self):
        stager = AsyncStager()
        with copies_held(stager) as release:
            async with stager.snapshot(tree()) as snapshot:
                closing = asyncio.ensure_future(stager.aclose())
                await asyncio.sleep(0)
                release.set()
                await closing
                with pytest.raises(StagerClosedError):
                    await snapshot.result()
        assert stager.statistics().leases == 0


@pytest.mark.asyncio
class TestIteration:
    async def test_yields_each_leaf_once_with_its_first_path(self):
        async with AsyncStager() as stager, stager.snapshot(tree()) as snapshot:
            found = {leaf.path: leaf.tensor async for leaf in snapshot}
            staged = await snapshot.result()
        assert set(found) == {("layer",), ("row",), ("empty",), ("big",)}
        for path, tensor in found.items():
            assert tensor is staged[path[0]]

    async def test_leaves_come_before_the_rest_has_landed(self):
        source = {f"p{n}": torch.full((3 * MIB,), float(n)) for n in range(8)}
        async with AsyncStager() as stager, stager.snapshot(source) as snapshot:
            seen = 0
            async for leaf in snapshot:
                assert leaf.tensor[0] == float(leaf.path[0][1:])  # type: ignore[index]
                seen += 1
            assert seen == 8
            assert stager.statistics().stagings == 1

    async def test_stopping_early_is_allowed(self):
        async with AsyncStager() as stager, stager.snapshot(tree()) as snapshot:
            async for _ in snapshot:
                break
            assert (await snapshot.result())["step"] == 7

    async def test_a_torn_source_shows_at_the_end(self):
        source = tree()
        async with AsyncStager() as stager:
            with copies_held(stager) as release:
                async with stager.snapshot(source) as snapshot:
                    source["step"] = 8
                    release.set()
                    with pytest.raises(TornSnapshotError, match="step"):
                        async for _ in snapshot:
                            pass

    @pytest.mark.parametrize("use_async_staging", [True, False])
    async def test_composites_are_yielded_whole(self, use_async_staging: bool):
        sparse = torch.eye(4).to_sparse()
        stager = AsyncStager(StagingOptions(use_async_staging=use_async_staging))
        async with stager, stager.snapshot({"sparse": sparse, "dense": torch.ones(2)}) as snapshot:
            found = {leaf.path: leaf.tensor async for leaf in snapshot}
        assert set(found) == {("sparse",), ("dense",)}
        assert torch.equal(found["sparse",].to_dense(), torch.eye(4))


@pytest.mark.asyncio
async def test_nothing_of_the_source_is_kept_after_capture() -> None:
    class Marker:
        pass

    import weakref

    source = {"marker": Marker(), "tensor": torch.ones(3)}
    alive = weakref.ref(source["tensor"])
    async with AsyncStager() as stager, stager.snapshot(source) as snapshot:
        await snapshot.captured()
        gc.disable()
        try:
            source.clear()
            assert alive() is None
        finally:
            gc.enable()
