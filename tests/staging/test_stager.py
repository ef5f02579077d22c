"""AsyncStager: copies that are safe, one for each caller, and ends that are clean."""

from __future__ import annotations

import asyncio
import copy
import gc
import math
import threading
import time
from collections import OrderedDict
from functools import partial
from typing import Any

import anyio
import pytest
import torch

from aiostage import (
    AcceleratorUnavailableError,
    AsyncStager,
    CheckpointMismatchError,
    CheckpointStager,
    HostMemoryError,
    StagerClosedError,
    StagingError,
    StagingOptions,
    TornSnapshotError,
    UnsupportedLeafError,
)
from aiostage.testing import SimulatedAccelerator
from tests.patience import seconds
from tests.staging.holding import copies_held, until, until_copies_wait

MIB = 2**20
# Not those of quantized tensors, which consist of others.
DTYPES = sorted(
    {value for value in vars(torch).values() if isinstance(value, torch.dtype) and "torch.q" not in str(value)}, key=str
)


def memory_of(tensor: torch.Tensor) -> list[int]:
    """Return the first bytes of a tensor's storage: four elements."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())[: 4 * tensor.dtype.itemsize].tolist()


def state(value: float = 1.0, count: int = 4, size: int = 1000) -> dict[str, object]:
    return {"step": 3, "model": {f"p{n}": torch.full((size,), value + n) for n in range(count)}}


def values(tree: object) -> list[float]:
    return [float(tensor.flatten()[0]) for tensor in tree["model"].values()]  # type: ignore[index]


@pytest.mark.asyncio
class TestStage:
    @pytest.mark.parametrize("use_async_staging", [True, False])
    @pytest.mark.parametrize("use_shared_memory", [True, False])
    async def test_returns_an_independent_copy(self, use_async_staging: bool, use_shared_memory: bool):
        options = StagingOptions(use_async_staging=use_async_staging, use_shared_memory=use_shared_memory)
        source = state()
        async with AsyncStager(options) as stager:
            staged = await stager.stage(source)
        for tensor in source["model"].values():  # type: ignore[attr-defined]
            tensor.zero_()
        source["step"] = 4
        assert staged["step"] == 3
        assert values(staged) == [1, 2, 3, 4]

    async def test_an_earlier_result_is_never_overwritten(self):
        async with AsyncStager() as stager:
            kept = [await stager.stage(state(10.0 * n)) for n in range(6)]
            assert [values(tree)[0] for tree in kept] == [0, 10, 20, 30, 40, 50]
            assert stager.statistics().leases == 6

    async def test_memory_is_used_again_once_the_result_has_died(self):
        source = state(size=MIB // 4)
        async with AsyncStager() as stager:
            for _ in range(10):
                staged = await stager.stage(source)
                del staged
            assert stager.statistics().arenas <= 2

    async def test_a_view_of_a_staged_tensor_holds_its_memory(self):
        async with AsyncStager() as stager:
            staged = await stager.stage({"a": torch.arange(1000.0)})
            part = staged["a"][5:7]
            del staged
            for n in range(3):
                await stager.stage({"a": torch.full((1000,), float(n))})
            assert part.tolist() == [5, 6]

    async def test_many_tasks_get_a_copy_each(self):
        sources = [state(100.0 * n) for n in range(20)]
        async with AsyncStager() as stager:
            staged = await asyncio.gather(*(stager.stage(source) for source in sources))
        assert [values(tree)[0] for tree in staged] == [100.0 * n for n in range(20)]
        storages = {tree["model"]["p0"].data_ptr() for tree in staged}
        assert len(storages) == 20

    async def test_a_coroutine_that_is_never_awaited_changes_nothing(self):
        async with AsyncStager() as stager:
            stager.stage(state()).close()
            assert stager.statistics().stagings == 0
            assert stager.statistics().arenas == 0

    async def test_the_second_staging_replays_the_plan_of_the_first(self):
        source = state()
        async with AsyncStager() as stager:
            for _ in range(4):
                await stager.stage(source)
            statistics = stager.statistics()
        assert (statistics.plans_compiled, statistics.plans_replayed) == (1, 3)
        assert statistics.stagings == 4
        assert statistics.leaves == 16
        assert statistics.nbytes == 4 * 16000

    async def test_prewarm_has_memory_ready(self):
        async with AsyncStager() as stager:
            await stager.prewarm(state(size=MIB))
            before = stager.statistics()
            staged = await stager.stage(state(size=MIB))
            assert before.leases == 0
            assert stager.statistics().arenas == before.arenas == 1
            assert values(staged) == [1, 2, 3, 4]

    async def test_goes_on_after_an_error_in_a_leaf(self):
        async with AsyncStager() as stager:
            with pytest.raises(UnsupportedLeafError, match=r"\['model'\]\['bad'\]"):
                await stager.stage({"model": {"bad": torch.empty(3, device="meta")}})
            assert stager.statistics().arenas == 0
            assert values(await stager.stage(state())) == [1, 2, 3, 4]

    async def test_passes_through_an_error_of_an_object_that_is_copied(self):
        class Broken:
            def __deepcopy__(self, memo: object) -> object:
                raise RuntimeError("not today")

        async with AsyncStager() as stager:
            with pytest.raises(UnsupportedLeafError, match="not today") as caught:
                await stager.stage({"a": [Broken()]})
            assert isinstance(caught.value.__cause__, RuntimeError)

    async def test_a_deepcopy_that_shares_tensors_is_refused_with_advice_that_works(self):
        class Batch:
            """As those of graphs: its copy shares what is not in its store."""

            def __init__(self) -> None:
                self.store, self.slices = {"x": torch.ones(2)}, {"x": torch.zeros(2)}

            def __deepcopy__(self, memo: dict[int, object]) -> object:
                result = copy.copy(self)
                result.store = copy.deepcopy(self.store, memo)
                return result

            def to_dict(self) -> dict[str, object]:
                return dict(self.store)

        batch = Batch()
        async with AsyncStager() as stager:
            with pytest.raises(UnsupportedLeafError, match=r"\['batch'\].*Batch.*such as its to_dict\(\)"):
                await stager.stage({"batch": batch})
            staged = await stager.stage({"batch": batch.to_dict()})
        assert staged["batch"]["x"] is not batch.store["x"]
        assert torch.equal(staged["batch"]["x"], batch.store["x"])


@pytest.mark.asyncio
class TestBudget:
    async def test_a_staging_over_the_budget_waits_for_a_lease_to_end(self):
        async with AsyncStager(StagingOptions(max_host_bytes=6 * MIB)) as stager:
            first = await stager.stage({"a": torch.ones(MIB)})
            task = asyncio.ensure_future(stager.stage({"a": torch.zeros(MIB)}))
            await until(lambda: stager.statistics().waiting == 1)
            del first
            assert float((await task)["a"].sum()) == 0

    async def test_the_wait_can_be_cancelled(self):
        async with AsyncStager(StagingOptions(max_host_bytes=6 * MIB)) as stager:
            first = await stager.stage({"a": torch.ones(MIB)})
            task = asyncio.ensure_future(stager.stage({"a": torch.zeros(MIB)}))
            await until(lambda: stager.statistics().waiting == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert stager.statistics().waiting == 0
            assert float(first["a"].sum()) == MIB

    async def test_what_can_never_fit_is_refused_at_once(self):
        async with AsyncStager(StagingOptions(max_host_bytes=MIB)) as stager:
            with pytest.raises(HostMemoryError, match="max_host_bytes"):
                await stager.stage({"a": torch.ones(MIB)})


@pytest.mark.asyncio
class TestTorn:
    async def test_a_tensor_that_changes_before_it_is_captured(self):
        source = state()
        async with AsyncStager() as stager:
            with copies_held(stager) as release:
                task = asyncio.ensure_future(stager.stage(source))
                await until_copies_wait(stager)
                source["model"]["p2"].add_(1)  # type: ignore[index]
                release.set()
                with pytest.raises(TornSnapshotError) as caught:
                    await task
            assert caught.value.paths == ("state_dict['model']['p2']",)
            assert stager.statistics().leases == 0

    async def test_a_container_that_changes_before_it_is_captured(self):
        source = state()
        async with AsyncStager() as stager:
            with copies_held(stager) as release:
                task = asyncio.ensure_future(stager.stage(source))
                await until_copies_wait(stager)
                source["step"] += 1  # type: ignore[operator]
                release.set()
                with pytest.raises(TornSnapshotError) as caught:
                    await task
            assert caught.value.paths == ("state_dict['step']",)

    async def test_detection_can_be_switched_off(self):
        source = state()
        async with AsyncStager(StagingOptions(detect_torn=False)) as stager:
            with copies_held(stager) as release:
                task = asyncio.ensure_future(stager.stage(source))
                await until_copies_wait(stager)
                source["step"] += 1  # type: ignore[operator]
                release.set()
                assert (await task)["step"] == 3


@pytest.mark.asyncio
async def test_many_new_leaves_are_planned_beside_the_copies_of_other_stagings() -> None:
    source = {str(number): torch.full((2,), float(number)) for number in range(5000)}
    async with AsyncStager() as stager:
        with copies_held(stager) as release:
            task = asyncio.ensure_future(stager.stage(source))
            with anyio.fail_after(seconds(10)):
                await until_copies_wait(stager)
            release.set()
            staged = await task
    assert all(torch.equal(staged[key], value) for key, value in source.items())


@pytest.mark.parametrize("backend", [3, "cuda", SimulatedAccelerator])
def test_what_is_no_backend(backend: Any) -> None:
    with pytest.raises(TypeError, match=r"backend must be an aiostage\.Backend"):
        AsyncStager(backend=backend)


@pytest.mark.asyncio
class TestRestore:
    async def test_what_does_not_fit_is_said_of_the_copy(self):
        async with AsyncStager() as stager:
            staged = await stager.stage({"a": torch.ones(3)})
            with pytest.raises(CheckpointMismatchError, match=r"^the staged copy does not fit .* unexpected in the st"):
                await stager.restore(staged, into={"b": torch.ones(3)})

    async def test_copies_values_back_in_place(self):
        live = state()
        addresses = [tensor.data_ptr() for tensor in live["model"].values()]  # type: ignore[attr-defined]
        async with AsyncStager() as stager:
            staged = await stager.stage(live)
            for tensor in live["model"].values():  # type: ignore[attr-defined]
                tensor.fill_(-1)
            await stager.restore(staged, into=live)
        assert values(live) == [1, 2, 3, 4]
        assert [tensor.data_ptr() for tensor in live["model"].values()] == addresses  # type: ignore[attr-defined]

    async def test_names_every_difference_and_changes_nothing(self):
        live = {"a": torch.ones(3), "b": torch.ones(2), "c": torch.ones(2)}
        staged = {"a": torch.zeros(4), "b": torch.zeros(2), "d": torch.zeros(2)}
        async with AsyncStager() as stager:
            with pytest.raises(StagingError) as caught:
                await stager.restore(staged, into=live)  # type: ignore[type-var]
        assert caught.value.missing == ("state_dict['c']",)  # type: ignore[attr-defined]
        assert caught.value.unexpected == ("state_dict['d']",)  # type: ignore[attr-defined]
        assert "['a']" in str(caught.value)
        assert all(float(tensor.sum()) == len(tensor) for tensor in live.values())

    @pytest.mark.filterwarnings("ignore:.*support is experimental")
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    async def test_every_dtype_that_is_staged(self, dtype: torch.dtype):
        def tree(seed: int) -> dict[str, torch.Tensor]:
            memory = torch.arange(64, dtype=torch.uint8) * seed % (2 if dtype is torch.bool else 251)
            base = torch.empty(0, dtype=dtype).set_(memory.untyped_storage(), 0, (64 // dtype.itemsize,))
            # Of the second, neighbours in memory are no neighbours in the tensor; the third shares memory with it.
            return {"flat": base[:2], "strided": base[2:4].view(2, 1).t(), "tied": base[2:3]}

        live, other = tree(37), tree(1)
        async with AsyncStager() as stager:
            staged = await stager.stage(live)
            await stager.restore(staged, into=other)
        assert memory_of(other["flat"]) == memory_of(live["flat"])

    async def test_parameters_that_require_gradients(self):
        module = torch.nn.Linear(3, 2)
        before = module.weight.detach().clone()
        async with AsyncStager() as stager:
            staged = await stager.stage(dict(module.named_parameters()))
            with torch.no_grad():
                module.weight.zero_()
            await stager.restore(staged, into=dict(module.named_parameters()))
        assert torch.equal(module.weight, before)
        assert module.weight.requires_grad


class TestBuilding:
    @pytest.mark.parametrize("name", ["use_pinned_memory", "use_non_blocking_copy"])
    def test_an_option_that_cannot_be_met_is_an_error_with_the_reason(self, name: str):
        if torch.accelerator.is_available():
            return
        with pytest.raises(AcceleratorUnavailableError, match=f"{name}=True cannot be met"):
            AsyncStager(StagingOptions(**{name: True}))

    def test_is_a_checkpoint_stager(self):
        assert issubclass(AsyncStager, CheckpointStager)
        assert "AsyncStager" in repr(AsyncStager())


@pytest.mark.asyncio
class TestClose:
    async def test_staged_trees_outlive_the_stager(self):
        async with AsyncStager() as stager:
            staged = await stager.stage(state())
        del stager
        gc.collect()
        assert values(staged) == [1, 2, 3, 4]

    async def test_memory_is_given_back_as_leases_end(self):
        stager = AsyncStager()
        staged = await stager.stage(state())
        await stager.aclose()
        assert stager.statistics().arenas == 1
        del staged
        await until(lambda: stager.statistics().arenas == 0)

    async def test_is_idempotent_and_refuses_what_comes_later(self):
        stager = AsyncStager()
        await stager.aclose()
        await stager.aclose()
        with pytest.raises(StagerClosedError):
            stager.stage({})
        with pytest.raises(StagerClosedError):
            stager.snapshot({})
        with pytest.raises(StagerClosedError):
            await stager.restore({}, into={})
        with pytest.raises(StagerClosedError):
            await stager.prewarm({})
        with pytest.raises(StagerClosedError):
            await stager.share({})

    async def test_a_staging_made_before_and_begun_after_is_refused(self):
        stager = AsyncStager()
        coroutine = stager.stage(state())
        await stager.aclose()
        with pytest.raises(StagerClosedError):
            await coroutine

    async def test_stagings_under_way_end_with_an_error(self):
        stager = AsyncStager()
        with copies_held(stager) as release:
            task = asyncio.ensure_future(stager.stage(state()))
            await until_copies_wait(stager)
            closing = asyncio.ensure_future(stager.aclose())
            await asyncio.sleep(0)
            release.set()
            await closing
            with pytest.raises(StagerClosedError):
                await task
        assert stager.statistics().leases == 0

    async def test_cancelled_waits_for_the_copies_of_all_stagings(self):
        stager = AsyncStager()
        gates = {stager._resources.workers.job(): threading.Event() for _ in range(2)}
        for job, gate in gates.items():
            job.put(partial(gate.wait, seconds(10)))
            stager._resources.running.add(job)
        await until(lambda: all(job._running for job in gates))
        for job in gates:
            job.close()
        closing = asyncio.ensure_future(stager.aclose())
        await asyncio.sleep(0)
        closing.cancel()
        # In the order in which they are waited for.
        first, second = stager._resources.running
        gates[first].set()
        await until(first.finished)
        for _ in range(10):
            await asyncio.sleep(0)
        assert not closing.done()
        gates[second].set()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert second.finished()

    async def test_waiters_for_the_budget_end_with_an_error(self):
        stager = AsyncStager(StagingOptions(max_host_bytes=6 * MIB))
        first = await stager.stage({"a": torch.ones(MIB)})
        task = asyncio.ensure_future(stager.stage({"a": torch.zeros(MIB)}))
        await until(lambda: stager.statistics().waiting == 1)
        await stager.aclose()
        with pytest.raises(StagerClosedError):
            await task
        del first

    async def test_may_be_entered_and_left_in_different_tasks(self):
        stager = AsyncStager()
        await asyncio.ensure_future(stager.__aenter__())
        assert values(await asyncio.ensure_future(stager.stage(state()))) == [1, 2, 3, 4]
        await asyncio.ensure_future(stager.__aexit__(None, None, None))
        with pytest.raises(StagerClosedError):
            stager.stage({})


class TestLoops:
    def test_two_loops_in_two_threads_have_a_stager_each(self):
        failures: list[BaseException] = []

        async def work(seed: float) -> None:
            async with AsyncStager() as stager:
                for n in range(20):
                    assert values(await stager.stage(state(seed + n)))[0] == seed + n

        def run(seed: float) -> None:
            try:
                asyncio.run(work(seed))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=run, args=(1000.0 * n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures

    def test_a_hold_is_counted_in_cpu_time_and_by_the_clock(self):
        def wait(path: object, value: object) -> bool:
            time.sleep(0.1)
            return False

        async def close() -> None:
            await coroutine
            await stager.aclose()

        stager = AsyncStager(StagingOptions(max_loop_hold=math.inf, passthrough=wait))
        # The collector computes, too, in whichever step it comes.
        gc.collect()
        gc.disable()
        try:
            coroutine = stager.stage({"a": torch.ones(1)})
            asyncio.run(close())
        finally:
            gc.enable()
        statistics = stager.statistics()
        assert statistics.longest_loop_hold_elapsed >= 0.1
        assert 0 < statistics.longest_loop_hold < 0.05

    def test_one_stager_may_serve_loop_after_loop(self):
        stager = AsyncStager()
        for n in range(3):
            assert values(asyncio.run(_stage(stager, state(n))))[0] == n
        asyncio.run(stager.aclose())

    def test_a_loop_that_ends_with_a_staging_in_flight_leaves_a_stager_that_works(self):
        stager = AsyncStager()
        loop = asyncio.new_event_loop()
        with copies_held(stager) as release:
            task = loop.create_task(_stage(stager, state()))
            loop.run_until_complete(until_copies_wait(stager))
            # No cancellation comes: the loop is gone, as after an error in the program around it.
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            loop.close()
            task.get_coro().close()  # type: ignore[union-attr]
            release.set()
        del task
        gc.collect()
        assert values(asyncio.run(_stage(stager, state(5.0))))[0] == 5
        asyncio.run(stager.aclose())
        assert stager.statistics().leases == 0

    def test_a_closed_loop_is_a_clear_error(self):
        stager = AsyncStager()
        loop = asyncio.new_event_loop()
        coroutine = stager.stage(state())
        loop.close()
        with pytest.raises(RuntimeError, match="closed"):
            loop.run_until_complete(coroutine)
        coroutine.close()
        asyncio.run(stager.aclose())


async def _stage(stager: AsyncStager, tree: dict[str, object]) -> dict[str, object]:
    return await stager.stage(tree)


@pytest.mark.anyio
async def test_works_on_trio() -> None:
    async with AsyncStager() as stager:
        staged = await stager.stage(state())
        async with stager.snapshot(state(7.0)) as snapshot:
            await snapshot.captured()
            assert values(await snapshot.result())[0] == 7
        with anyio.move_on_after(0):
            await stager.stage(state())
        assert values(staged) == [1, 2, 3, 4]
    assert stager.statistics().arenas <= 2


@pytest.mark.asyncio
@pytest.mark.parametrize("extra", [{}, {"set": {1, 2}}], ids=["plain", "general"])
async def test_an_ordered_dict_whose_order_was_changed(extra: dict[str, Any]) -> None:
    moved = OrderedDict((key, torch.full((2,), float(key))) for key in range(5000))
    small = OrderedDict((key, moved[key]) for key in range(3))
    moved.move_to_end(7)
    small.move_to_end(0)
    async with AsyncStager() as stager:
        staged = await stager.stage({"moved": moved, "small": small, **extra})
    assert list(staged["moved"]) == list(moved)
    assert list(staged["small"]) == [1, 2, 0]
