"""Several coroutines at once: whose error it is, and that the others have ended."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from aiostage._loop.coroutines import run_concurrently


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
@pytest.mark.parametrize("error", [ValueError("first"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("place", [0, 1, 2])
async def test_the_first_error_is_raised_itself(error: BaseException, place: int) -> None:
    ended = []

    async def waits() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(1)

    async def fails() -> None:
        await anyio.lowlevel.checkpoint()
        raise error

    calls = [waits, waits, waits]
    calls[place] = fails
    with pytest.raises(type(error)) as caught:
        await run_concurrently(*calls)
    assert caught.value is error
    assert ended == [1, 1]


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_a_cancellation_reaches_all() -> None:
    started = []

    async def waits() -> None:
        started.append(1)
        if len(started) == 3:
            scope.cancel()
        await anyio.sleep_forever()

    with anyio.CancelScope() as scope:
        await run_concurrently(waits, waits, waits)
    assert scope.cancelled_caught
    assert started == [1, 1, 1]
