from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import sys
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from aiostage import (
    AsyncStager,
    StagingOptions,
    TornSnapshotError,
    UnsupportedLeafError,
    adapt,
    load,
    observe,
    save,
)
from aiostage.abc import Observer, Span
from aiostage.observe import add_observer, observing, remove_observer, span
from tests.spans import Recorder


def ancestors(found: Span) -> list[str]:
    names = []
    at = found.parent
    while at is not None:
        names.append(at.name)
        at = at.parent
    return names


def tree(count: int = 4) -> dict[str, torch.Tensor]:
    return {str(index): torch.full((8,), float(index)) for index in range(count)}


class Calls:
    """Counts the calls of functions in observe.py, in this thread and those started meanwhile."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()

    def _profile(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename == observe.__file__:
            self.count[frame.f_code.co_qualname] += 1

    def __enter__(self) -> Calls:
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


@pytest.mark.asyncio
async def test_free_without_an_observer() -> None:
    async def calls_of(leaves: int) -> Counter[str]:
        with Calls() as calls:
            async with AsyncStager() as stager:
                await stager.stage(tree(leaves))
        return calls.count

    assert await calls_of(4) == await calls_of(400) == Counter()
    # They are counted where there is one.
    with observing(Recorder()):
        assert (await calls_of(4))["start_span"] == 1


def test_nothing_is_made_without_an_observer() -> None:
    assert span("one") is span("two", nbytes=1)
    assert observe.start_span("one") is None
    with span("one"):
        assert observe.current() is None


@pytest.mark.asyncio
async def test_a_span_for_each_phase_and_none_for_a_leaf() -> None:
    found = []
    for leaves in (4, 400):
        recorder = Recorder()
        async with AsyncStager() as stager:
            with observing(recorder):
                await stager.stage(tree(leaves))
        assert not recorder.unfinished
        found.append(sorted(recorder.story))
        (stage,) = recorder.spans("stage")
        assert stage.attributes == {"nbytes": leaves * 32, "leaves": leaves, "batches": 1}
        for name in ("walk", "inspect", "plan", "memory", "build", "batch", "copy", "check", "rebuild"):
            (phase,) = recorder.spans(name)
            assert phase.parent is stage
            assert phase.end is not None
            assert stage.end is not None
            assert stage.begin <= phase.begin <= phase.end <= stage.end
        assert recorder.spans("batch")[0].thread.startswith("aiostage-copy")
    assert found[0] == found[1]


@pytest.mark.asyncio
async def test_tasks_have_spans_of_their_own() -> None:
    recorder = Recorder()

    async def work(name: str) -> None:
        with span(name):
            await asyncio.sleep(0)
            with span(f"{name} inside"):
                await asyncio.sleep(0)

    with observing(recorder), span("outside"):
        await asyncio.gather(work("a"), work("b"))
    assert not recorder.unfinished
    assert ancestors(recorder.spans("a inside")[0]) == ["a", "outside"]
    assert ancestors(recorder.spans("b inside")[0]) == ["b", "outside"]
    assert observe.current() is None


@pytest.mark.asyncio
async def test_the_moment_of_a_staging_is_its_call() -> None:
    recorder = Recorder()
    async with AsyncStager() as stager:
        with observing(recorder):
            with span("here"):
                staging = stager.stage(tree())
                # A staging under way is not the current span of its caller.
                assert observe.current() is recorder.spans("here")[0]
            with span("there"):
                await asyncio.create_task(staging)
    (stage,) = recorder.spans("stage")
    assert ancestors(stage) == ["here"]
    assert not recorder.unfinished


@pytest.mark.asyncio
async def test_worker_threads_have_the_context_of_the_caller() -> None:
    recorder = Recorder()
    variable = contextvars.ContextVar("variable", default="nobody")

    class Synchronous:
        def stage(self, state_dict: object) -> str:
            with span("step"):
                mine = variable.get()
                variable.set("changed")
                return mine

    async with adapt(Synchronous()) as stager:
        with observing(recorder), span("caller"):
            variable.set("somebody")
            assert await stager.stage(None) == "somebody"
            # As with asyncio.to_thread, a thread's changes are its own.
            assert await asyncio.gather(stager.stage(None), stager.stage(None)) == ["somebody"] * 2
    steps = recorder.spans("step")
    assert len(steps) == 3
    for found in steps:
        assert ancestors(found) == ["caller"]
        assert found.thread.startswith("aiostage-adapted")


@pytest.mark.asyncio
async def test_what_is_never_awaited_ends_its_spans(tmp_path: Path) -> None:
    recorder = Recorder()
    async with AsyncStager() as stager:
        with observing(recorder):
            for never_awaited in (
                stager.stage(tree()),
                stager.prewarm(tree()),
                stager.restore(tree(), tree()),
                save(tree(), tmp_path / "a"),
                save(tree(), tmp_path / "b", stager=stager),
                load(tmp_path / "a"),
            ):
                # As Python does after its warning.
                never_awaited.close()
            never_entered = stager.snapshot(tree())
        del never_awaited, never_entered
        gc.collect()
    assert {"stage", "save"} <= set(recorder.names)
    assert not recorder.unfinished
    assert isinstance(recorder.errors["stage"], GeneratorExit)
    assert isinstance(recorder.errors["save"], GeneratorExit)


@pytest.mark.asyncio
async def test_errors_and_cancellations_are_reported() -> None:
    recorder = Recorder()
    live = tree()
    async with AsyncStager() as stager:
        with observing(recorder):
            with pytest.raises(UnsupportedLeafError) as refused:
                await stager.stage({"sparse": torch.zeros(2, device="meta")})
            assert recorder.errors["stage"] is refused.value
            async with stager.snapshot(live) as snapshot:
                live["0"].add_(1)
                with pytest.raises(TornSnapshotError) as torn:
                    await snapshot.captured()
            assert recorder.errors["stage"] is torn.value
            # Left without a word.
            async with stager.snapshot(live):
                pass
            # Large enough that it cannot be done by then.
            task = asyncio.create_task(stager.stage({"large": torch.zeros(64 << 20)}))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert isinstance(recorder.errors["stage"], asyncio.CancelledError)
    assert not recorder.unfinished


@pytest.mark.asyncio
async def test_an_observer_that_fails_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Observer):
        def started(self, span: Span) -> None:
            raise RuntimeError("broken")

        complete = failed = started  # type: ignore[assignment]

    recorder = Recorder()
    async with AsyncStager() as stager:
        with observing(Broken(), recorder):
            staged = await stager.stage(tree())
    assert torch.equal(staged["3"], torch.full((8,), 3.0))
    assert not recorder.unfinished
    assert {record.levelno for record in caplog.records} == {logging.ERROR}
    assert len(caplog.records) == len(recorder.heard)


def test_observers_of_the_process() -> None:
    recorder, other = Recorder(), Recorder()
    add_observer(recorder)
    try:
        thread = threading.Thread(target=lambda: _in_a_span("elsewhere"))
        thread.start()
        thread.join()
        with observing(other), span("here"):
            remove_observer(recorder)
    finally:
        with pytest.raises(ValueError, match="was not added"):
            remove_observer(recorder)
    # It has heard the beginning, so it hears the end.
    assert recorder.story == ["started elsewhere", "complete elsewhere", "started here", "complete here"]
    assert other.story == ["started here", "complete here"]


def _in_a_span(name: str) -> None:
    with span(name):
        pass


def test_a_coroutine_that_is_closed_from_elsewhere() -> None:
    recorder = Recorder()

    async def forever() -> None:
        with span("forever"):
            await asyncio.Event().wait()

    async def main() -> Any:
        with observing(recorder):
            coroutine = forever()
            contextvars.copy_context().run(coroutine.send, None)
            return coroutine

    with span("mine"):
        asyncio.run(main()).close()
        assert observe.current() is None
    assert recorder.story == ["started forever", "failed forever"]
    assert isinstance(recorder.errors["forever"], GeneratorExit)


@pytest.mark.asyncio
async def test_without_async_staging_no_thread_copies() -> None:
    recorder = Recorder()
    async with AsyncStager(StagingOptions(use_async_staging=False)) as stager:
        with observing(recorder):
            await stager.stage(tree())
        # A thread would take a step now and then, and wait for more.
        assert stager._resources.workers.threads == 0
    assert [batch.thread for batch in recorder.spans("batch")] == [threading.current_thread().name]


@pytest.mark.anyio
async def test_on_trio() -> None:
    recorder = Recorder()
    async with AsyncStager(StagingOptions(use_async_staging=False)) as stager:
        with observing(recorder):
            await stager.stage(tree())
    assert not recorder.unfinished
    assert ancestors(recorder.spans("batch")[0]) == ["stage"]


def test_what_is_no_observer() -> None:
    # It would be called for every span of the process, and fail each time in the log.
    with pytest.raises(TypeError, match=r"aiostage\.abc\.Observer, not 3"):
        add_observer(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not None"), observing(None):  # type: ignore[arg-type]
        pass
