from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import anyio
import pytest

from aiostage._loop.wakeup import Wakeup


def in_thread(call) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


@pytest.mark.asyncio
class TestAsyncio:
    async def test_set_from_another_thread_wakes_every_waiter(self):
        wakeup = Wakeup()
        waiters = [asyncio.create_task(wakeup.wait()) for _ in range(3)]
        await asyncio.sleep(0)
        assert not wakeup.is_set()

        in_thread(wakeup.set)

        assert wakeup.is_set()
        await asyncio.gather(*waiters)

    async def test_set_before_wait(self):
        wakeup = Wakeup()
        assert wakeup.set() is True
        await wakeup.wait()

    async def test_set_more_than_once(self):
        wakeup = Wakeup()
        assert wakeup.set() is True
        assert wakeup.set() is True
        await wakeup.wait()

    async def test_set_from_a_finalizer(self):
        wakeup = Wakeup()

        class Cycle:
            def __init__(self) -> None:
                self.me = self

        weakref.finalize(Cycle(), wakeup.set)
        gc.collect()

        await wakeup.wait()

    async def test_cancelling_one_waiter_leaves_the_others(self):
        wakeup = Wakeup()
        leaving, staying = asyncio.create_task(wakeup.wait()), asyncio.create_task(wakeup.wait())
        await asyncio.sleep(0)

        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert not staying.done()

        wakeup.set()
        await staying


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_set_from_another_thread_on_trio():
    wakeup = Wakeup()
    async with anyio.create_task_group() as group:
        group.start_soon(wakeup.wait)
        await anyio.lowlevel.checkpoint()
        in_thread(wakeup.set)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_set_after_the_loop_has_closed_says_so(backend):
    async def make() -> Wakeup:
        return Wakeup()

    wakeup = anyio.run(make, backend=backend)

    assert wakeup.set() is False
    assert wakeup.set() is False, "also when it was set before"
    assert wakeup.is_set()


def test_set_reaches_a_loop_in_another_thread():
    wakeups: list[Wakeup] = []
    ready = threading.Event()
    woken = []

    async def wait() -> None:
        wakeups.append(Wakeup())
        ready.set()
        await wakeups[0].wait()
        woken.append(threading.current_thread().name)

    thread = threading.Thread(target=lambda: asyncio.run(wait()), name="other loop")
    thread.start()
    assert ready.wait(10)
    wakeups[0].set()
    thread.join(10)

    assert woken == ["other loop"]
