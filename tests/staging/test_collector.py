"""The garbage collector is its user's to switch, and runs less often while tensors are staged."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator

import pytest
import torch

from aiostage import AsyncStager, StagingOptions
from tests.forking import run_forking

SOURCE = {str(number): torch.full((4,), float(number)) for number in range(8000)}


USUAL = (700, 10, 10)


@pytest.fixture(autouse=True)
def _usual_collector() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(*USUAL)
    yield
    gc.enable()
    gc.set_threshold(*before)


@pytest.mark.asyncio
async def test_the_collector_is_never_off() -> None:
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


@pytest.mark.asyncio
async def test_it_runs_less_often_during_a_staging() -> None:
    runs = []
    thread = threading.get_ident()

    def count(phase: str, _: object) -> None:
        if phase == "start" and threading.get_ident() == thread:
            runs.append(gc.get_threshold())

    async with AsyncStager() as stager:
        await stager.stage(SOURCE)
        gc.callbacks.append(count)
        try:
            staged = await stager.stage(SOURCE)
        finally:
            gc.callbacks.remove(count)
    # 11 by CPython's own thresholds.
    assert len(staged) // USUAL[0] == 11
    assert len(runs) <= 5
    assert gc.get_threshold() == USUAL


@pytest.mark.asyncio
@pytest.mark.parametrize("users", [(900, 10, 10), (700, 10, 1000), (0, 10, 10), (50_000, 20, 100)])
async def test_thresholds_that_are_set_during_a_staging_stay(users: tuple[int, int, int]) -> None:
    async with AsyncStager() as stager:
        staging = asyncio.ensure_future(stager.stage(SOURCE))
        while gc.get_threshold() == USUAL:
            await asyncio.sleep(0)
            assert not staging.done()
        gc.set_threshold(*users)
        await staging
    assert gc.get_threshold() == users


@pytest.mark.asyncio
@pytest.mark.parametrize("users", [(0, 10, 10), (50_000, 20, 100)])
async def test_higher_thresholds_are_left_alone(users: tuple[int, int, int]) -> None:
    gc.set_threshold(*users)
    seen = set()

    def look(path: object, tensor: object) -> None:
        seen.add(gc.get_threshold())

    async with AsyncStager(StagingOptions(dtype=look)) as stager:
        await stager.stage(SOURCE)
    assert seen == {users}


@pytest.mark.asyncio
async def test_a_higher_threshold_of_what_survived_is_left_to_decide() -> None:
    gc.collect()
    gc.set_threshold(700, 1000, 10)
    # Eight young runs, of which the second threshold counts a thousand.
    kept = [[] for _ in range(8 * 700)]  # type: ignore[var-annotated]
    generations = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            generations.append(info["generation"])

    async with AsyncStager() as stager:
        gc.callbacks.append(note)
        try:
            await stager.stage(SOURCE)
        finally:
            gc.callbacks.remove(note)
    assert len(kept) == 8 * 700
    assert set(generations) <= {0}


@pytest.mark.asyncio
async def test_two_stagings_at_once_of_which_one_is_cancelled() -> None:
    async with AsyncStager() as stager:
        one, other = (asyncio.ensure_future(stager.stage(SOURCE)) for _ in range(2))
        while gc.get_threshold() == USUAL:
            await asyncio.sleep(0)
        one.cancel()
        with pytest.raises(asyncio.CancelledError):
            await one
        await other
    assert gc.get_threshold() == USUAL


@pytest.mark.asyncio
async def test_a_staging_that_is_closed() -> None:
    async with AsyncStager() as stager:
        staging = stager.stage(SOURCE)
        while gc.get_threshold() == USUAL:
            staging.send(None)
        staging.close()
        assert gc.get_threshold() == USUAL


FORKING = """
import gc
from aiostage._loop.coroutines import RarerCollections

usual = gc.get_threshold()

def look():
    assert gc.get_threshold() == usual
    with RarerCollections():
        assert gc.get_threshold() != usual
    assert gc.get_threshold() == usual

with RarerCollections():
    assert gc.get_threshold() != usual
    in_child(look)
    assert gc.get_threshold() != usual
"""


@pytest.mark.slow
def test_a_forked_child_has_the_thresholds_of_its_user() -> None:
    run_forking(FORKING)
