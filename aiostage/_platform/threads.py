"""Timers, and the core and the GIL for threads that wait for them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import partial
from time import sleep

from aiostage._platform.system import c_library, c_library_with_gil, find

__all__ = [
    "HAS_TIMERS",
    "let_threads_run",
    "open_timer",
    "set_timer",
    "yield_core",
]

_CLOCK_MONOTONIC = 1
_TIMER_ABSOLUTE = 1
_NANOSECONDS = 1_000_000_000

_timerfd_create = find("timerfd_create", c_library_with_gil)
_timerfd_settime = find("timerfd_settime", c_library_with_gil)

HAS_TIMERS = _timerfd_create is not None and _timerfd_settime is not None
"""Whether :func:`open_timer` may have one to give."""


class _TimerSpecification(ctypes.Structure):
    """What C calls ``struct itimerspec``."""

    _fields_ = (
        ("interval_seconds", ctypes.c_long),
        ("interval_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    )


def open_timer() -> int:
    """Return a descriptor that can be read once its time has come, or -1 if there is none to be had."""
    if not HAS_TIMERS:
        return -1
    descriptor: int = _timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
    return descriptor


def set_timer(descriptor: int, when: float) -> None:
    """Set a timer to a time of :func:`time.monotonic`; what it was set to before is forgotten, and it is unread."""
    # Zero would mean never.
    nanoseconds = max(int(when * _NANOSECONDS), 1)
    value = _TimerSpecification(0, 0, *divmod(nanoseconds, _NANOSECONDS))
    _timerfd_settime(descriptor, _TIMER_ABSOLUTE, ctypes.byref(value), None)


# os.sched_yield() keeps the GIL, and with it from running whom the core is for.
_sched_yield = find("sched_yield", c_library)

yield_core: Callable[[], object] = _sched_yield or partial(sleep, 0)
"""Offer the core to threads that wait for one, without the GIL meanwhile."""

_usleep = find("usleep", c_library)

let_threads_run: Callable[[], object] = partial(sleep, 1e-6) if _usleep is None else partial(_usleep, 1)
"""Give the GIL to threads that wait for it; takes about 60 microseconds.

A thread that works in short steps and releases the GIL for a moment between them has it back before those that wait
have woken up, and they ask for it in earnest after 5 ms only. So it has to be away for longer.
"""
