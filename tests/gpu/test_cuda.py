"""Staging from a real CUDA device: order, lifetime, pinning, failures, and what is left behind."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from aiostage import AsyncStager, StagingOptions, wait_event
from tests.patience import seconds

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
MIB = 2**20
CYCLES_OF_A_LONG_KERNEL = 100_000_000


def busy() -> None:
    """Keep the current stream busy for some 50 ms."""
    torch.cuda._sleep(CYCLES_OF_A_LONG_KERNEL)


@pytest.fixture(autouse=True)
def _settled() -> Iterator[None]:
    yield
    torch.cuda.synchronize()


PINNED = pytest.mark.parametrize("use_pinned_memory", [True, False])


@pytest.mark.asyncio
class TestOrder:
    @PINNED
    async def test_sees_what_was_enqueued_before_the_call(self, use_pinned_memory: bool):
        async with AsyncStager(StagingOptions(use_pinned_memory=use_pinned_memory)) as stager:
            tensor = torch.zeros(4 * MIB, device=DEVICE)
            busy()
            tensor.fill_(7)
            assert bool(((await stager.stage({"a": tensor}))["a"] == 7).all())

    async def test_on_a_stream_of_the_callers(self):
        stream = torch.cuda.Stream()
        async with AsyncStager() as stager:
            tensor = torch.zeros(4 * MIB, device=DEVICE)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                busy()
                tensor.fill_(7)
                coroutine = stager.stage({"a": tensor})
            staged = await asyncio.ensure_future(coroutine)
            assert bool((staged["a"] == 7).all())

    async def test_the_next_step_waits_on_the_device(self):
        async with AsyncStager() as stager:
            state = {str(n): torch.full((4 * MIB,), float(n), device=DEVICE) for n in range(8)}
            await stager.prewarm(state)
            for _ in range(5):
                async with stager.snapshot(state) as snapshot:
                    snapshot.order_before()
                    for tensor in state.values():
                        tensor.add_(100)
                    staged = await snapshot.result()
                    assert [float(staged[str(n)][-1]) % 100 for n in range(8)] == [float(n) for n in range(8)]
                    assert all(bool((tensor == tensor[0]).all()) for tensor in staged.values())

    async def test_memory_freed_at_once_is_not_given_to_others(self):
        async with AsyncStager() as stager:
            await stager.prewarm({"a": torch.zeros(16 * MIB, device=DEVICE)})
            for _ in range(10):
                state = {"a": torch.full((16 * MIB,), 7.0, device=DEVICE)}
                busy()
                task = asyncio.ensure_future(stager.stage(state))
                await asyncio.sleep(0)
                del state
                torch.full((16 * MIB,), -1.0, device=DEVICE)
                assert bool(((await task)["a"] == 7).all())


@pytest.mark.asyncio
class TestLeaves:
    @PINNED
    async def test_every_kind(self, use_pinned_memory: bool):
        base = torch.arange(24.0, device=DEVICE)
        state = {
            "view": base[3:9],
            "transposed": base.reshape(4, 6).t(),
            "expanded": base[:1].expand(5),
            "half": base.half(),
            "conjugate": torch.complex(base, base).conj(),
            "scalar": torch.tensor(3, device=DEVICE),
            "empty": torch.empty(0, device=DEVICE),
            "host": torch.ones(3),
            "parameter": torch.nn.Parameter(base.clone()),
            "sparse": torch.eye(3, device=DEVICE).to_sparse(),
        }
        async with AsyncStager(StagingOptions(use_pinned_memory=use_pinned_memory)) as stager:
            for _ in range(4):
                staged = await stager.stage(state)
        for name, tensor in state.items():
            copy = staged[name]
            assert copy.device.type == "cpu"
            assert type(copy) is type(tensor)
            assert torch.equal(copy.to_dense() if copy.is_sparse else copy, tensor.cpu().to_dense())

    async def test_ten_thousand_small_ones_take_few_launches(self):
        state = {str(n): torch.full((64,), float(n), device=DEVICE) for n in range(10_000)}
        async with AsyncStager() as stager:
            staged = await stager.stage(state)
            assert stager.statistics().launches < 200
        assert all(float(staged[str(n)][0]) == n for n in range(10_000))

    async def test_an_optimizer_and_back(self):
        model = torch.nn.Linear(512, 512, device=DEVICE)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.randn(4, 512, device=DEVICE)).sum().backward()
        optimizer.step()
        live = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        before = model.weight.detach().clone()
        async with AsyncStager() as stager:
            staged = await stager.stage(live)
            with torch.no_grad():
                model.weight.zero_()
            await stager.restore(staged, into=live)
            assert torch.equal(model.weight, before)


@pytest.mark.asyncio
class TestPinned:
    async def test_arenas_are_registered_and_reused(self):
        async with AsyncStager(StagingOptions(use_pinned_memory=True)) as stager:
            state = {"a": torch.ones(16 * MIB, device=DEVICE)}
            for _ in range(5):
                staged = await stager.stage(state)
                assert staged["a"].is_pinned()
                del staged
            statistics = stager.statistics()
            assert statistics.pinned_bytes >= 64 * MIB
            assert statistics.arenas <= 2

    async def test_shared_memory_is_registered_too(self):
        async with AsyncStager(StagingOptions(use_pinned_memory=True, use_shared_memory=True)) as stager:
            staged = await stager.stage({"a": torch.ones(MIB, device=DEVICE)})
            opened = (await stager.share(staged)).open()
            assert torch.equal(opened["a"], staged["a"])
            assert stager.statistics().pinned_bytes == stager.statistics().shared_bytes > 0


@pytest.mark.asyncio
class TestLeftBehind:
    async def test_nothing_after_a_hundred_stagings(self):
        state = {str(n): torch.ones(MIB, device=DEVICE) for n in range(16)}
        async with AsyncStager() as stager:
            for _ in range(5):
                await stager.stage(state)
            torch.cuda.synchronize()
            gc.collect()
            before = torch.cuda.memory_allocated(), stager.statistics().pinned_bytes
            free = torch.cuda.mem_get_info()[0]
            for _ in range(100):
                await stager.stage(state)
            torch.cuda.synchronize()
            gc.collect()
            assert (torch.cuda.memory_allocated(), stager.statistics().pinned_bytes) == before
            assert torch.cuda.mem_get_info()[0] >= free - 64 * MIB

    async def test_nothing_of_a_cancelled_staging(self):
        state = {str(n): torch.ones(8 * MIB, device=DEVICE) for n in range(8)}
        async with AsyncStager() as stager:
            await stager.prewarm(state)
            for turns in range(0, 40, 4):
                busy()
                task = asyncio.ensure_future(stager.stage(state))
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            staged = await stager.stage(state)
            assert all(bool((tensor == 1).all()) for tensor in staged.values())


@pytest.mark.asyncio
async def test_wait_event() -> None:
    busy()
    event = torch.cuda.Event()
    event.record()
    assert not event.query()
    await wait_event(event)
    assert event.query()


FAILING = """
import asyncio, torch, aiostage

async def main():
    tensor = torch.zeros(1000, device="cuda")
    async with aiostage.AsyncStager() as stager:
        await stager.stage({"a": tensor})
        torch.zeros(10, device="cuda")[torch.tensor([99], device="cuda")]
        try:
            await stager.stage({"a": tensor})
        except Exception as error:
            print("RAISED", type(error).__name__)

asyncio.run(main())
"""


def test_a_failed_kernel_raises_in_the_awaiting_task() -> None:
    result = subprocess.run(
        [sys.executable, "-c", FAILING], capture_output=True, text=True, timeout=seconds(50), check=False
    )
    assert "RAISED" in result.stdout, result.stderr[-2000:]


CHILD = """
import os, sys, torch, aiostage
assert not torch.cuda.is_initialized()
child = os.fork()
if child == 0:
    import asyncio

    async def main():
        async with aiostage.AsyncStager() as stager:
            staged = await stager.stage({"a": torch.ones(3, device="cuda")})
            return float(staged["a"].sum())

    os._exit(0 if asyncio.run(main()) == 3 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_importing_leaves_the_device_to_forked_children() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", CHILD], check=True, timeout=seconds(50))
