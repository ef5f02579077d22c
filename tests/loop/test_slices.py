from __future__ import annotations

import asyncio
import gc
import math
import socket
import time
import weakref

import anyio
import pytest

from aiostage._loop.coroutines import Slices
from aiostage._loop.workers import Workers
from aiostage.testing import at_every_await

NO_TIME = 1e-12


def count_to(steps: int, seen: list[int] | None = None):
    """Return a generator of so many steps, which notes them and, last, that it was closed."""
    seen = seen if seen is not None else []
    try:
        for step in range(steps):
            seen.append(step)
            yield
        return steps
    finally:
        seen.append(-1)


def test_time_without_the_core_is_elapsed_and_no_hold() -> None:
    def wait():
        time.sleep(0.1)
        yield

    slices = Slices(math.inf)
    assert slices.take(wait())
    assert slices.longest_elapsed >= 0.1
    assert slices.longest_hold < 0.05


@pytest.mark.asyncio
class TestAsyncio:
    async def test_returns_what_the_generator_returns(self):
        assert await Slices(0.001).run(count_to(10)) == 10

    async def test_infinite_hold_never_yields(self):
        slices = Slices(math.inf)
        await slices.run(count_to(100_000))
        assert slices.yields == 0

    async def test_a_hold_too_short_for_one_step_yields_after_each(self):
        slices = Slices(NO_TIME)
        assert await slices.run(count_to(50)) == 50
        assert slices.yields == 50

    async def test_others_run_at_every_yield(self):
        turns = 0

        async def take_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        other = asyncio.create_task(take_turns())
        slices = Slices(NO_TIME)
        await slices.run(count_to(50))
        other.cancel()

        assert turns == 2 * slices.yields == 100

    async def test_what_comes_during_a_slice_is_served_before_the_next(self):
        # asyncio runs what its selector reports after what was ready before, such as a coroutine that gave way once.
        reading, writing = socket.socketpair()
        for each in (reading, writing):
            each.setblocking(False)
        seen: list[str] = []

        def work():
            for _ in range(5):
                seen.append("slice")
                writing.send(b".")
                yield

        def read():
            reading.recv(1)
            seen.append("read")

        with reading, writing:
            loop = asyncio.get_running_loop()
            loop.add_reader(reading, read)
            try:
                await Slices(NO_TIME).run(work())
            finally:
                loop.remove_reader(reading)
        assert seen == ["slice", "read"] * 5

    async def test_longest_hold_is_the_longest_slice(self):
        slices = Slices(math.inf)
        await slices.run(count_to(100))
        short = slices.longest_hold
        await slices.run(count_to(100_000))
        assert slices.longest_hold > short > 0

    async def test_what_follows_without_a_turn_for_the_loop_shares_a_slice(self):
        slices = Slices(0.001)
        runs = 0
        while slices.yields < 20:
            await slices.run(count_to(3))
            runs += 1
        # Each alone is over in a microsecond.
        assert runs > 20
        assert slices.longest_elapsed >= 0.0003

    async def test_threads_get_the_gil_between_two_slices(self):
        workers = Workers(1, "test-turns")
        job = workers.job()
        for _ in range(20):
            job.put(lambda: None)
        job.close()

        def work():
            while not job.finished():
                for _ in range(1000):
                    pass
                yield
            return job.done

        assert await Slices(0.001).run(work(), job) == 20
        assert not job.busy

    async def test_an_error_comes_through(self):
        def fail():
            yield
            raise LookupError("no such leaf")

        with pytest.raises(LookupError, match="no such leaf"):
            await Slices(NO_TIME).run(fail())

    async def test_cancelled_at_every_await_it_closes_the_generator_there(self):
        seen: list[int] = []
        async for number in at_every_await(lambda: Slices(NO_TIME).run(count_to(5, seen))):
            # It gives way twice.
            assert seen == [*range(number // 2 + 1), -1]
            seen.clear()
        assert seen == [0, 1, 2, 3, 4, -1]

    async def test_an_error_does_not_keep_the_generator(self):
        """From Python 3.13 on, closing a generator that has not begun leaves it what it was called with."""
        slices = Slices(NO_TIME)
        await slices.run(count_to(1))
        work = count_to(5)
        gone = weakref.ref(work)
        task = asyncio.ensure_future(slices.run(work))
        del work
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        del task
        assert caught.value.__traceback__ is not None
        assert gone() is None

    async def test_the_collector_is_left_alone(self):
        states = []

        def watch():
            states.append(gc.isenabled())
            yield
            states.append(gc.isenabled())

        slices = Slices(NO_TIME)
        assert not slices.take(watch())
        await slices.run(watch())
        assert states == [True] * 3

    async def test_a_users_switch_of_the_collector_stays(self):
        def switch():
            gc.disable()
            yield
            assert not gc.isenabled()
            yield

        try:
            await Slices(NO_TIME).run(switch())
            assert not gc.isenabled()
        finally:
            gc.enable()


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_trio_cancels_between_slices():
    seen: list[int] = []
    with anyio.CancelScope() as scope:
        scope.cancel()
        await Slices(NO_TIME).run(count_to(5, seen))
    assert scope.cancelled_caught
    assert seen == [0, -1]


@pytest.mark.asyncio
async def test_a_cancellation_before_the_first_step_does_not_keep_what_the_steps_were_to_use() -> None:
    class Source:
        pass

    def steps(source: Source | None):
        yield

    slices = Slices(1e-9)
    await slices.run(steps(None))
    source = Source()
    gone = weakref.ref(source)
    waiting = slices.run(steps(source))
    del source
    waiting.send(None)
    # On Python 3.13 a generator that is closed before it has begun keeps its arguments, and a traceback its frames.
    with pytest.raises(asyncio.CancelledError) as caught:
        waiting.throw(asyncio.CancelledError())
    assert caught.value.__traceback__ is not None
    assert gone() is None
