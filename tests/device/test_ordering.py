"""Order on devices: the next step behind the copies, parts that are free before the rest, cancelled copies."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest
import torch

from aiostage import AsyncStager, StagerClosedError, StagingError, StagingOptions, TornSnapshotError
from aiostage.testing import at_every_await
from aiostage.testing.clock import VirtualClock
from tests.device.accelerators import Accelerator, CopyCounter, is_completed, seeds, simulator_only
from tests.staging.holding import until
from tests.threads import in_two_threads

SIZE = 64
MIB = 2**20


def full(accelerator: Accelerator, value: float, size: int = SIZE) -> torch.Tensor:
    return accelerator.to_device(torch.full((size,), float(value)))


@pytest.mark.asyncio
class TestOrderBefore:
    async def test_the_next_step_waits_on_the_device(self):
        for seed in seeds(100):
            with Accelerator(seed=seed, spontaneous=True) as accelerator:
                state = {str(n): full(accelerator, n) for n in range(10)}
                async with AsyncStager(backend=accelerator) as stager, stager.snapshot(state) as snapshot:
                    snapshot.order_before()
                    for tensor in state.values():
                        accelerator.launch(lambda t: t.fill_(-1), tensor)
                    staged = await snapshot.result()
                    assert [float(staged[str(n)].mean()) for n in range(10)] == list(range(10))

    async def test_on_a_stream_of_the_callers(self):
        for seed in seeds(50):
            with Accelerator(seed=seed, spontaneous=True) as accelerator:
                state = {"a": full(accelerator, 1)}
                stream = accelerator.side_stream(accelerator.devices[0])
                async with AsyncStager(backend=accelerator) as stager, stager.snapshot(state) as snapshot:
                    snapshot.order_before(stream)
                    with stream:
                        accelerator.launch(lambda t: t.fill_(-1), state["a"])
                    assert float((await snapshot.result())["a"].mean()) == 1

    async def test_without_it_the_change_is_torn(self):
        with Accelerator(clock=VirtualClock()) as accelerator:
            state = {"a": full(accelerator, 1)}
            accelerator.synchronize()
            async with AsyncStager(backend=accelerator) as stager, stager.snapshot(state) as snapshot:
                accelerator.launch(lambda t: t.fill_(-1), state["a"])
                accelerator.synchronize()
                with pytest.raises(TornSnapshotError, match=r"\['a'\]"):
                    await snapshot.result()

    async def test_changes_made_before_it_are_torn(self):
        with Accelerator(clock=VirtualClock()) as accelerator:
            state = {"a": full(accelerator, 1), "n": 1}
            accelerator.synchronize()
            async with AsyncStager(backend=accelerator) as stager, stager.snapshot(state) as snapshot:
                state["n"] = 2  # type: ignore[assignment]
                snapshot.order_before()
                accelerator.launch(lambda t: t.fill_(-1), state["a"])
                accelerator.synchronize()
                with pytest.raises(TornSnapshotError) as caught:
                    await snapshot.result()
                assert caught.value.paths == ("state_dict['n']",)

    async def test_host_tensors_are_copied_by_the_time_of_the_call(self):
        with Accelerator(clock=VirtualClock()) as accelerator:
            state = {"a": full(accelerator, 1), "step": torch.ones(3 * MIB)}
            async with AsyncStager(backend=accelerator) as stager, stager.snapshot(state) as snapshot:
                snapshot.order_before()
                state["step"].add_(1)
                accelerator.synchronize()
                assert float((await snapshot.result())["step"].mean()) == 1

    async def test_is_refused_while_threads_copy(self):
        from tests.staging.holding import copies_held

        async with AsyncStager() as stager:
            with copies_held(stager):
                async with stager.snapshot({"a": torch.ones(3)}) as snapshot:
                    with pytest.raises(StagingError, match="source_free"):
                        snapshot.order_before()

    async def test_after_capture_it_does_nothing(self):
        async with AsyncStager() as stager, stager.snapshot({"a": torch.ones(3)}) as snapshot:
            await snapshot.captured()
            snapshot.order_before()


@pytest.mark.asyncio
class TestSourceFree:
    @simulator_only
    async def test_a_part_is_free_before_the_rest(self):
        with Accelerator(clock=VirtualClock()) as accelerator:
            state = {"first": full(accelerator, 1, 9 * MIB), "second": [full(accelerator, 2, 9 * MIB)]}
            accelerator.synchronize()
            async with AsyncStager(backend=accelerator) as stager, stager.snapshot(state) as snapshot:
                waiting = asyncio.ensure_future(snapshot.source_free(("first",)))
                captured = asyncio.ensure_future(snapshot.captured())
                while not waiting.done():
                    accelerator.step()
                    for _ in range(5):
                        await asyncio.sleep(0)
                    await asyncio.sleep(0.0005)
                await waiting
                assert not captured.done()
                accelerator.synchronize()
                await snapshot.source_free(("second", 0))
                await snapshot.source_free()
                await captured

    async def test_an_unknown_part_is_an_error(self):
        async with AsyncStager() as stager, stager.snapshot({"a": torch.ones(3)}) as snapshot:
            with pytest.raises(KeyError, match="does not lead to a tensor"):
                await snapshot.source_free(("b",))
            await snapshot.source_free(("a",))
            await snapshot.captured()
            await snapshot.source_free()


@pytest.mark.asyncio
class TestManySmallTensors:
    async def test_launches_follow_the_bytes_and_not_the_tensors(self):
        with Accelerator(seed=1, spontaneous=True) as accelerator:
            counts = []
            for number in (100, 2000):
                state = {str(n): full(accelerator, n) for n in range(number)}
                async with AsyncStager(backend=accelerator) as stager:
                    staged = await stager.stage(state)
                    counts.append(stager.statistics())
                assert all(float(staged[str(n)][0]) == n for n in range(number))
        assert counts[0].copies == 1
        assert counts[1].copies <= 8
        assert counts[1].launches <= 40

    async def test_odd_leaves_between_small_ones(self):
        for seed in seeds(30):
            with Accelerator(seed=seed, spontaneous=True) as accelerator:
                state: dict[str, torch.Tensor] = {}
                for n in range(12):
                    base = torch.arange(12.0) + 100 * n
                    value = [base, base.reshape(3, 4).t(), base[::2], base.reshape(2, 6)][n % 4]
                    state[str(n)] = accelerator.to_device(value)
                state["half"] = accelerator.to_device(torch.arange(5).half())
                state["view"] = state["0"][3:7]
                expected = {name: tensor.clone() for name, tensor in state.items()}
                accelerator.synchronize()
                expected = {name: tensor.clone() for name, tensor in state.items()}
                async with AsyncStager(backend=accelerator) as stager:
                    staged = await stager.stage(state)
            for name, tensor in expected.items():
                assert torch.equal(staged[name], tensor), name
                assert staged[name].stride() == state[name].stride()

    async def test_cast_on_the_way(self):
        with Accelerator(seed=1, spontaneous=True) as accelerator:
            state = {str(n): full(accelerator, n) for n in range(20)} | {"i": accelerator.to_device(torch.arange(4))}
            async with AsyncStager(StagingOptions(dtype=torch.bfloat16), backend=accelerator) as stager:
                staged = await stager.stage(state)
        assert {tensor.dtype for tensor in staged.values()} == {torch.bfloat16, torch.int64}
        assert [float(staged[str(n)].float().mean()) for n in range(20)] == list(range(20))


@pytest.mark.asyncio
class TestBytesInFlight:
    @pytest.mark.parametrize("options", [{"max_bytes_in_flight": 80 * MIB}, {"use_non_blocking_copy": False}])
    async def test_are_limited(self, options: dict[str, int]):
        with Accelerator(seed=1, spontaneous=True) as accelerator:
            state = {str(n): full(accelerator, n, 6 * MIB) for n in range(8)}
            accelerator.synchronize()
            stager = AsyncStager(StagingOptions(**options), backend=accelerator)  # type: ignore[arg-type]
            async with stager, stager.snapshot(state) as snapshot:
                pending = snapshot._staging.progress.pending
                assert pending is not None
                assert sum(not is_completed(copy.event) for copy in pending) <= 4
                staged = await snapshot.result()
            assert [float(staged[str(n)].mean()) for n in range(8)] == list(range(8))


@pytest.mark.asyncio
class TestAbandoned:
    async def test_memory_is_kept_until_the_device_is_done(self):
        with Accelerator(clock=VirtualClock()) as accelerator:
            source = full(accelerator, 1)
            accelerator.synchronize()
            alive, launched = weakref.ref(source.untyped_storage()), CopyCounter(accelerator)
            async with AsyncStager(backend=accelerator) as stager:
                task = asyncio.ensure_future(stager.stage({"a": source}))
                await until(lambda: launched.count == 1)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                del source, task
                gc.collect()
                assert alive() is not None
                assert stager.statistics().leases == 1
                accelerator.synchronize()
                await until(lambda: stager.statistics().leases == 0 and alive() is None)

    async def test_also_by_a_closed_stager(self):
        with Accelerator(clock=VirtualClock()) as accelerator:
            source = full(accelerator, 1)
            accelerator.synchronize()
            alive, launched = weakref.ref(source.untyped_storage()), CopyCounter(accelerator)
            stager = AsyncStager(backend=accelerator)
            task = asyncio.ensure_future(stager.stage({"a": source}))
            await until(lambda: launched.count == 1)
            await stager.aclose()
            with pytest.raises(StagerClosedError):
                await task
            del source, task
            gc.collect()
            assert alive() is not None
            assert stager.statistics().leases == 1
            await until(lambda: accelerator.synchronize() or (stager.statistics().leases == 0 and alive() is None))

    async def test_cancelled_at_every_await_in_every_order(self):
        for seed in seeds(5):
            with Accelerator(seed=seed, spontaneous=True) as accelerator:
                state = {"a": full(accelerator, 1), "b": [full(accelerator, 2, 9 * MIB)], "c": torch.ones(3)}
                async with AsyncStager(StagingOptions(max_loop_hold=1e-9), backend=accelerator) as stager:
                    async for _ in at_every_await(lambda stager=stager, state=state: stager.stage(state)):  # type: ignore[misc]
                        staged = await stager.stage(state)
                        assert (float(staged["a"].mean()), float(staged["b"][0].mean())) == (1, 2)
                        del staged
                    accelerator.synchronize()
                    gc.collect()
                    await until(lambda stager=stager: stager.statistics().leases == 0)  # type: ignore[misc]


@pytest.mark.asyncio
class TestRestore:
    async def test_follows_the_caller_and_goes_before_what_comes_next(self):
        for seed in seeds(50):
            with Accelerator(seed=seed, spontaneous=True) as accelerator:
                live = {"a": full(accelerator, 1), "n": torch.ones(2)}
                async with AsyncStager(backend=accelerator) as stager:
                    staged = await stager.stage(live)
                    accelerator.launch(lambda t: t.fill_(9), live["a"], seconds=1e-3)
                    live["n"].fill_(9)
                    await stager.restore(staged, into=live)
                    seen = accelerator.empty(SIZE)
                    accelerator.launch(lambda to, source: to.copy_(source), seen, reads=[live["a"]])
                    accelerator.synchronize()
                    assert (float(seen.mean()), float(live["n"].mean())) == (1, 1)


def test_stagers_of_two_loops_share_a_device() -> None:
    with Accelerator(seed=1, spontaneous=True) as accelerator:
        tensors = [full(accelerator, n, 1000) for n in range(2)]

        async def work(number: int) -> None:
            async with AsyncStager(backend=accelerator) as stager:
                for _ in range(20):
                    assert float((await stager.stage({"a": tensors[number]}))["a"].mean()) == number

        in_two_threads(lambda number: asyncio.run(work(number)))


def test_a_loop_that_is_gone_leaves_its_copies_to_a_thread():
    with Accelerator(clock=VirtualClock()) as accelerator:
        state = {"a": full(accelerator, 1)}
        accelerator.synchronize()
        alive, launched = weakref.ref(state["a"].untyped_storage()), CopyCounter(accelerator)
        stager = AsyncStager(backend=accelerator)
        loop = asyncio.new_event_loop()
        coroutine = stager.stage(state)
        task = loop.create_task(coroutine)
        loop.run_until_complete(until(lambda: launched.count == 1))
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        loop.close()
        coroutine.close()
        del task, coroutine, state
        gc.collect()
        assert alive() is not None
        assert stager.statistics().leases == 1
        asyncio.run(until(lambda: accelerator.synchronize() or (alive() is None and stager.statistics().leases == 0)))
        asyncio.run(stager.aclose())


class Captures(Accelerator):
    """Has graphs, which are captured when the test says so."""

    capturing = False

    def is_capturing(self) -> bool:
        return self.capturing


@pytest.mark.asyncio
class TestGraphCapture:
    async def test_a_call_during_a_capture_is_refused_by_name(self):
        with Captures(clock=VirtualClock()) as accelerator:
            state = {"a": full(accelerator, 1)}
            async with AsyncStager(backend=accelerator) as stager:
                accelerator.capturing = True
                staging, restoring = stager.stage(state), stager.restore({"a": torch.ones(SIZE)}, into=state)
                accelerator.capturing = False
                for refused in (staging, restoring):
                    with pytest.raises(StagingError, match="captured into a graph"):
                        await refused

    async def test_what_is_in_host_memory_is_staged_all_the_same(self):
        with Captures(clock=VirtualClock()) as accelerator:
            live = full(accelerator, 1)
            accelerator.capturing = True
            for max_loop_hold in (1e-3, 1e-9):  # the walk ends in the call, or after it
                async with AsyncStager(StagingOptions(max_loop_hold=max_loop_hold), backend=accelerator) as stager:
                    staged = await stager.stage({"a": torch.ones(3), "more": [[n] for n in range(300)]})
                assert staged["a"].tolist() == [1] * 3
            del live
