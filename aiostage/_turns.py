"""What long work in a worker thread does now and then: give other threads the GIL, and end once it is cancelled."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TypeVar

from aiostage._platform import let_threads_run

__all__ = ["Stopped", "release_gil", "releasing_gil", "stoppable"]

T = TypeVar("T")

_TURN = 0.0003
"""Seconds after which a thread gives the GIL away, so that an event loop beside it does not wait for long. The
interpreter waits 5 ms."""

_ITEMS_AT_ONCE = 16
"""Items between two looks at the clock."""


class Stopped(BaseException):
    """Work in a thread was cancelled. Like asyncio's own error it is no Exception, so that no code takes it for one."""


class _Turn(threading.local):
    """Of one thread: when it last gave the GIL away, and what says whether its work is cancelled."""

    given = 0.0
    is_cancelled: Callable[[], bool] | None = None


_turn = _Turn()


def release_gil() -> None:
    """Give other threads the GIL, if this one has had it for 0.3 ms. Call it in loops over much private data.

    Works in any thread, and takes 0.1 microseconds when it is not yet time.

    Raises:
        Stopped: If the work was begun by :func:`stoppable` and is cancelled.
    """
    if perf_counter() - _turn.given > _TURN:
        if _turn.is_cancelled is not None and _turn.is_cancelled():
            raise Stopped
        let_threads_run()
        _turn.given = perf_counter()


def releasing_gil(items: Iterable[T]) -> Iterator[T]:
    """Iterate over items, and call :func:`release_gil` now and then."""
    for count, item in enumerate(items):
        if count % _ITEMS_AT_ONCE == 0:
            release_gil()
        yield item


@contextmanager
def stoppable(is_cancelled: Callable[[], bool]) -> Iterator[None]:
    """Have :func:`release_gil` end the work of the block once it is cancelled."""
    before, _turn.is_cancelled = _turn.is_cancelled, is_cancelled
    try:
        yield
    finally:
        _turn.is_cancelled = before
