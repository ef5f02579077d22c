"""The garbage collector is its user's to switch."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator

import pytest
import torch

from aiostage import AsyncStager, StagingOptions

SOURCE = {str(number): torch.full((4,), float(number)) for number in range(8000)}


@pytest.fixture(autouse=True)
def _enabled_afterwards() -> Iterator[None]:
    yield
    gc.enable()


@pytest.mark.asyncio
async def test_nobody_sees_the_collector_off() -> None:
    states = []

    def look(path: object, tensor: object) -> None:
        states.append(gc.isenabled())

    async def watch() -> None:
        while True:
            states.append(gc.isenabled())
            await asyncio.sleep(0)

    watching = asyncio.ensure_future(watch())
    async with AsyncStager(StagingOptions(dtype=look)) as stager:
        await stager.stage(SOURCE)
    watching.cancel()
    assert len(states) > len(SOURCE)
    assert all(states)


@pytest.mark.asyncio
@pytest.mark.parametrize("before", [False, True])
async def test_what_the_user_says_during_a_staging_stays(before: bool) -> None:
    if not before:
        gc.disable()
    switch = gc.disable if before else gc.enable
    async with AsyncStager() as stager:
        staging = asyncio.ensure_future(stager.stage(SOURCE))
        await asyncio.sleep(0)
        assert not staging.done()
        switch()
        await staging
        assert gc.isenabled() is not before


@pytest.mark.asyncio
async def test_nothing_but_the_staged_tensors_is_new_for_the_collector() -> None:
    gc.disable()
    async with AsyncStager() as stager:
        for _ in range(3):
            staged = await stager.stage(SOURCE)
        gc.collect()
        before = gc.get_count()[0]
        kept = await stager.stage(SOURCE)
        new = gc.get_count()[0] - before
    assert len(staged) == len(kept) <= new <= 1.1 * len(SOURCE)
