from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import threading
import time
import weakref
from pathlib import Path

import anyio
import pytest
import torch

from aiostage import AsyncStager
from aiostage.testing import LeakProbe, Leftovers, LoopHold, LoopProbe
from tests.patience import seconds
from tests.warm import PYTEST, PYTHON

THIS = __file__


def compute(seconds: float) -> None:
    """Keep the calling thread's core busy."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def was_put_aside(hold: LoopHold) -> bool:
    """Return whether the thread slept, or a busy machine ran others meanwhile, as it may at any time."""
    return hold.cpu_seconds < 0.05


def in_this_file(file: str) -> bool:
    return file == THIS


class TestLoopProbe:
    async def look(self) -> None:
        with LoopProbe(threshold=0.05) as probe:
            await anyio.sleep(0.02)
            compute(0.1)
            await anyio.sleep(0.02)
        (hold,) = (hold for hold in probe.holds if not was_put_aside(hold))
        assert hold.seconds >= 0.05
        assert hold.cpu_seconds >= 0.09
        assert hold.blamed_seconds == 0
        assert hold.stack == ""
        assert probe.longest == max(hold.seconds for hold in probe.holds)

    @pytest.mark.asyncio
    async def test_sees_a_hold(self):
        await self.look()

    @pytest.mark.anyio
    async def test_sees_a_hold_on_trio(self):
        await self.look()

    @pytest.mark.asyncio
    async def test_distinguishes_computing_from_waiting(self):
        with LoopProbe(threshold=0.05) as probe:
            await asyncio.sleep(0.01)
            time.sleep(0.1)
        assert probe.longest >= 0.1 - 0.005
        assert all(was_put_aside(hold) for hold in probe.holds)

    @pytest.mark.asyncio
    async def test_names_the_code_that_computed(self):
        with LoopProbe(threshold=0.1, inside=in_this_file) as probe:
            await asyncio.sleep(0.01)
            compute(0.3)
            await asyncio.sleep(0.01)
        (hold,) = probe.holds
        assert 0.1 <= hold.blamed_seconds <= hold.cpu_seconds
        assert "in compute" in hold.stack

    @pytest.mark.asyncio
    async def test_names_the_code_that_computed_without_the_gil(self):
        numbers = torch.ones(1_000_000)
        with LoopProbe(threshold=0.1, inside=in_this_file) as probe:
            await asyncio.sleep(0.01)
            end = time.thread_time() + 0.3
            while time.thread_time() < end:
                numbers.sin_()
            await asyncio.sleep(0.01)
        (hold,) = probe.holds
        assert hold.blamed_seconds >= 0.1
        assert "numbers.sin_()" in hold.stack

    @pytest.mark.asyncio
    async def test_blames_no_code_for_waiting_or_for_the_work_of_others(self):
        with LoopProbe(threshold=0.05, inside=in_this_file) as waiting:
            await asyncio.sleep(0.01)
            time.sleep(0.15)
            await asyncio.sleep(0.01)
        assert not waiting.holds
        with LoopProbe(threshold=0.05, inside=lambda file: file == "elsewhere.py") as elsewhere:
            await asyncio.sleep(0.01)
            compute(0.15)
            await asyncio.sleep(0.01)
        assert not elsewhere.holds

    @pytest.mark.asyncio
    async def test_blames_no_code_for_the_garbage_collector(self):
        class Slow:
            def __init__(self) -> None:
                self.circle = self

            def __del__(self) -> None:
                compute(0.15)

        with LoopProbe(threshold=0.05, inside=in_this_file) as probe:
            await asyncio.sleep(0.01)
            Slow()
            gc.collect()
            await asyncio.sleep(0.01)
        assert not probe.holds

    @pytest.mark.asyncio
    async def test_many_short_steps_are_no_hold(self):
        with LoopProbe(threshold=0.1, inside=in_this_file) as probe:
            for _ in range(60):
                compute(0.005)
                await asyncio.sleep(0)
        assert not probe.holds

    @pytest.mark.asyncio
    async def test_what_it_looks_at_is_kept_no_longer_than_it_runs(self):
        looked, goes_on = threading.Event(), threading.Event()

        def slow(file: str) -> bool:
            looked.set()
            return goes_on.wait(10)

        def hold() -> weakref.ref[torch.Tensor]:
            tensor = torch.ones(1)
            assert looked.wait(seconds(10))
            return weakref.ref(tensor)

        with LoopProbe(threshold=0.05, inside=slow):
            await anyio.sleep(0.01)
            reference = hold()
            kept = reference() is not None
            goes_on.set()
        assert not kept

    @pytest.mark.asyncio
    async def test_looks_once_and_leaves_nothing(self):
        before = set(threading.enumerate())
        callbacks = len(gc.callbacks)
        probe = LoopProbe(inside=in_this_file)
        probe.stop()
        with probe, pytest.raises(RuntimeError, match="once"):
            probe.start()
        probe.stop()
        assert len(gc.callbacks) == callbacks
        while set(threading.enumerate()) - before:
            await asyncio.sleep(0.001)

    def test_a_loop_that_was_closed(self):
        async def begin() -> LoopProbe:
            probe = LoopProbe(inside=in_this_file)
            probe.start()
            return probe

        asyncio.run(begin()).stop()


class TestLeakProbe:
    async def look(self, path: Path) -> None:
        async with AsyncStager() as stager:
            await stager.stage([torch.ones(1)])
            # Trio keeps its own threads for a while.
            probe = LeakProbe(stager, ignore_threads=("aiostage-copy", "Trio thread"))
            await probe.settled()
            staged = await stager.stage([torch.ones(10)])
            release = threading.Event()
            thread = threading.Thread(target=release.wait, name="left over")
            thread.start()
            with path.open("w"):
                found = probe.leftovers()
                assert isinstance(found, Leftovers)
                # Other tests may have left threads, which open files.
                assert "left over" in found.threads
                assert str(path) in found.descriptors
                assert found.arenas == 1
                with pytest.raises(AssertionError, match="left over"):
                    await probe.settled(within=0.01)
            del staged
            release.set()
            thread.join()
            await probe.settled()
            assert "left over" not in probe.leftovers().threads

    @pytest.mark.asyncio
    async def test_names_what_is_left(self, tmp_path: Path):
        await self.look(tmp_path / "file")

    @pytest.mark.anyio
    async def test_names_what_is_left_on_trio(self, tmp_path: Path):
        await self.look(tmp_path / "file")

    @pytest.mark.asyncio
    async def test_tasks(self):
        probe = LeakProbe()
        task = asyncio.ensure_future(asyncio.sleep(60))
        task.set_name("sleeper")
        assert probe.leftovers().tasks == ("sleeper",)
        task.cancel()
        await probe.settled()

    @pytest.mark.asyncio
    async def test_another_file_with_the_same_name_counts(self, tmp_path: Path):
        path = tmp_path / "file"
        with path.open("w"):
            probe = LeakProbe()
            with path.open():
                assert str(path) in probe.leftovers().descriptors

    @pytest.mark.asyncio
    async def test_a_circle_is_no_leak(self):
        probe = LeakProbe()
        read, write = os.pipe()
        os.close(write)

        class Circle:
            def __init__(self) -> None:
                self.itself = self
                self.file = os.fdopen(read)

            def __del__(self) -> None:
                self.file.close()

        Circle()
        await probe.settled()


POLICY = """
import asyncio, time
import pytest
from aiostage.options import StagingOptions
from aiostage import AsyncStager

def compute(*_):
    end = time.thread_time() + 0.45
    while time.thread_time() < end:
        pass

class Slow:
    def __deepcopy__(self, memo):
        compute()
        return self

@pytest.mark.asyncio
async def test_ours():
    async with AsyncStager() as stager:
        await stager.stage([Slow()])

@pytest.mark.anyio
async def test_ours_on_trio():
    await test_ours()

@pytest.mark.asyncio
@pytest.mark.holds_the_loop
async def test_on_purpose():
    await test_ours()

@pytest.mark.asyncio
async def test_theirs():
    compute()
    await asyncio.sleep(0)
"""


@pytest.mark.slow
def test_the_policy_fails_a_test_in_which_aiostage_holds_the_loop(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent.parent
    (tmp_path / "conftest.py").write_text((root / "tests" / "conftest.py").read_text())
    (tmp_path / "test_policy.py").write_text(POLICY)
    outcome = subprocess.run(
        [*PYTHON, *PYTEST, "-q", "-p", "no:cacheprovider", "-c", "pyproject.toml", str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=seconds(50),
        check=False,
    )
    assert "7 passed, 3 errors" in outcome.stdout, outcome.stdout
    assert "ERROR" in outcome.stdout
    assert "test_ours_on_trio" in outcome.stdout
    assert "in __deepcopy__" in outcome.stdout
    assert "test_theirs" not in outcome.stdout
