from __future__ import annotations

import _thread
import asyncio
import gc
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType

import anyio
import pytest

from aiostage._loop.coroutines import ThreadsafeEvent
from aiostage._loop.workers import Job, Workers
from aiostage.testing import at_every_await
from tests.patience import seconds
from tests.threads import until_none_of

SOON = seconds(10.0)
"""Seconds until a wait that should not take any is given up."""


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers(2, "test-workers")
    yield workers
    workers.stop()
    until_none_of("test-workers")


async def until(holds: Callable[[], bool]) -> None:
    """Wait for what a thread is about to do."""
    with anyio.fail_after(SOON):
        while not holds():
            await anyio.sleep(0.001)


def is_past(job: Job, done: int) -> bool:
    return job.done > done


def threads_of(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


class Gate:
    """A step that says when it runs and goes on only when it is let."""

    def __init__(self) -> None:
        self.running = threading.Event()
        self.open = threading.Event()
        self.passed = False

    def __call__(self) -> str:
        self.running.set()
        assert self.open.wait(SOON)
        self.passed = True
        return "passed"


async def entered(gate: Gate) -> None:
    """Wait, without blocking the loop, until a gate's step runs."""
    while not gate.running.is_set():
        await asyncio.sleep(0)


class Payload:
    """Something that a step refers to."""


@pytest.mark.asyncio
class TestRun:
    async def test_returns_what_the_call_returns(self, workers: Workers):
        assert await workers.run(lambda: 42) == 42

    async def test_runs_in_a_named_thread(self, workers: Workers):
        name = await workers.run(lambda: threading.current_thread().name)
        assert name == "test-workers-1"

    async def test_raises_what_the_call_raises(self, workers: Workers):
        def fail() -> None:
            raise LookupError("no such page")

        with pytest.raises(LookupError, match="no such page"):
            await workers.run(fail)
        assert await workers.run(lambda: "works on") == "works on"

    async def test_an_exception_that_is_no_error_comes_through_too(self, workers: Workers):
        def leave() -> None:
            raise SystemExit(3)

        with pytest.raises(SystemExit):
            await workers.run(leave)
        assert await workers.run(lambda: "works on") == "works on"

    async def test_cancelled_while_it_runs_waits_for_it(self, workers: Workers):
        gate = Gate()
        task = asyncio.create_task(workers.run(gate))
        await entered(gate)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not task.done()

        gate.open.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert gate.passed

    async def test_cancelled_before_it_begins_never_runs(self, workers: Workers):
        gates = [Gate(), Gate()]
        blocking = [asyncio.create_task(workers.run(gate)) for gate in gates]
        for gate in gates:
            await entered(gate)
        ran = []
        task = asyncio.create_task(workers.run(lambda: ran.append(True)))
        await asyncio.sleep(0)

        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for gate in gates:
            gate.open.set()
        await asyncio.gather(*blocking)
        await workers.run(lambda: None)

        assert ran == []

    async def test_cancelled_at_every_await(self, workers: Workers):
        rounds = 0
        async for _ in at_every_await(lambda: workers.run(lambda: "result")):
            rounds += 1
            if rounds == 3:
                break
        assert await workers.run(lambda: "works on") == "works on"


@pytest.mark.asyncio
class TestJob:
    async def test_join_waits_for_every_step(self, workers: Workers):
        job = workers.job()
        seen: list[int] = []
        for number in range(100):
            job.put(lambda number=number: seen.append(number))
        job.close()
        await job.join()
        assert sorted(seen) == list(range(100))
        assert job.done == 100
        assert job.finished()

    async def test_an_empty_job_is_finished_when_closed(self, workers: Workers):
        job = workers.job()
        assert not job.finished()
        joining = asyncio.create_task(job.join())
        await asyncio.sleep(0)
        job.close()
        await joining

    async def test_one_thread_keeps_the_order(self):
        workers = Workers(1, "test-single")
        job = workers.job()
        seen: list[int] = []
        for number in range(100):
            job.put(lambda number=number: seen.append(number))
        job.close()
        await job.join()
        assert seen == list(range(100))
        workers.stop()
        until_none_of("test-single")

    async def test_steps_of_one_job_run_side_by_side(self, workers: Workers):
        meeting = threading.Barrier(2)
        job = workers.job()
        for _ in range(2):
            job.put(lambda: meeting.wait(SOON))
        job.close()
        await job.join()
        assert not meeting.broken

    async def test_a_failed_step_drops_the_rest(self, workers: Workers):
        job = workers.job()
        gates = [Gate(), Gate()]
        seen: list[str] = []

        def fail() -> None:
            gates[0]()
            raise LookupError("no such page")

        job.put(fail)
        job.put(gates[1])
        job.put(lambda: seen.append("dropped"))
        for gate in gates:
            await entered(gate)
        gates[0].open.set()
        await job.until(lambda: job.done > 0)
        job.put(lambda: seen.append("put too late"))
        assert not job.finished(), "the other step still runs"
        gates[1].open.set()

        with pytest.raises(LookupError, match="no such page"):
            await job.join()
        assert seen == []
        assert isinstance(job.error, LookupError)

    async def test_settled_does_not_raise(self, workers: Workers):
        job = workers.job()
        job.put(lambda: 1 // 0)
        job.close()
        await job.settled()
        assert isinstance(job.error, ZeroDivisionError)

    async def test_until_asks_after_each_step(self, workers: Workers):
        job = workers.job()
        gates = [Gate(), Gate()]
        for gate in gates:
            job.put(gate)
        job.close()
        await job.until(lambda: job.done > -1)
        waiting = asyncio.create_task(job.until(lambda: job.done > 0))
        for gate in gates:
            await entered(gate)
        assert not waiting.done()
        gates[1].open.set()
        await waiting
        assert job.done == 1
        gates[0].open.set()
        await job.until(lambda: job.done > 1)
        await job.until(lambda: job.done > 100)
        assert job.done == 2

    async def test_what_waits_for_the_end_is_not_woken_before(self, workers: Workers, monkeypatch: pytest.MonkeyPatch):
        woken: list[object] = []

        class Counted(ThreadsafeEvent):
            def set(self) -> bool:
                woken.append(self)
                return super().set()

        monkeypatch.setattr("aiostage._loop.workers.ThreadsafeEvent", Counted)
        job = workers.job()
        gates = [Gate(), Gate(), Gate()]
        for gate in gates:
            job.put(gate)
        job.close()
        async with anyio.create_task_group() as group:
            group.start_soon(job.settled)
            await anyio.lowlevel.checkpoint()
            for number, gate in enumerate(gates):
                gate.open.set()
                await job.until(partial(is_past, job, number))
        assert len(woken) <= 4, "what waits for progress three times, and what waits for the end once"

    async def test_cancel_drops_what_has_not_begun_and_wakes_join(self, workers: Workers):
        gates = [Gate(), Gate()]
        blocking = workers.job()
        for gate in gates:
            blocking.put(gate)
        blocking.close()
        for gate in gates:
            await entered(gate)
        seen: list[str] = []
        job = workers.job()
        job.put(lambda: seen.append("dropped"))
        joining = asyncio.create_task(job.join())
        await asyncio.sleep(0)

        job.cancel()
        await joining
        for gate in gates:
            gate.open.set()
        await blocking.join()
        assert seen == []

    async def test_cancel_wakes_what_waits_for_it_while_a_step_hangs(self, workers: Workers):
        gate, job = Gate(), workers.job()
        job.put(gate)
        ends = [asyncio.create_task(job.until(lambda: job.cancelled)), asyncio.create_task(job.settled())]
        await entered(gate)
        job.cancel()
        await ends[0]
        assert not gate.passed
        assert not ends[1].done()
        gate.open.set()
        await ends[1]
        assert gate.passed

    async def test_a_cancellation_right_after_the_question_is_not_missed(self, workers: Workers):
        gate, job = Gate(), workers.job()
        job.put(gate)
        await entered(gate)
        closed: list[bool] = []

        def is_closed() -> bool:
            answer = bool(closed)
            if not answer:
                # As another thread does, between the answer and the wait.
                closed.append(True)
                job.cancel()
            return answer

        await asyncio.wait_for(job.until(is_closed), SOON)
        assert not gate.passed
        gate.open.set()
        await job.settled()

    async def test_a_step_that_ends_right_after_the_question_is_not_missed(self, workers: Workers):
        job = workers.job(inline=True)
        job.put(list)
        asked: list[int] = []

        def is_done() -> bool:
            asked.append(job.done)
            if len(asked) == 1:
                job.run_next()
            return bool(asked[-1])

        await asyncio.wait_for(job.until(is_done), SOON)
        assert asked == [0, 1]

    async def test_join_cancelled_waits_for_what_runs_and_drops_the_rest(self, workers: Workers):
        gates = [Gate(), Gate()]
        seen: list[str] = []
        job = workers.job()
        for gate in gates:
            job.put(gate)
        job.put(lambda: seen.append("dropped"))
        joining = asyncio.create_task(job.join())
        for gate in gates:
            await entered(gate)
        await asyncio.sleep(0)

        joining.cancel()
        await asyncio.sleep(0)
        gates[0].open.set()
        await job.until(lambda: job.done > 0)
        assert not joining.done()
        gates[1].open.set()
        with pytest.raises(asyncio.CancelledError):
            await joining
        assert [gate.passed for gate in gates] == [True, True]
        assert seen == []

    async def test_a_block_waits_for_what_it_has_put(self, workers: Workers):
        seen: list[int] = []
        async with workers.job() as job:
            for number in range(10):
                job.put(partial(seen.append, number))
        assert sorted(seen) == list(range(10))
        assert job.finished()

    async def test_a_block_that_fails_waits_for_what_runs_and_drops_the_rest(self, workers: Workers):
        gates = [Gate(), Gate()]
        seen: list[str] = []
        failing = asyncio.Event()

        async def fill() -> None:
            async with workers.job() as job:
                for gate in gates:
                    job.put(gate)
                job.put(lambda: seen.append("dropped"))
                for gate in gates:
                    await entered(gate)
                failing.set()
                raise LookupError("of the block")

        filling = asyncio.create_task(fill())
        await failing.wait()
        gates[0].open.set()
        await until(lambda: gates[0].passed)
        assert not filling.done()
        gates[1].open.set()
        with pytest.raises(LookupError, match="of the block"):
            await filling
        assert seen == []

    async def test_a_block_raises_what_a_step_has_and_leaves_no_circle(self, workers: Workers):
        async def fill() -> weakref.ref[Job]:
            async with workers.job() as job:
                job.put(lambda: 1 / 0)
            raise AssertionError("it must not come here")

        gc.collect()
        gc.disable()
        try:
            with pytest.raises(ZeroDivisionError) as raised:
                await fill()
            gone = weakref.ref(raised.value.__traceback__.tb_next.tb_frame.f_locals["job"])  # type: ignore[union-attr]
            del raised
            # Without the collector. The thread that ran the step may be about to let go, too.
            await until(lambda: gone() is None)
        finally:
            gc.enable()

    async def test_a_block_cancelled_at_every_await(self, workers: Workers):
        running = 0

        def step() -> None:
            nonlocal running
            running += 1
            time.sleep(0.001)
            running -= 1

        async def fill() -> None:
            async with workers.job() as job:
                for _ in range(3):
                    job.put(step)
                    await asyncio.sleep(0)

        async for _ in at_every_await(fill):
            assert running == 0

    async def test_run_next_runs_in_the_calling_thread(self, workers: Workers):
        job = Job(lambda job: None)
        names: list[str] = []
        job.put(lambda: names.append(threading.current_thread().name))
        job.close()
        job.run_next()
        job.run_next()
        await job.join()
        assert names == [threading.current_thread().name]
        assert job.done == 1

    async def test_steps_are_gone_when_the_job_is_finished(self, workers: Workers):
        payload = Payload()
        alive = weakref.ref(payload)

        def step(payload: Payload = payload) -> None:
            pass

        job = workers.job()
        job.put(step)
        job.close()
        del step, payload
        await job.join()
        assert alive() is None

    async def test_an_error_keeps_nothing_of_its_step(self, workers: Workers):
        alive: list[weakref.ref[Payload]] = []

        def fail() -> None:
            payload = Payload()
            alive.append(weakref.ref(payload))
            raise LookupError("no such page")

        gc.collect()
        gc.disable()
        try:
            with pytest.raises(LookupError) as raised:
                await workers.run(fail)
            assert alive[0]() is None
            frames = [frame.name for frame in raised.traceback]
            assert frames[-1] == "fail", "the report still shows where"
            assert "run_next" not in frames
        finally:
            gc.enable()

    async def test_a_coroutine_closed_by_the_collector_inside_the_lock(self, workers: Workers):
        """The collector may run in any allocation, also in one made while this thread has the job's lock."""
        job = workers.job()
        joining = job.join()
        joining.send(None)
        with job._lock:
            joining.close()
        assert job.finished()


@pytest.mark.asyncio
class TestThreads:
    async def test_started_only_as_needed_and_never_more_than_allowed(self, workers: Workers):
        assert workers.threads == 0
        await workers.run(lambda: None)
        assert workers.threads == 1
        for _ in range(200):
            await workers.run(lambda: None)
        job = workers.job()
        for _ in range(200):
            job.put(lambda: None)
        job.close()
        await job.join()
        assert workers.threads <= 2
        assert len(threads_of("test-workers")) <= 2

    async def test_each_begins_with_what_prepares_it(self):
        prepared: list[str] = []
        workers = Workers(2, "test-workers", prepare=lambda: prepared.append(threading.current_thread().name))
        job, ran = workers.job(), set()
        gates = [Gate(), Gate()]
        for gate in gates:
            job.put(lambda gate=gate: (ran.add(threading.current_thread().name in prepared), gate()))
        for gate in gates:
            await entered(gate)
        for gate in gates:
            gate.open.set()
        job.close()
        await job.join()
        workers.stop()
        assert ran == {True}
        assert len(prepared) == len(set(prepared)) == 2

    async def test_idle_threads_end_and_later_work_starts_new_ones(self):
        workers = Workers(2, "test-workers", idle_seconds=0.01)
        await workers.run(lambda: None)
        until_none_of("test-workers")
        assert workers.threads == 0
        assert await workers.run(lambda: "again") == "again"
        workers.stop()

    async def test_stop_lets_submitted_work_finish(self, workers: Workers):
        gates = [Gate(), Gate()]
        seen: list[str] = []
        job = workers.job()
        for gate in gates:
            job.put(gate)
        job.put(lambda: seen.append("done"))
        job.close()
        for gate in gates:
            await entered(gate)
        workers.stop()
        for gate in gates:
            gate.open.set()
        await job.join()
        assert seen == ["done"]
        until_none_of("test-workers")
        assert await workers.run(lambda: "again") == "again"

    async def test_dropping_the_workers_ends_their_threads(self):
        workers = Workers(2, "test-dropped")
        await workers.run(lambda: None)
        del workers
        until_none_of("test-dropped")

    async def test_an_idle_thread_keeps_nothing_of_its_last_job(self, workers: Workers):
        job = workers.job()
        alive = weakref.ref(job)
        job.put(lambda: None)
        job.close()
        await job.join()
        del job
        await until(lambda: alive() is None)

    async def test_a_thread_that_cannot_be_started(self, workers: Workers, monkeypatch: pytest.MonkeyPatch):
        def refuse(*_: object) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(_thread, "start_new_thread", refuse)
            with pytest.raises(RuntimeError, match="can't start"):
                await workers.run(lambda: None)
            assert workers.threads == 0
        assert await workers.run(lambda: "works on") == "works on"

        gate = Gate()
        running = asyncio.create_task(workers.run(gate))
        await entered(gate)
        with monkeypatch.context() as patch:
            patch.setattr(_thread, "start_new_thread", refuse)
            waiting = asyncio.create_task(workers.run(lambda: "served by the other"))
            await asyncio.sleep(0)
        gate.open.set()
        assert await waiting == "served by the other"
        assert await running == "passed"


def test_a_job_is_unfinished_on_every_line_until_its_step_has_ended() -> None:
    """Another thread may ask at any of them; one that hears too early that it is over takes memory half copied."""
    ended: list[str] = []
    answers: list[tuple[bool, bool, bool]] = []

    def step() -> None:
        ended.append("step")
        raise LookupError("of the step")

    job = Job(lambda job: None)
    job.put(step)
    job.close()

    def trace(frame: FrameType, event: str, argument: object) -> object:
        if frame.f_code is not Job.run_next.__code__:
            return None
        answers.append((job.finished(), bool(ended), job.error is not None))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        job.run_next()
    finally:
        sys.settrace(before)
    assert answers[0] == (False, False, False)
    assert answers[-1] == (True, True, True)
    # Once the step has ended and its error is there, and at no line before.
    assert [(over, failed) for over, done, failed in answers if over and not (done and failed)] == []


def test_several_loops_in_threads_share_workers(workers: Workers):
    meeting = threading.Barrier(2)
    results: dict[str, list[int]] = {}

    async def work(name: str) -> None:
        await workers.run(lambda: meeting.wait(SOON))
        results[name] = [await workers.run(lambda number=number: number) for number in range(50)]

    threads = [threading.Thread(target=asyncio.run, args=(work(name),)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert results == {"first": list(range(50)), "second": list(range(50))}


def test_a_loop_closed_while_a_step_runs_leaves_the_workers_working(workers: Workers):
    gate = Gate()
    loop = asyncio.new_event_loop()
    task = loop.create_task(workers.run(gate))
    loop.run_until_complete(entered(gate))
    loop.close()

    gate.open.set()
    assert asyncio.run(workers.run(lambda: "works on")) == "works on"
    task._log_destroy_pending = False
    coroutine = task.get_coro()
    del task
    coroutine.close()


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["trio"])
class TestTrio:
    async def test_run(self, workers: Workers):
        assert await workers.run(lambda: 42) == 42
        with pytest.raises(ZeroDivisionError):
            await workers.run(lambda: 1 // 0)

    async def test_cancelled_while_it_runs_waits_for_it(self, workers: Workers):
        gate = Gate()
        scope = anyio.CancelScope()

        async def run() -> None:
            with scope:
                await workers.run(gate)

        async with anyio.create_task_group() as group:
            group.start_soon(run)
            while not gate.running.is_set():
                await anyio.lowlevel.checkpoint()
            scope.cancel()
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
            assert not scope.cancelled_caught
            gate.open.set()
        assert scope.cancelled_caught
        assert gate.passed
