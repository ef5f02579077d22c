"""Ignoring warnings that others have had already, in whatever thread."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["without_warnings"]

_lock = threading.RLock()


@contextmanager
def without_warnings() -> Iterator[None]:
    """Ignore all warnings within a ``with`` statement.

    ``warnings.catch_warnings`` puts back the filters that it has found, which belong to the process. Of two threads
    that are inside at once, the one that leaves last would put back "ignore everything" for good. So one enters at a
    time.
    """
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _after_fork_in_child() -> None:
    # The thread that may have held the lock is not there.
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork_in_child)
