"""How late an event loop serves a clock that ticks every millisecond.

The clock is a timerfd of the kernel, so that what is measured is the loop and not the resolution of its timers (asyncio
rounds its own up to whole milliseconds). A tick that the loop slept through counts with its own delay: one hold of
10 ms is ten late ticks, not one.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
from time import clock_gettime_ns

__all__ = ["LoopDelay", "percentile"]

TICK_NS = 1_000_000
CLOCK_MONOTONIC = 1
TFD_NONBLOCK = os.O_NONBLOCK
TFD_TIMER_ABSTIME = 1

libc = ctypes.CDLL(None, use_errno=True)


class LoopDelay:
    """Beside a running event loop, in ``async with``: the delay of every tick, in seconds."""

    def __init__(self) -> None:
        self.delays: list[float] = []

    async def __aenter__(self) -> LoopDelay:
        self._descriptor = libc.timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK)
        self._next = clock_gettime_ns(CLOCK_MONOTONIC) + TICK_NS
        times = (0, TICK_NS, self._next // 10**9, self._next % 10**9)
        if self._descriptor < 0 or libc.timerfd_settime(
            self._descriptor, TFD_TIMER_ABSTIME, struct.pack("4q", *times), None
        ):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        asyncio.get_running_loop().add_reader(self._descriptor, self._tick)
        return self

    async def __aexit__(self, *_: object) -> None:
        # What is due by now is late, whether the loop has come to it or not.
        now = clock_gettime_ns(CLOCK_MONOTONIC)
        self._note(now, max(0, (now - self._next) // TICK_NS + 1))
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)

    def _tick(self) -> None:
        try:
            (count,) = struct.unpack("Q", os.read(self._descriptor, 8))
        except BlockingIOError:
            return
        self._note(clock_gettime_ns(CLOCK_MONOTONIC), count)

    def _note(self, now: int, count: int) -> None:
        self.delays += [max(0, now - self._next - number * TICK_NS) / 1e9 for number in range(count)]
        self._next += count * TICK_NS


def percentile(delays: list[float], share: float) -> float:
    """Return the delay that a share of all delays stay below; 0 if there are none."""
    ordered = sorted(delays)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else 0.0
