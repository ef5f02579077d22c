"""What newer asyncios do otherwise: tasks that begin at once, loops from a factory, warnings of what was not closed."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import uvloop

import aiostage
from aiostage import AsyncStager, Checkpointer, StagingOptions
from tests.patience import seconds

ROOT = Path(__file__).parent.parent

needs_eager_tasks = pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")


def tree(step: int) -> dict[str, Any]:
    return {"step": step, "weights": [torch.full((5,), float(step)) for _ in range(50)], "big": torch.ones(300_000)}


def eager_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined, unused-ignore]
    return loop


def run(main: Callable[..., Any], make: Callable[[], asyncio.AbstractEventLoop], *arguments: object) -> Any:
    with asyncio.Runner(loop_factory=make) as runner:
        return runner.run(main(*arguments))


async def many_at_once(directory: Path) -> None:
    loop = asyncio.get_running_loop()
    async with AsyncStager() as stager:
        # The first step of each runs within this call, and the smallest may end in it.
        staged = await asyncio.gather(*(loop.create_task(stager.stage(tree(step))) for step in range(8)))
        assert [copy["step"] for copy in staged] == list(range(8))
        assert all(float(weight[0]) == copy["step"] for copy in staged for weight in copy["weights"])
        assert await loop.create_task(stager.stage({"step": 1})) == {"step": 1}
        assert await loop.create_task(stager.stage({"a": torch.ones(1)})) == {"a": torch.ones(1)}
        del staged

        # Cancelled in the step in which they were made, after their first step.
        tasks = [loop.create_task(stager.stage(tree(step))) for step in range(4)]
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
        del tasks, task, outcomes
        await asyncio.sleep(0)
        assert stager.statistics().leases == 0

    # What is changed after the call is no part of the copy, or the copy is torn. The walk is one step, for on a busy
    # machine the step at the call may end before it has noted the tree.
    async with AsyncStager(StagingOptions(max_loop_hold=math.inf)) as stager:
        live = tree(3)
        task = loop.create_task(stager.stage(live))
        live["weights"][0].add_(1)
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(outcome, aiostage.TornSnapshotError):
            assert outcome.paths == ("state_dict['weights'][0]",)
        else:
            assert float(outcome["weights"][0][0]) == 3
        del outcome

        async with Checkpointer(directory, stager, keep=2) as checkpoints:
            for step in range(4):
                handle = await loop.create_task(checkpoints.save(step, tree(step)))
                await loop.create_task(handle.committed())
            loaded = await loop.create_task(checkpoints.restore())
            assert loaded["step"] == 3
            assert await loop.create_task(checkpoints.steps()) == [2, 3]


@needs_eager_tasks
def test_eager_tasks(tmp_path: Path) -> None:
    run(many_at_once, eager_loop, tmp_path)


@pytest.mark.parametrize("make", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_loops_of_a_factory(make: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path) -> None:
    run(many_at_once, make, tmp_path)


@needs_eager_tasks
def test_a_snapshot_in_eager_tasks() -> None:
    async def main() -> None:
        async with AsyncStager() as stager, asyncio.TaskGroup() as group:
            async with stager.snapshot(tree(2)) as snapshot:
                captured = group.create_task(snapshot.captured())
                result = group.create_task(snapshot.result())
                leaves = [leaf.path async for leaf in snapshot]
                await captured
                assert (await result)["step"] == 2
            assert len(leaves) == 51

    run(main, eager_loop)


def test_nothing_asks_for_a_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.14 deprecates event loop policies, and has no loop where none runs."""

    def refusing(function: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*arguments: object) -> Any:
            # asyncio.Runner asks itself, up to Python 3.13.
            assert "aiostage" not in str(sys._getframe(1).f_globals["__name__"]), function.__name__
            return function(*arguments)

        return ask

    for module in (asyncio, asyncio.events):
        for name in ("get_event_loop", "get_event_loop_policy", "set_event_loop_policy"):
            monkeypatch.setattr(module, name, refusing(getattr(module, name)))
    run(many_at_once, asyncio.SelectorEventLoop, tmp_path / "asyncio")
    # In threads with loops of their own.
    with aiostage.blocking.Checkpointer(tmp_path / "blocking") as checkpoints:
        checkpoints.save(1, tree(1)).committed()
        assert checkpoints.restore()["step"] == 1


def test_one_stager_in_the_loops_of_several_runs(tmp_path: Path) -> None:
    async def save(stager: AsyncStager, step: int) -> None:
        await aiostage.save(tree(step), tmp_path / str(step), stager=stager)

    stager = AsyncStager()
    for step in range(2):
        asyncio.run(save(stager, step))
    with asyncio.Runner() as runner:
        for step in range(2, 4):
            runner.run(save(stager, step))
        runner.run(stager.aclose())
    loaded = asyncio.run(aiostage.load(tmp_path / "3"))
    assert loaded["step"] == 3


IN_DEVELOPMENT_MODE = """
import asyncio, gc, sys
import torch
import aiostage

async def main(directory):
    # A busy machine makes any step slow.
    asyncio.get_running_loop().slow_callback_duration = 1000
    tree = {"a": torch.ones(70_000), "b": [torch.zeros(3), 1]}
    async with aiostage.AsyncStager() as stager:
        async with aiostage.Checkpointer(directory, stager, keep=1) as checkpoints:
            for step in range(3):
                await checkpoints.save(step, tree)
        async with stager.snapshot(tree) as snapshot:
            async for leaf in snapshot:
                # Left before its end.
                break
        task = asyncio.ensure_future(stager.stage(tree))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    loaded = await checkpoints.restore()
    assert loaded["b"][1] == 1

asyncio.run(main(sys.argv[1]))
gc.collect()
"""


def test_the_development_mode_finds_nothing_to_warn_of(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "dev", "-W", "error", "-W", "ignore::DeprecationWarning:torch", "-c"]
    done = subprocess.run(
        [*command, IN_DEVELOPMENT_MODE, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds(60),
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
