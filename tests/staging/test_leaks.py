"""What 200 stagings leave behind: nothing."""

from __future__ import annotations

import asyncio
import gc
import threading

import psutil
import pytest
import torch

from aiostage import AsyncStager, StagingOptions, TornSnapshotError
from aiostage._copy import phases
from tests.descriptors import SHARED_MEMORY, opened
from tests.staging.holding import until

MIB = 2**20


def threads() -> int:
    """Count aiostage's threads, but for those that come and go within their limits."""
    names = [thread.name for thread in threading.enumerate()]
    return sum(name.startswith("aiostage-") and not name.startswith("aiostage-copy") for name in names)


def mappings() -> list[str]:
    """Return where shared memory of aiostage is mapped. Other mappings come and go with threads and their heaps."""
    with open("/proc/self/maps") as lines:
        return [line for line in lines if any(name in line for name in SHARED_MEMORY)]


def tree(count: int = 50) -> dict[str, object]:
    return {"step": 1, "model": {f"p{n}": torch.full((1000,), float(n)) for n in range(count)}, "big": torch.ones(MIB)}


@pytest.mark.asyncio
@pytest.mark.parametrize("use_shared_memory", [False, True])
async def test_two_hundred_stagings(use_shared_memory: bool) -> None:
    source = tree()
    async with AsyncStager(StagingOptions(use_shared_memory=use_shared_memory)) as stager:
        for _ in range(20):
            await stager.stage(source)
        gc.collect()
        before = (len(opened(SHARED_MEMORY)), threads(), stager.statistics().arenas, len(asyncio.all_tasks()))
        resident = psutil.Process().memory_info().rss
        for _ in range(200):
            await stager.stage(source)
        after = (len(opened(SHARED_MEMORY)), threads(), stager.statistics().arenas, len(asyncio.all_tasks()))
        assert stager._resources.workers.threads <= 2
        assert all(now <= then for now, then in zip(after, before, strict=True)), (before, after)
        assert psutil.Process().memory_info().rss - resident < 16 * MIB


@pytest.mark.asyncio
async def test_descriptors_and_arenas_do_not_grow_with_the_number_of_tensors() -> None:
    counts = []
    for count in (10, 1000):
        async with AsyncStager(StagingOptions(use_shared_memory=True)) as stager:
            await stager.stage(tree(count))
            before = opened(SHARED_MEMORY)
            staged = await stager.stage(tree(count))
            counts.append((len(opened(SHARED_MEMORY) - before), stager.statistics().arenas, stager.statistics().copies))
            del staged
    assert counts[0][:2] == counts[1][:2]
    assert counts[1][2] <= counts[0][2] + 8


@pytest.mark.asyncio
async def test_a_stager_that_is_closed_leaves_nothing() -> None:
    gc.collect()
    async with AsyncStager() as stager:
        await stager.stage(tree())
    await until(lambda: stager.statistics().arenas == 0)
    await until(lambda: not stager._resources.workers.threads)
    gc.collect()
    before = (opened(SHARED_MEMORY), len(mappings()))
    for _ in range(10):
        async with AsyncStager(StagingOptions(use_shared_memory=True)) as stager:
            await stager.stage(tree())
        await until(lambda stager=stager: stager.statistics().arenas == 0)  # type: ignore[misc]
        await until(lambda stager=stager: not stager._resources.workers.threads)  # type: ignore[misc]
    assert not opened(SHARED_MEMORY) - before[0]
    assert len(mappings()) <= before[1], mappings()


@pytest.mark.asyncio
async def test_stagings_need_no_garbage_collector() -> None:
    sources = [tree(), {"sparse": torch.eye(3).to_sparse(), "t": (torch.ones(3), {torch.float32})}]
    gc.collect()
    gc.disable()
    try:
        async with AsyncStager() as stager:
            for source in sources:
                for _ in range(5):
                    staged = await stager.stage(source)
                    del staged
                    assert stager.statistics().leases == 0
    finally:
        gc.enable()


@pytest.mark.asyncio
async def test_an_error_that_is_kept_keeps_no_memory() -> None:
    kept = []
    async with AsyncStager() as stager:
        for _ in range(3):
            source = tree()
            async with stager.snapshot(source) as snapshot:
                source["step"] = 2
                with pytest.raises(TornSnapshotError) as caught:
                    await snapshot.captured()
                kept.append(caught.value)
                assert stager.statistics().leases == 0
        assert kept


@pytest.mark.asyncio
async def test_staged_tensors_in_circles_are_collected() -> None:
    marked = torch.ones(3)
    marked.back = [marked]  # type: ignore[attr-defined]
    source = {"a": torch.ones(3), "s": torch.tensor(1.0), "p": torch.nn.Parameter(torch.ones(2)), "marked": marked}
    async with AsyncStager(StagingOptions(max_host_bytes=4096)) as stager:
        for _ in range(3):
            staged = await stager.stage(source)
            assert staged["marked"].back[0] is staged["marked"]  # type: ignore[attr-defined]
            for name in ("a", "s", "p"):
                staged[name].owner = staged
            assert all(gc.is_tracked(tensor) for tensor in staged.values())
            del staged
            gc.collect()
            assert stager.statistics().leases == 0
        assert gc.is_tracked(source["a"].untyped_storage())


@pytest.mark.asyncio
async def test_what_is_remembered_of_shapes_does_not_grow_with_stagings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "_MOST_SPECS", 16)

    def batch(step: int) -> dict[str, torch.Tensor]:
        return {f"{n}": torch.full((step * 2 + n % 2 + 1,), float(step + n)) for n in range(300)}

    async with AsyncStager(StagingOptions(max_loop_hold=1e-9)) as stager:
        for step in range(0, 60, 2):
            # Two at once: what one forgets, the other has begun with.
            sources = [batch(step), batch(step + 1)]
            for source, staged in zip(sources, await asyncio.gather(*map(stager.stage, sources)), strict=True):
                assert all(torch.equal(staged[key], value) for key, value in source.items())
            # As many as there may be, and those of two stagings.
            assert len(stager._resources.inspection.table.known) <= 16 + 4
