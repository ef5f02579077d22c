"""Events that can only be asked, as awaitables: which task polls, how often, and what remains without a waiter."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
import weakref
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
import torch
import trio
import uvloop
from anyio.lowlevel import checkpoint

from aiostage._loop import polling, timer
from aiostage._loop.coroutines import Closing
from aiostage._loop.polling import wait_event, wait_until_done
from aiostage.errors import StagerClosedError, StagingError
from aiostage.testing import at_every_await
from tests.descriptors import TIMERS, opened
from tests.threads import in_two_threads

RUNS: dict[str, Callable[[Callable[[], Awaitable[object]]], object]] = {
    "asyncio": asyncio.run,
    "uvloop": uvloop.run,
    "trio": trio.run,
}


def run_on(loop: str, main: Callable[[], Any]) -> None:
    trio.run(main) if loop == "trio" else RUNS[loop](main())  # type: ignore[operator]


class Event:
    """An event that a test completes, and that counts who asks."""

    def __init__(self) -> None:
        self.done = False
        self.error: Exception | None = None
        self.queries = 0
        self.at_query: int | None = None

    def query(self) -> bool:
        self.queries += 1
        if self.error is not None:
            raise self.error
        return self.done or self.queries == self.at_query


class Asynchronous:
    """Its answer is a coroutine, which counts as true."""

    async def query(self) -> bool:
        return False


def polls_here() -> Any:
    state = polling._polling.get()
    assert state is not None
    polls = state()
    assert polls is not None
    return polls


def watch_of(event: Event) -> Any:
    return polls_here()._watches[id(event)]


async def asked_again(event: Event, times: int = 2) -> None:
    """Wait until an event has been asked some more."""
    wanted = event.queries + times
    while event.queries < wanted:
        await checkpoint()


class TestWaiting:
    @pytest.mark.asyncio
    async def test_what_is_done_is_asked_once(self):
        event = Event()
        event.done = True
        await wait_event(event)
        assert event.queries == 1

    @pytest.mark.asyncio
    @pytest.mark.parametrize("event", [3, None, object(), torch.Event, SimpleNamespace(query=True), Asynchronous()])
    async def test_what_is_no_event(self, event: Any):
        with pytest.raises(TypeError, match=r"plain method query\(\)"):
            await wait_event(event)

    @pytest.mark.asyncio
    async def test_is_a_checkpoint_also_when_done(self):
        event = Event()
        event.done = True
        with anyio.CancelScope() as scope:
            scope.cancel()
            await wait_event(event)
        assert scope.cancelled_caught

    @pytest.mark.asyncio
    async def test_asks_until_done(self):
        event = Event()
        event.at_query = 7
        await wait_event(event)
        assert event.queries == 7

    @pytest.mark.anyio
    async def test_on_trio(self):
        event = Event()
        event.at_query = 7
        await wait_event(event)
        assert event.queries == 7

    @pytest.mark.asyncio
    async def test_hundreds_cost_one_poller_and_no_task(self):
        events = [Event() for _ in range(300)]
        tasks = [asyncio.ensure_future(wait_event(event)) for event in events]
        await asked_again(events[-1])
        assert asyncio.all_tasks() == {asyncio.current_task(), *tasks}
        state = polling._polling.get()
        assert state is not None
        polls = state()
        assert polls is not None
        assert len(polls._watches) == 300
        for event in random.Random(0).sample(events, 300):
            event.done = True
        await asyncio.gather(*tasks)
        queries = [event.queries for event in events]
        await asyncio.sleep(0.01)
        assert [event.queries for event in events] == queries

    @pytest.mark.asyncio
    async def test_many_waiters_for_one_event_ask_as_one(self):
        event = Event()
        tasks = [asyncio.ensure_future(wait_event(event)) for _ in range(200)]
        for _ in range(2):
            await asyncio.sleep(0)
        assert event.queries < 100
        event.done = True
        await asyncio.gather(*tasks)

    @pytest.mark.asyncio
    async def test_one_descriptor_while_waiting_and_none_after(self):
        event = Event()
        before = opened(TIMERS)
        tasks = [asyncio.ensure_future(wait_event(event)) for _ in range(50)]
        await asked_again(event)
        assert len(opened(TIMERS) - before) <= 1
        event.done = True
        await asyncio.gather(*tasks)
        for _ in range(3):
            event = Event()
            event.at_query = 3
            await wait_event(event)
            assert len(opened(TIMERS) - before) <= 1
        await asyncio.sleep(0)
        assert not opened(TIMERS) - before

    @pytest.mark.asyncio
    async def test_a_later_and_shorter_wait_is_not_kept_waiting(self):
        """What has waited for an hour is asked seldom, and what has just come is not."""
        distant, near = Event(), Event()
        task = asyncio.ensure_future(wait_event(distant))
        while not distant.queries:
            await asyncio.sleep(0)
        watch = watch_of(distant)
        watch.began -= 3600
        await asked_again(distant, 1)
        near.at_query = 12
        before = distant.queries
        await wait_event(near)
        assert distant.queries - before < 12
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    @pytest.mark.parametrize(
        ("age", "interval"), [(0.0, 1e-4), (0.001, 1e-4), (0.01, 1e-3), (0.1, 1e-2), (0.2, 2e-2), (60.0, 2e-2)]
    )
    def test_is_asked_again_after_a_share_of_its_time(self, age: float, interval: float):
        watch = polling._Watch(Event())
        assert watch.interval(watch.began + age) == pytest.approx(interval)

    @pytest.mark.asyncio
    async def test_old_ones_are_asked_together(self, monkeypatch: pytest.MonkeyPatch):
        events = [Event() for _ in range(50)]
        tasks = [asyncio.ensure_future(wait_event(event)) for event in events]
        await asked_again(events[-1])
        looks = 0
        look = polls_here().ring

        def counted() -> None:
            nonlocal looks
            looks += 1
            look()

        monkeypatch.setattr(polls_here(), "ring", counted)
        for number, event in enumerate(events):
            watch_of(event).began -= 10 + number / 100
        before = sum(event.queries for event in events)
        await asked_again(events[0], 10)
        assert looks < (sum(event.queries for event in events) - before) / 5
        for event in events:
            event.done = True
        await asyncio.gather(*tasks)

    @pytest.mark.asyncio
    async def test_without_a_timer_of_its_own(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(timer, "open_timer", lambda: -1)
        events = [Event() for _ in range(5)]
        for event in events:
            event.at_query = 4
        before = opened(TIMERS)
        tasks = [asyncio.ensure_future(wait_event(event)) for event in events]
        await asyncio.sleep(0)
        assert not opened(TIMERS) - before
        await asyncio.gather(*tasks)


class TestLeaving:
    @pytest.mark.asyncio
    async def test_no_query_without_a_waiter(self):
        event = Event()
        tasks = [asyncio.ensure_future(wait_event(event)) for _ in range(3)]
        await asked_again(event)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        queries = event.queries
        await asyncio.sleep(0.005)
        assert event.queries == queries

    @pytest.mark.asyncio
    async def test_an_event_that_was_left_is_not_asked_while_others_wait(self):
        left, kept = Event(), Event()
        going, staying = asyncio.ensure_future(wait_event(left)), asyncio.ensure_future(wait_event(kept))
        await asked_again(left)
        going.cancel()
        with pytest.raises(asyncio.CancelledError):
            await going
        queries = left.queries
        await asked_again(kept, 3)
        assert left.queries == queries
        kept.done = True
        await staying

    @pytest.mark.asyncio
    async def test_an_event_that_was_left_is_let_go(self):
        left, kept = Event(), Event()
        staying = asyncio.ensure_future(wait_event(kept))
        gone = weakref.ref(left)
        scope = anyio.CancelScope()

        async def wait_a_while(event: Event) -> None:
            with scope:
                await wait_event(event)

        going = asyncio.ensure_future(wait_a_while(left))
        await asked_again(left)
        scope.cancel()
        await going
        del left, going
        gc.collect()
        assert gone() is None
        kept.done = True
        await staying

    @pytest.mark.asyncio
    async def test_several_leave_in_one_step(self):
        events = [Event() for _ in range(4)]
        tasks = [asyncio.ensure_future(wait_event(event)) for event in events]
        await asked_again(events[0])
        for task in (tasks[0], tasks[3], tasks[2]):
            task.cancel()
        await asyncio.gather(tasks[0], tasks[2], tasks[3], return_exceptions=True)
        await asked_again(events[1])
        events[1].done = True
        await tasks[1]

    @pytest.mark.asyncio
    async def test_one_is_done_and_the_other_waits_on(self):
        first, second = Event(), Event()
        tasks = [asyncio.ensure_future(wait_event(event)) for event in (first, second)]
        await asked_again(first)
        first.done = True
        await tasks[0]
        await asked_again(second)
        second.done = True
        await tasks[1]

    @pytest.mark.asyncio
    async def test_cancelled_at_every_await(self):
        companion = Event()
        other = asyncio.ensure_future(wait_event(companion))
        rounds = 0

        def make() -> Any:
            event = Event()
            event.at_query = 5
            return wait_event(event)

        async for _ in at_every_await(make):
            await asked_again(companion)
            rounds += 1
        assert rounds >= 1
        companion.done = True
        await other


async def schedule(seed: int) -> None:
    """Play one schedule: waiters come, events complete or fail, waiters are cancelled, in an order of the seed."""
    rng = random.Random(seed)
    events = [Event() for _ in range(rng.randint(1, 5))]
    outcomes: dict[int, str] = {}
    scopes: dict[int, anyio.CancelScope] = {}
    waits_for: dict[int, Event] = {}

    async def waiter(number: int, event: Event) -> None:
        with scopes[number]:
            try:
                await wait_event(event)
            except StagingError as error:
                outcomes[number] = "failed" if error.__cause__ is event.error else "mistaken"
            else:
                assert event.done
                outcomes[number] = "done"
        outcomes.setdefault(number, "cancelled")

    async with anyio.create_task_group() as group:
        for number in range(rng.randint(2, 12)):
            scopes[number] = anyio.CancelScope()
            waits_for[number] = rng.choice(events)
            group.start_soon(waiter, number, waits_for[number])
            while rng.random() < 0.4:
                action = rng.random()
                if action < 0.3:
                    await checkpoint()
                elif action < 0.8:
                    # Several in one step, before any of them runs.
                    for victim in rng.sample(list(scopes), rng.randint(1, len(scopes))):
                        scopes[victim].cancel()
                else:
                    chosen = rng.choice(events)
                    if not chosen.done and chosen.error is None:
                        chosen.error = ValueError("no") if rng.random() < 0.3 else None
                        chosen.done = chosen.error is None
        # A hang fails by the time limit.
        for event in events:
            await checkpoint()
            event.done = event.done or event.error is None
    assert set(outcomes) == set(scopes)
    assert "mistaken" not in outcomes.values()
    for number, outcome in outcomes.items():
        assert outcome != "cancelled" or scopes[number].cancel_called
        assert outcome != "failed" or waits_for[number].error is not None
    state = polling._polling.get()
    left = state() if state is not None else None
    assert left is None or not (left._watches or left._is_set)
    queries = [event.queries for event in events]
    await checkpoint()
    assert [event.queries for event in events] == queries


class TestSchedules:
    @pytest.mark.parametrize("loop", RUNS)
    @pytest.mark.timeout(60)
    def test_thousands_of_cancel_schedules(self, loop: str):
        before = opened(TIMERS)

        async def main() -> None:
            for seed in range(1500):
                await schedule(seed)

        run_on(loop, main)
        gc.collect()
        assert not opened(TIMERS) - before


class TestErrors:
    @pytest.mark.asyncio
    async def test_reaches_every_waiter_with_its_cause(self):
        event, original = Event(), ValueError("out of luck")
        tasks = [asyncio.ensure_future(wait_event(event)) for _ in range(5)]
        await asked_again(event)
        event.error = original
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert len(set(map(id, errors))) == 5
        for error in errors:
            assert isinstance(error, StagingError)
            assert "out of luck" in str(error)
            assert error.__cause__ is original

    @pytest.mark.asyncio
    async def test_at_the_first_query(self):
        event = Event()
        event.error = ValueError("out of luck")
        with pytest.raises(StagingError, match="out of luck") as caught:
            await wait_event(event)
        assert caught.value.__cause__ is event.error

    @pytest.mark.asyncio
    async def test_does_not_touch_other_events(self):
        bad, good = Event(), Event()
        tasks = [asyncio.ensure_future(wait_event(event)) for event in (bad, good)]
        await asked_again(good)
        bad.error = ValueError("out of luck")
        with pytest.raises(StagingError):
            await tasks[0]
        await asked_again(good)
        good.done = True
        await tasks[1]

    @pytest.mark.asyncio
    async def test_an_interrupt_reaches_its_waiters_as_it_is(self):

        class Interrupt(BaseException):
            pass

        class Interrupted(Event):
            def query(self) -> bool:
                if super().query():
                    raise Interrupt
                return False

        async def interrupted() -> bool:
            # Caught in the task: asyncio stops its loop at what is not an Exception.
            try:
                await wait_event(bad)
            except Interrupt:
                return True
            return False

        bad, good = Interrupted(), Event()
        tasks = [asyncio.ensure_future(interrupted()), asyncio.ensure_future(wait_event(good))]
        await asked_again(good)
        bad.done = True
        assert await tasks[0]
        await asked_again(good)
        good.done = True
        await tasks[1]


class TestClosing:
    @pytest.mark.parametrize("loop", RUNS)
    def test_waits_end_at_once(self, loop: str):
        """Of one event and of several, and those of no other stager."""

        async def main() -> None:
            closing, other = Closing(), Closing()
            events = [Event() for _ in range(3)]
            ended: list[str] = []

            async def wait(event: Event, of: Closing, name: str) -> None:
                try:
                    await wait_until_done(event, of)
                except StagerClosedError:
                    name += ", closed"
                ended.append(name)

            async with anyio.create_task_group() as group:
                for event in events:
                    for _ in range(2):
                        group.start_soon(wait, event, closing, "waiter")
                group.start_soon(wait, events[0], other, "bystander")
                while not all(event.queries for event in events):
                    await checkpoint()
                thread = threading.Thread(target=closing.close)
                thread.start()
                thread.join()
                while len(ended) < 6:
                    await checkpoint()
                other.close()
            assert ended == ["waiter, closed"] * 6 + ["bystander, closed"]
            with pytest.raises(StagerClosedError):
                await wait_until_done(events[1], closing)

        run_on(loop, main)

    @pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
    def test_keeps_no_loop_alive_that_was_closed_meanwhile(
        self, new_loop: Callable[[], asyncio.AbstractEventLoop]
    ) -> None:
        closing, event, loop = Closing(), Event(), new_loop()
        tasks = [loop.create_task(wait_until_done(event, closing)) for _ in range(3)]
        loop.run_until_complete(asked_again(event))
        loop.close()
        closing.close()
        gone = weakref.ref(tasks[0])
        for task in tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        del tasks, task
        gc.collect()
        assert gone() is None
        assert not closing._calls


class TestLoops:
    @pytest.mark.parametrize("loop", RUNS)
    def test_nothing_outlives_the_loop(self, loop: str):
        kept: list[weakref.ref[Any]] = []
        before = opened(TIMERS)

        async def main() -> None:
            event = Event()
            async with anyio.create_task_group() as group:
                for _ in range(5):
                    group.start_soon(wait_event, event)
                await asked_again(event)
                state = polling._polling.get()
                assert state is not None
                kept.append(state)
                kept.append(weakref.ref(event))
                if loop == "asyncio":
                    kept.append(weakref.ref(asyncio.get_running_loop()))
                group.cancel_scope.cancel()

        run_on(loop, main)
        gc.collect()
        assert [reference() for reference in kept] == [None] * len(kept)
        assert not opened(TIMERS) - before

    @pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
    def test_a_loop_that_is_closed_while_they_wait(self, new_loop: Callable[[], asyncio.AbstractEventLoop]):
        before = opened(TIMERS)
        event = Event()
        loop = new_loop()
        tasks = [loop.create_task(wait_event(event)) for _ in range(5)]
        loop.run_until_complete(asked_again(event))
        state = loop.run_until_complete(self._state())
        loop.close()
        references = [weakref.ref(loop), state, weakref.ref(tasks[0])]
        queries = event.queries
        for task in tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        del loop, tasks, task
        gc.collect()
        assert [reference() for reference in references] == [None] * 3
        assert event.queries == queries
        assert not opened(TIMERS) - before

    def test_a_timer_that_is_finished_before_its_waiters_is_closed_once(self, monkeypatch: pytest.MonkeyPatch):
        """The collector finishes what lies in a circle in any order. The second time, the number is another file's."""
        event, loop = Event(), asyncio.new_event_loop()
        waiting = loop.create_task(wait_event(event))
        loop.run_until_complete(asked_again(event))
        polls = loop.run_until_complete(self._state())()
        descriptor, closed = polls._descriptor, []
        if descriptor < 0:
            pytest.skip("this system has no timers with descriptors")
        loop.close()
        close = os.close

        def noted(number: int) -> None:
            closed.append(number)
            close(number)

        monkeypatch.setattr(os, "close", noted)
        polls.__del__()
        waiting._log_destroy_pending = False  # type: ignore[attr-defined]
        waiting.get_coro().close()
        assert closed.count(descriptor) == 1

    def test_descriptors_go_with_their_loops(self):
        async def main() -> None:
            event = Event()
            event.at_query = 3
            await wait_event(event)

        gc.collect()
        before = opened(TIMERS)
        gc.disable()
        try:
            for _ in range(20):
                asyncio.run(main())
                uvloop.run(main())
                trio.run(main)
            assert not opened(TIMERS) - before
        finally:
            gc.enable()

    @staticmethod
    async def _state() -> weakref.ref[Any]:
        state = polling._polling.get()
        assert state is not None
        return state

    def test_two_loops_in_two_threads(self):
        events = [[Event() for _ in range(20)] for _ in range(2)]
        together = threading.Barrier(2)
        threads: list[set[int]] = [set(), set()]

        async def main(side: int) -> None:
            async with anyio.create_task_group() as group:
                for event in events[side]:
                    group.start_soon(wait_event, event)
                await asked_again(events[side][0])
                await asyncio.to_thread(together.wait, 10)
                state = polling._polling.get()
                assert state is not None
                polls = state()
                assert polls is not None
                threads[side] = {id(polls), *polls._watches}
                await asyncio.to_thread(together.wait, 10)
                for event in events[side]:
                    event.done = True

        in_two_threads(lambda side: (asyncio.run, uvloop.run)[side](main(side)))
        assert threads[0].isdisjoint(threads[1])
