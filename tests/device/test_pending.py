"""Launching copies: in which order, on which streams, what they keep alive, and what a launch that fails leaves."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import aiostage
from aiostage import AsyncStager, StagingError, StagingOptions, TornSnapshotError
from aiostage._copy.pending import PendingCopies, PendingCopy, in_flight
from aiostage._device import CallerStreams, CopyStreams
from aiostage.testing.clock import VirtualClock
from tests.device.accelerators import ON_A_DEVICE, Accelerator, DeviceError, seeds, simulator_only
from tests.staging.holding import until

SIZE = 64
MIB = 2**20


def full(accelerator: Accelerator, value: float, size: int = SIZE) -> torch.Tensor:
    return accelerator.to_device(torch.full((size,), float(value)))


class FailsHalfWay(Accelerator):
    """Enqueues all copies of a call but the last, and then raises, as often as it is told to."""

    failures = 0

    def copy(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], stream: Any) -> int:
        if not self.failures:
            return super().copy(destinations, sources, stream)
        self.failures -= 1
        super().copy(destinations[:-1], sources[:-1], stream)
        raise torch.OutOfMemoryError("no room to cast")


class CallsBack(Accelerator):
    """Lets something happen between one batch and the next."""

    after_copy: Callable[[], object] = staticmethod(lambda: None)

    def copy(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], stream: Any) -> int:
        launches = super().copy(destinations, sources, stream)
        self.after_copy()
        return launches


@pytest.mark.asyncio
class TestAFailureHalfWay:
    async def test_keeps_the_memory_of_what_is_under_way(self):
        with FailsHalfWay(clock=VirtualClock()) as accelerator:
            state = {str(n): full(accelerator, n, MIB) for n in range(3)}
            accelerator.synchronize()
            async with AsyncStager(backend=accelerator) as stager:
                accelerator.failures = 1
                with pytest.raises(torch.OutOfMemoryError, match="no room to cast") as caught:
                    await stager.stage(state)
                assert stager.statistics().leases == 1, "copies into it are under way"
                # Leaving the block would raise if one of them met memory that is gone.
                accelerator.synchronize()
                await until(lambda: len(in_flight) == 0)
                await until(lambda: stager.statistics().leases == 0)
                assert caught.value.__traceback__ is not None, "which keeps nothing alive, nor needs the collector"

    async def test_of_a_copy_through_a_window_keeps_no_memory_by_its_error(self):
        with FailsHalfWay(clock=VirtualClock()) as accelerator:
            state = {str(n): full(accelerator, n, 9 * MIB) for n in range(3)}
            accelerator.synchronize()
            async with AsyncStager(StagingOptions(max_host_bytes=80 * MIB), backend=accelerator) as stager:
                async with stager.snapshot(state, streamed=True) as snapshot:
                    assert snapshot.window is not None
                    accelerator.failures = 1
                    errors = []
                    for wait in (snapshot.fill, snapshot.captured):
                        with pytest.raises(torch.OutOfMemoryError, match="no room to cast") as caught:
                            await wait()
                        errors.append(caught.value)
                    accelerator.synchronize()
                    await until(lambda: len(in_flight) == 0)
                    gc.collect()
                    assert stager.statistics().leases == 0
                assert len(errors) == 2, "kept until here"

    async def test_of_a_restore_leaves_nothing_in_the_air(self):
        with FailsHalfWay(seed=1, spontaneous=True) as accelerator:
            live = {str(n): full(accelerator, n, 3 * MIB) for n in range(8)}
            async with AsyncStager(backend=accelerator) as stager:
                staged = await stager.stage(live)
                accelerator.failures = 1
                with pytest.raises(torch.OutOfMemoryError):
                    await stager.restore(staged, into=live)
                accelerator.synchronize()
                await until(lambda: len(in_flight) == 0)
                await stager.restore(staged, into=live)
                accelerator.synchronize()
                assert [float(live[str(n)].mean()) for n in range(8)] == list(range(8))

    async def test_of_the_device_at_the_call_is_raised_where_it_is_awaited(self):
        with Accelerator(clock=VirtualClock()) as accelerator:
            state = {"a": full(accelerator, 1)}
            async with AsyncStager(backend=accelerator) as stager:
                accelerator.fail_device()
                coroutine = stager.stage(state)
                with pytest.raises(StagingError, match="did not accept the copy") as caught:
                    await coroutine
                assert isinstance(caught.value.__cause__, DeviceError)
                accelerator.recover()


@pytest.mark.asyncio
class TestStreams:
    async def test_a_launch_stays_on_the_stream_that_waits(self):
        """Another staging fails meanwhile, after which the next ones are to have a new stream."""
        for seed in seeds(4):
            with CallsBack(seed=seed) as accelerator:
                state = {str(n): full(accelerator, 0, 5 * MIB) for n in range(4)}
                accelerator.synchronize()
                for tensor in state.values():
                    accelerator.launch(lambda t: t.fill_(7), tensor, seconds=1e-3)
                async with AsyncStager(backend=accelerator) as stager:
                    streams, device = stager._resources.streams, accelerator.devices[0]
                    assert streams is not None
                    accelerator.after_copy = lambda: streams.forget(streams.of(device), None)  # noqa: B023
                    task = asyncio.ensure_future(stager.stage(state))
                    await until(lambda: len(in_flight) == 4)
                    accelerator.synchronize()
                    staged = await task
                assert all(bool((tensor == 7).all()) for tensor in staged.values())

    async def test_what_the_caller_writes_during_the_walk_is_seen_on_its_stream(self):
        """The versions that count are those that the walk meets, so the copies have to follow those writes."""
        torn = seen = 0
        for seed in range(28 if ON_A_DEVICE else 100):
            with Accelerator(seed=seed, spontaneous=True) as accelerator:
                # Lists, so that the walk takes a while until it comes to the tensors.
                lists = [[n] for n in range(600)]
                state = {"lists": lists, "last": {str(n): full(accelerator, 0) for n in range(20)}}
                accelerator.synchronize()
                stream = accelerator.side_stream(accelerator.devices[0])

                async def result(snapshot):
                    async with snapshot:
                        return await snapshot.result()

                async with AsyncStager(StagingOptions(max_loop_hold=1e-9), backend=accelerator) as stager:
                    with stream:
                        snapshot = stager.snapshot(state)
                        task = asyncio.ensure_future(result(snapshot))
                    for _ in range(seed % 14 * 120):
                        await asyncio.sleep(0)
                    # How many turns the walk takes depends on the threads beside it, so some writes come after it.
                    walking = snapshot.nbytes == 0
                    accelerator.launch(lambda t: t.fill_(7), state["last"]["19"], seconds=1e-3, stream=stream)
                    try:
                        staged = await task
                    except TornSnapshotError:
                        torn += 1
                    else:
                        seen += walking
                        assert bool((staged["last"]["19"] == (7 if walking else 0)).all())
        assert torn
        assert seen


@pytest.mark.asyncio
class TestOrder:
    async def test_what_is_small_comes_first_and_then_the_tree(self):
        with Accelerator(clock=VirtualClock()) as accelerator:
            state = {
                "last": full(accelerator, 1, 6 * MIB),
                "half": full(accelerator, 1, 6 * MIB).half(),
                "float": full(accelerator, 2, 6 * MIB),
                "counter": accelerator.to_device(torch.tensor(3)),
                "host": torch.ones(3),
                "statistics": full(accelerator, 4),
            }
            state["half"] = accelerator.to_device(torch.ones(6 * MIB).half())
            accelerator.synchronize()
            order = []
            async with AsyncStager(backend=accelerator) as stager, stager.snapshot(state) as snapshot:
                accelerator.synchronize()
                async for leaf in snapshot:
                    order.append(leaf.path[0])
            assert order == ["host", "counter", "statistics", "last", "half", "float"]

    @simulator_only
    async def test_small_leaves_are_free_while_large_ones_are_not(self):
        with Accelerator(clock=VirtualClock()) as accelerator:
            state = {"large": full(accelerator, 1, 9 * MIB), "small": [full(accelerator, 2)]}
            accelerator.synchronize()
            async with AsyncStager(backend=accelerator) as stager, stager.snapshot(state) as snapshot:
                waiting = asyncio.ensure_future(snapshot.source_free(("small",)))
                copies = 0
                while not waiting.done():
                    copies += accelerator.statistics().pending > 0 and accelerator.step()
                    await asyncio.sleep(0.001)
                await waiting
                assert accelerator.statistics().pending > 0, "the large one is still to be copied"
                accelerator.synchronize()
                await snapshot.captured()

    async def test_a_leaf_of_several_batches_is_free_when_its_last_byte_is(self):
        for order in (("a", "b"), ("b", "a")):
            with Accelerator(seed=1, spontaneous=True) as accelerator:
                tensors = {"a": full(accelerator, 1, 20 * MIB), "b": full(accelerator, 2, 20 * MIB)[::2]}
                state = {name: tensors[name] for name in order}
                async with AsyncStager(backend=accelerator) as stager, stager.snapshot(state) as snapshot:
                    async for leaf in snapshot:
                        assert bool((leaf.tensor == (1 if leaf.path == ("a",) else 2)).all())


@pytest.mark.asyncio
class TestOrderBeforeParts:
    async def test_only_their_changes_count_no_more(self):
        with Accelerator(clock=VirtualClock()) as accelerator:
            state = {"mean": full(accelerator, 1), "weight": full(accelerator, 1)}
            accelerator.synchronize()
            async with AsyncStager(backend=accelerator) as stager, stager.snapshot(state) as snapshot:
                snapshot.order_before(parts=[("mean",)])
                for tensor in state.values():
                    accelerator.launch(lambda t: t.fill_(2), tensor)
                accelerator.synchronize()
                with pytest.raises(TornSnapshotError) as caught:
                    await snapshot.result()
                assert caught.value.paths == ("state_dict['weight']",)

    async def test_changes_made_before_it_still_do(self):
        with Accelerator(clock=VirtualClock()) as accelerator:
            state = {"mean": full(accelerator, 1), "weight": full(accelerator, 1)}
            accelerator.synchronize()
            async with AsyncStager(backend=accelerator) as stager, stager.snapshot(state) as snapshot:
                accelerator.launch(lambda t: t.fill_(2), state["mean"])
                snapshot.order_before(parts=[("mean",)])
                snapshot.order_before()
                accelerator.synchronize()
                with pytest.raises(TornSnapshotError) as caught:
                    await snapshot.result()
                assert caught.value.paths == ("state_dict['mean']",)

    @simulator_only
    async def test_later_work_waits_for_the_parts_and_not_for_the_rest(self):
        with Accelerator(clock=VirtualClock(), bandwidth=1e9) as accelerator:
            state = {"weight": full(accelerator, 1, 9 * MIB), "mean": full(accelerator, 1)}
            accelerator.synchronize()
            began = accelerator.clock.time()
            async with AsyncStager(backend=accelerator) as stager, stager.snapshot(state) as snapshot:
                stream = accelerator.current_stream(accelerator.devices[0])
                snapshot.order_before(parts=[("mean",)])
                forward = stream.record_event()
                snapshot.order_before()
                step = stream.record_event()
                accelerator.synchronize()
                assert forward.completed_at is not None
                assert step.completed_at is not None
                assert forward.completed_at - began < 1e-3
                assert step.completed_at - began > 30e-3
                await snapshot.captured()

    async def test_an_unknown_part_is_an_error_and_orders_nothing(self):
        with Accelerator(clock=VirtualClock()) as accelerator:
            state = {"a": full(accelerator, 1)}
            accelerator.synchronize()
            async with AsyncStager(backend=accelerator) as stager, stager.snapshot(state) as snapshot:
                with pytest.raises(KeyError, match=r"state_dict\['b'\] does not lead to a tensor"):
                    snapshot.order_before(parts=[("a",), ("b",)])
                accelerator.launch(lambda t: t.fill_(2), state["a"])
                accelerator.synchronize()
                with pytest.raises(TornSnapshotError):
                    await snapshot.result()


@simulator_only
@pytest.mark.asyncio
async def test_packing_takes_the_device_memory_of_one_batch_and_not_of_all() -> None:
    with Accelerator(seed=1, spontaneous=True, memory_bytes=256 * MIB) as accelerator:
        state = {str(n): full(accelerator, n, 8192) for n in range(4000)}
        accelerator.synchronize()
        statistics = accelerator.statistics()
        before = statistics.allocated_bytes + statistics.cached_bytes
        assert before > 120 * MIB
        async with AsyncStager(backend=accelerator) as stager:
            staged = await stager.stage(state)
        assert all(float(staged[str(n)][-1]) == n for n in range(4000))
        statistics = accelerator.statistics()
        assert statistics.allocated_bytes + statistics.cached_bytes - before <= 2 * 32 * MIB


@pytest.mark.asyncio
@pytest.mark.parametrize("budget", [48 * MIB, 200 * MIB, None])
async def test_what_is_copied_releases_memory_that_the_rest_waits_for(budget: int | None, tmp_path: Path) -> None:
    with Accelerator(seed=1, spontaneous=True) as accelerator:
        state = {
            "large": [full(accelerator, n, 6 * MIB) for n in range(3)],
            "small": [full(accelerator, n) for n in range(50)],
            "counter": accelerator.to_device(torch.tensor(5)),
            "host": torch.full((3 * MIB,), 4.0),
        }
        accelerator.synchronize()
        async with AsyncStager(StagingOptions(max_host_bytes=budget), backend=accelerator) as stager:
            await aiostage.save(state, tmp_path / "saved", stager=stager)
        loaded = await aiostage.load(tmp_path / "saved")
    assert [float(tensor.mean()) for tensor in loaded["large"]] == [0, 1, 2]
    assert [float(tensor.mean()) for tensor in loaded["small"]] == list(range(50))
    assert (int(loaded["counter"]), float(loaded["host"].mean())) == (5, 4)


class Told:
    """Copies of nothing, for a stream whose events the test completes."""

    nbytes = copies = launches = 0

    def __init__(self, device: torch.device, number: int) -> None:
        self.device, self.number = device, number

    def enqueue(self, backend: Any, stream: Any) -> None:
        pass

    def take_memory(self) -> list[object]:
        return []


@simulator_only
@pytest.mark.asyncio
class TestBehindAFailedCopy:
    async def test_nothing_is_relied_on_and_the_next_stream_is_another(self):
        with Accelerator(clock=VirtualClock()) as accelerator:
            accelerator.to_device(torch.ones(1))
            device = accelerator.devices[0]
            streams = CopyStreams(accelerator)

            def copies() -> PendingCopies:
                made = PendingCopies(accelerator, streams, CallerStreams.record(accelerator))
                made.follow_the_caller(device)
                return made

            first, second = copies(), copies()
            failing, before, behind = first.enqueue(Told(device, 0)), second.enqueue(Told(device, 0)), Told(device, 1)
            waiting = asyncio.ensure_future(second.wait(before))
            await asyncio.sleep(0)
            failing.event = Raises()
            with pytest.raises(StagingError, match="out of luck"):
                await first.wait(failing)
            accelerator.synchronize()
            for late in (waiting, second.wait(second.enqueue(behind))):
                with pytest.raises(StagingError, match=r"an earlier copy on the same stream .* out of luck") as caught:
                    await late
                assert isinstance(caught.value.__cause__, ValueError)
            third = copies()
            copy = third.enqueue(Told(device, 0))
            accelerator.synchronize()
            await third.wait(copy)
            assert copy.on is not failing.on
            for made in (first, second):
                made.abandon()
            await until(lambda: len(in_flight) == 0)


class Raises:
    """An event that fails."""

    def query(self) -> bool:
        raise ValueError("out of luck")


class Done:
    """An event that is done."""

    def query(self) -> bool:
        return True


@simulator_only
@pytest.mark.asyncio
async def test_copies_are_watched_though_the_system_grants_one_more_thread_only(monkeypatch: pytest.MonkeyPatch):
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with Accelerator(clock=VirtualClock()) as accelerator:
        accelerator.to_device(torch.ones(1))
        on = CopyStreams(accelerator).of(accelerator.devices[0])
        copy = PendingCopy(Done(), on, nbytes=1, number=0, copies=1, launches=1, keep=[torch.ones(1)])
        in_flight.add(copy)
        monkeypatch.setattr(threading.Thread, "start", refuse)
        in_flight.orphan([copy])
        await until(lambda: not copy.keep)
        await until(lambda: len(in_flight) == 0)
