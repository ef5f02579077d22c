from __future__ import annotations

import asyncio
import gc
import math
import threading
import weakref
from collections.abc import Coroutine
from typing import Any

import anyio
import pytest
import uvloop

from aiostage._loop.coroutines import ThreadsafeEvent


def in_thread(call) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


@pytest.mark.asyncio
class TestAsyncio:
    async def test_set_from_another_thread_wakes_every_waiter(self):
        event = ThreadsafeEvent()
        waiters = [asyncio.create_task(event.wait()) for _ in range(3)]
        await asyncio.sleep(0)
        assert not event.is_set()

        in_thread(event.set)

        assert event.is_set()
        await asyncio.gather(*waiters)

    async def test_set_before_wait(self):
        event = ThreadsafeEvent()
        assert event.set() is True
        await event.wait()

    async def test_set_more_than_once(self):
        event = ThreadsafeEvent()
        assert event.set() is True
        assert event.set() is True
        await event.wait()

    async def test_set_from_a_finalizer(self):
        event = ThreadsafeEvent()

        class Cycle:
            def __init__(self) -> None:
                self.me = self

        weakref.finalize(Cycle(), event.set)
        gc.collect()

        await event.wait()

    async def test_cancelling_one_waiter_leaves_the_others(self):
        event = ThreadsafeEvent()
        leaving, staying = asyncio.create_task(event.wait()), asyncio.create_task(event.wait())
        await asyncio.sleep(0)

        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert not staying.done()

        event.set()
        await staying

    async def test_a_timeout_ends_the_wait_and_sets_nothing(self):
        event = ThreadsafeEvent()
        await event.wait(0)
        assert not event.is_set()

    async def test_set_before_the_timeout(self):
        event = ThreadsafeEvent()
        waiting = asyncio.create_task(event.wait(1000))
        await asyncio.sleep(0)
        in_thread(event.set)
        await waiting

    async def test_cancelled_before_the_timeout(self):
        waiting = asyncio.create_task(ThreadsafeEvent().wait(1000))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_a_timeout_on_trio():
    event = ThreadsafeEvent()
    await event.wait(0)
    assert not event.is_set()
    event.set()
    await event.wait(1000)


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("timeout", [1000, math.inf])
def test_a_wait_may_be_closed_after_its_loop(make_loop, timeout):
    """That is what the collector does to the coroutines of a loop that was closed too early."""
    loop = make_loop()

    async def begin() -> Coroutine[Any, Any, None]:
        waiting = ThreadsafeEvent().wait(timeout)
        waiting.send(None)
        return waiting

    waiting = loop.run_until_complete(begin())
    loop.close()
    waiting.close()


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_set_from_another_thread_on_trio():
    event = ThreadsafeEvent()
    async with anyio.create_task_group() as group:
        group.start_soon(event.wait)
        await anyio.lowlevel.checkpoint()
        in_thread(event.set)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_set_after_the_loop_has_closed_says_so(backend):
    async def make() -> ThreadsafeEvent:
        return ThreadsafeEvent()

    event = anyio.run(make, backend=backend)

    assert event.set() is False
    assert event.set() is False, "also when it was set before"
    assert event.is_set()


def test_set_reaches_a_loop_in_another_thread():
    events: list[ThreadsafeEvent] = []
    ready = threading.Event()
    woken = []

    async def wait() -> None:
        events.append(ThreadsafeEvent())
        ready.set()
        await events[0].wait()
        woken.append(threading.current_thread().name)

    thread = threading.Thread(target=lambda: asyncio.run(wait()), name="other loop")
    thread.start()
    assert ready.wait(10)
    events[0].set()
    thread.join(10)

    assert woken == ["other loop"]
