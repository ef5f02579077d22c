"""Heartbeats: on a store without locks, a writer shows other processes that it is alive and its files are in use."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import weakref
from collections.abc import Callable

__all__ = ["BEATS_PER_LEASE", "LEASE_NAME", "Heartbeat", "lease_seconds", "write_lease"]

LEASE_NAME = "lease.json"
"""An object beside the files of a checkpoint. Its age is the time since the last heartbeat of its writer."""

BEATS_PER_LEASE = 4
"""How often a lease is renewed before it would run out, so that a few failures in a row do no harm."""

_log = logging.getLogger("aiostage")


def write_lease(seconds: float) -> bytes:
    """Compose a lease: for how long it holds, and, for people who read it, which process writes there."""
    return json.dumps({"seconds": seconds, "host": socket.gethostname(), "process": os.getpid()}).encode()


def lease_seconds(data: bytes) -> float:
    """Return for how long a lease holds; 0 for one that cannot be read, which no writer renews."""
    try:
        seconds = json.loads(data)["seconds"]
        return float(seconds)
    except (ValueError, TypeError, KeyError, RecursionError):
        return 0.0


class Heartbeat:
    """Calls a function at intervals, in a thread of its own, until it is stopped or the last reference to it is gone.

    A thread, because it must go on while an event loop is busy, and while nothing of the writer is being awaited.

    Args:
        beat: Blocks for a moment. What it raises is logged, and it is tried again.
        interval: Seconds between two beats.
        name: Of the thread.
    """

    def __init__(self, beat: Callable[[], None], interval: float, name: str) -> None:
        stopped = threading.Event()
        self._stop = weakref.finalize(self, stopped.set)
        self._thread = threading.Thread(target=_beat, args=(beat, interval, stopped), name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop, and wait for a beat that is under way. Blocks. May be called more than once."""
        self._stop()
        self._thread.join()


def _beat(beat: Callable[[], None], interval: float, stopped: threading.Event) -> None:
    while not stopped.wait(interval):
        try:
            beat()
        except Exception as error:
            _log.warning("could not renew a lease, and will try again in %.0f s: %s", interval, error)
