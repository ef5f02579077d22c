from __future__ import annotations

import asyncio

import anyio
import pytest

from aiostage._loop.coroutines import finish, without_locals


class Ending:
    """A call that takes until it may end, and counts how often it was awaited."""

    def __init__(self) -> None:
        self.event = anyio.Event()
        self.waits = 0

    async def wait(self) -> str:
        self.waits += 1
        await self.event.wait()
        return "ended"


@pytest.mark.asyncio
class TestAsyncio:
    async def test_returns_the_result(self):
        ending = Ending()
        ending.event.set()
        assert await finish(ending.wait) == "ended"

    async def test_an_error_comes_through(self):
        async def fail() -> None:
            raise LookupError("nothing to end")

        with pytest.raises(LookupError, match="nothing to end"):
            await finish(fail)

    async def test_cancelled_tasks_wait_to_the_end_first(self):
        ending = Ending()
        task = asyncio.create_task(finish(ending.wait))
        for waits in (1, 2, 3):
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.sleep(0)
            assert not task.done(), f"gave up at cancellation {waits}"
        await asyncio.sleep(0)
        assert ending.waits == 4

        ending.event.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_an_error_wins_over_a_cancellation(self):
        ending = Ending()

        async def fail() -> None:
            await ending.wait()
            raise LookupError("nothing to end")

        task = asyncio.create_task(finish(fail))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        ending.event.set()
        with pytest.raises(LookupError, match="nothing to end"):
            await task

    async def test_a_timeout_around_it_is_a_timeout(self):
        ending = Ending()
        loop = asyncio.get_running_loop()

        async def finish_in_no_time() -> None:
            async with asyncio.timeout(None) as timeout:
                loop.call_soon(timeout.reschedule, loop.time())
                loop.call_later(0.02, ending.event.set)
                await finish(ending.wait)

        with pytest.raises(TimeoutError):
            await finish_in_no_time()
        assert ending.event.is_set()
        assert ending.waits == 2


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
class TestCancelScopes:
    async def test_a_cancelled_scope_waits_to_the_end_first(self):
        ending = Ending()
        results = []
        async with anyio.create_task_group() as group:

            async def wait() -> None:
                results.append(await finish(ending.wait))
                await anyio.lowlevel.checkpoint()
                results.append("not reached")

            group.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await anyio.wait_all_tasks_blocked()
                assert results == []
                ending.event.set()
        assert results == ["ended"]


def test_an_error_that_is_its_own_cause_loses_its_locals_too() -> None:
    def fail() -> None:
        memory = bytearray(8)
        try:
            raise LookupError(f"{len(memory)} bytes")
        except LookupError as error:
            raise error from error

    with pytest.raises(LookupError) as caught:
        fail()
    error = without_locals(caught.value)
    assert error.__cause__ is error
    assert error.__traceback__ is not None
    assert not error.__traceback__.tb_frame.f_locals
