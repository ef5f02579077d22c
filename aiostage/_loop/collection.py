"""Keeping the cyclic garbage collector out of the way while tens of thousands of objects are made."""

from __future__ import annotations

import gc
import threading
from time import perf_counter

__all__ = ["CollectionPause"]

_EXPIRY = 1.0
"""Seconds after which a pause that nobody renewed is over: far longer than a loop takes to come back to a task that
it still runs, and short enough that a loop that was closed meanwhile leaves no process without a collector."""


class CollectionPause:
    """Pauses the collector while at least one holder is at work, for all threads together.

    Making tensors in a row triggers collections whose cost grows with the whole heap, tens of milliseconds each, and
    nothing that a staging makes is garbage. Only a collector that was enabled is paused. A holder whose event loop
    is gone never comes back to end its pause, and with the collector off nothing would notice: hence the expiry.
    """

    def __init__(self) -> None:
        # Reentrant, because the collector may close an abandoned coroutine that holds a pause while this thread has
        # the lock.
        self._lock = threading.RLock()
        self._holders = 0
        self._paused = False
        self._renewed = 0.0
        self._watched = False

    def begin(self) -> None:
        """Become a holder."""
        with self._lock:
            self._holders += 1
            self._renewed = perf_counter()
            if not self._paused and gc.isenabled():
                gc.disable()
                self._paused = True

    def renew(self) -> None:
        """Say that the caller still is at work, before it lets others run."""
        self._renewed = perf_counter()
        if self._paused and not self._watched:
            with self._lock:
                self._watched = True
            threading.Thread(target=self._watch, name="aiostage-collection", daemon=True).start()

    def end(self) -> None:
        """Stop being a holder."""
        with self._lock:
            self._holders -= 1
            if self._holders == 0:
                self._resume()

    def _resume(self) -> None:
        if self._paused:
            self._paused = False
            gc.enable()

    def _watch(self) -> None:
        expired = threading.Event()
        while not expired.wait(_EXPIRY):
            with self._lock:
                if not self._paused or perf_counter() - self._renewed > _EXPIRY:
                    self._resume()
                    self._watched = False
                    return
