"""Staging from real CUDA devices: beside training, with several streams, devices and loops, and copies left behind."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys

import pytest
import torch

from aiostage import AsyncStager, StagerClosedError, StagingOptions, TornSnapshotError, wait_event
from aiostage._copy.pending import in_flight
from tests.patience import seconds
from tests.staging.holding import until
from tests.threads import in_two_threads

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
MIB = 2**20
CYCLES_OF_A_LONG_KERNEL = 100_000_000


def busy() -> None:
    """Keep the current stream busy for some 50 ms."""
    torch.cuda._sleep(CYCLES_OF_A_LONG_KERNEL)


def model_with_statistics() -> torch.nn.Module:
    layers = [torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.BatchNorm1d(1024)) for _ in range(8)]
    return torch.nn.Sequential(*layers).to(DEVICE)


@pytest.mark.asyncio
class TestBesideTraining:
    @pytest.mark.parametrize(
        "options",
        [
            StagingOptions(),
            StagingOptions(use_pinned_memory=False),
            StagingOptions(low_priority_copies=False),
            StagingOptions(max_bytes_in_flight=16 * MIB),
            StagingOptions(use_non_blocking_copy=False),
        ],
    )
    async def test_every_step_is_staged_as_it_was_before_it(self, options: StagingOptions):
        model = model_with_statistics()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        model(torch.randn(64, 1024, device=DEVICE)).square().mean().backward()
        optimizer.step()
        live = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        buffers = [("model", name) for name, _ in model.named_buffers()]
        async with AsyncStager(options) as stager:
            for _ in range(10):
                torch.cuda.synchronize()
                expected = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
                async with stager.snapshot(live) as snapshot:
                    snapshot.order_before(parts=buffers)
                    model(torch.randn(64, 1024, device=DEVICE)).square().mean().backward()
                    snapshot.order_before()
                    optimizer.step()
                    optimizer.zero_grad()
                    staged = await snapshot.result()
                for name, tensor in expected.items():
                    assert torch.equal(staged["model"][name], tensor), name
                del staged

    async def test_a_change_that_is_not_ordered_is_torn(self):
        tensor = torch.zeros(64 * MIB, device=DEVICE)
        async with AsyncStager() as stager, stager.snapshot({"a": tensor}) as snapshot:
            tensor.add_(1)
            with pytest.raises(TornSnapshotError):
                await snapshot.result()

    async def test_cast_on_the_way(self):
        state = {str(n): torch.full((MIB,), float(n), device=DEVICE) for n in range(4)}
        async with AsyncStager(StagingOptions(dtype=torch.bfloat16)) as stager:
            staged = await stager.stage(state)
        assert all(torch.equal(staged[name], tensor.cpu().bfloat16()) for name, tensor in state.items())


@pytest.mark.asyncio
class TestStreams:
    async def test_order_before_on_a_stream_of_the_callers(self):
        stream = torch.cuda.Stream()
        for kind in (stream, torch.Stream(DEVICE)):
            state = {str(n): torch.full((8 * MIB,), 1.0, device=DEVICE) for n in range(8)}
            torch.cuda.synchronize()
            async with AsyncStager() as stager, stager.snapshot(state) as snapshot:
                snapshot.order_before(kind)
                with kind:
                    for tensor in state.values():
                        tensor.fill_(-1)
                staged = await snapshot.result()
                assert all(bool((tensor == 1).all()) for tensor in staged.values())
            torch.cuda.synchronize()

    async def test_stagings_from_two_streams_at_once(self):
        async with AsyncStager() as stager:
            coroutines = []
            for value in (1, 2):
                with torch.cuda.stream(torch.cuda.Stream()):
                    busy()
                    coroutines.append(stager.stage({"a": torch.full((4 * MIB,), float(value), device=DEVICE)}))
            first, second = await asyncio.gather(*coroutines)
        assert (float(first["a"].mean()), float(second["a"].mean())) == (1, 2)

    async def test_hundreds_of_events_at_once(self):
        events = []
        for _ in range(300):
            torch.cuda._sleep(1_000_000)
            events.append(torch.cuda.current_stream().record_event())
        await asyncio.gather(*map(wait_event, events))
        assert all(event.query() for event in events)


@pytest.mark.asyncio
class TestUnderWay:
    async def test_a_closed_stager_leaves_nothing_in_the_air(self):
        state = {str(n): torch.ones(16 * MIB, device=DEVICE) for n in range(8)}
        stager = AsyncStager()
        await stager.prewarm(state)
        busy()
        task = asyncio.ensure_future(stager.stage(state))
        await until(lambda: len(in_flight) > 0)
        await stager.aclose()
        with pytest.raises(StagerClosedError):
            await task
        del task, state
        gc.collect()
        await until(lambda: len(in_flight) == 0)

    async def test_packed_leaves_lie_on_the_device_once(self):
        state = {str(n): torch.ones(8192, device=DEVICE) for n in range(8000)}
        async with AsyncStager() as stager:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            await stager.stage(state)
            assert torch.cuda.max_memory_allocated() - before <= 3 * 32 * MIB


def test_two_event_loops_share_a_device() -> None:
    async def work(number: int) -> None:
        async with AsyncStager() as stager:
            tensor = torch.full((4 * MIB,), float(number), device=DEVICE)
            for _ in range(20):
                assert float((await stager.stage({"a": tensor}))["a"].mean()) == number

    in_two_threads(lambda number: asyncio.run(work(number)))


def test_a_loop_that_is_closed_leaves_its_copies_to_a_thread() -> None:
    state = {str(n): torch.ones(16 * MIB, device=DEVICE) for n in range(4)}
    stager = AsyncStager()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(stager.prewarm(state))
    busy()
    coroutine = stager.stage(state)
    task = loop.create_task(coroutine)
    loop.run_until_complete(until(lambda: len(in_flight) > 0))
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    coroutine.close()
    del task, coroutine, state
    gc.collect()
    asyncio.run(until(lambda: len(in_flight) == 0))
    asyncio.run(stager.aclose())


SECOND_DEVICE_ONLY = """
import asyncio, torch, aiostage

async def main():
    torch.cuda.set_device(1)
    state = {str(n): torch.ones(1000 * (n + 1), device="cuda:1") for n in range(100)}
    async with aiostage.AsyncStager(aiostage.StagingOptions(use_pinned_memory=True)) as stager:
        async with stager.snapshot(state) as snapshot:
            snapshot.order_before()
            staged = await snapshot.result()
        await stager.restore(staged, into=state)
    assert not torch._C._cuda_hasPrimaryContext(0), "a context on a device that was not used"

asyncio.run(main())
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="PyTorch finds fewer than two CUDA devices on this machine")
class TestTwoDevices:
    @pytest.mark.asyncio
    async def test_one_tree(self):
        state = {}
        for index in range(2):
            tensor = torch.zeros(4 * MIB, device=f"cuda:{index}")
            with torch.cuda.device(index):
                busy()
            state[str(index)] = tensor.fill_(index + 1)
        async with AsyncStager() as stager, stager.snapshot(state) as snapshot:
            snapshot.order_before()
            for tensor in state.values():
                tensor.fill_(-1)
            staged = await snapshot.result()
            assert [float(staged[str(index)].mean()) for index in range(2)] == [1, 2]

    def test_a_device_that_is_not_used_gets_no_context(self):
        subprocess.run([sys.executable, "-c", SECOND_DEVICE_ONLY], check=True, timeout=seconds(55))
