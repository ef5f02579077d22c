"""Requests whose answer is an error keep nothing alive: future, exception, traceback and frame form no cycle."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest

from aiostage.storage.objects import _answered, _settled


class RefusedError(Exception):
    pass


async def _is_freed(wait: Callable[[asyncio.Future[int]], Awaitable[int]], outcome: str) -> bool:
    """Wait for a future that ends in some way, and return whether it is gone afterwards."""
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    freed = weakref.ref(future)
    task = asyncio.ensure_future(wait(future))
    await asyncio.sleep(0)
    if outcome == "error":
        future.set_exception(RefusedError())
    elif outcome == "cancelled":
        task.cancel()
        await asyncio.sleep(0)
    if not future.done():
        future.set_result(1)
    del future
    with suppress(RefusedError, asyncio.CancelledError):
        await task
    del task
    await asyncio.sleep(0)
    return freed() is None


@pytest.mark.asyncio
@pytest.mark.parametrize("outcome", ["answer", "error", "cancelled"])
@pytest.mark.parametrize("wait", [_answered, _settled])
async def test_an_answer_is_freed_without_the_garbage_collector(
    wait: Callable[[asyncio.Future[int]], Awaitable[int]], outcome: str
) -> None:
    gc.collect()
    gc.disable()
    try:
        assert await _is_freed(wait, outcome)
    finally:
        gc.enable()
