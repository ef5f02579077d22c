"""Reading a long range as several shorter ones at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator

import anyio

from aiostage.abc import Buffer

__all__ = ["read_ranges"]

_RANGE_BYTES = 8 << 20
"""One request: long enough that its latency does not count, short enough that several share the work."""

_AT_ONCE = 8


async def read_ranges(read: Callable[[int, Buffer], Awaitable[int]], offset: int, into: Buffer) -> int:
    """Fill a buffer by several reads at once.

    Args:
        read: Fills a buffer from an offset and returns how many bytes there were.
        offset: Of the first byte.
        into: Writable.

    Returns:
        How many bytes there were.

    Raises:
        BaseException: What the first failing read raised; the others are cancelled.
    """
    if into.nbytes <= _RANGE_BYTES:
        return await read(offset, into) if into.nbytes else 0
    starts = iter(range(0, into.nbytes, _RANGE_BYTES))
    count = 0

    async def reader(starts: Iterator[int]) -> None:
        nonlocal count
        for start in starts:
            found = await read(offset + start, into[start : start + _RANGE_BYTES])
            count += found

    try:
        async with anyio.create_task_group() as group:
            for _ in range(min(_AT_ONCE, -(-into.nbytes // _RANGE_BYTES))):
                group.start_soon(reader, starts)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return count
