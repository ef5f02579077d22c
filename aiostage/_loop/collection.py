"""Keeping the cyclic garbage collector out of the way while tens of thousands of objects are made."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections import deque
from collections.abc import Iterable
from time import perf_counter

from aiostage._loop.forks import tell_of_forks
from aiostage._loop.threads import begin

__all__ = ["CollectionPause", "untrack_all"]

_EXPIRY = 1.0
"""Seconds after which a pause that nobody renewed is over: far longer than a loop takes to come back to a task that
it still runs, and short enough that a loop that was closed meanwhile leaves no process without a collector."""


_untrack = ctypes.PyDLL(None).PyObject_GC_UnTrack
_untrack.argtypes = [ctypes.py_object]
_untrack.restype = None

_consume = deque[None](maxlen=0).extend


def untrack_all(objects: Iterable[object]) -> None:
    """Take objects that can be in no circle out of the collector's lists.

    Tens of thousands of tensors at once would make the collector look at all of them together, which holds the event
    loop for 20 ms at 50,000 and brings forward a look at the whole heap; a list of as many costs a millisecond each
    time that it is looked at. It is public C API, and freeing an object that is not in the lists is allowed for.
    """
    _consume(map(_untrack, objects))


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
        tell_of_forks(self)

    def forked(self) -> None:
        """Let a child collect, which has neither the holders nor the thread that would have seen to it."""
        self._lock = threading.RLock()
        self._holders = 0
        self._watched = False
        self._resume()

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
            begin(threading.Thread(target=self._watch, name="aiostage-collection", daemon=True))

    def end(self) -> None:
        """Stop being a holder."""
        with self._lock:
            # In a forked child, a coroutine of the parent may be closed that began before.
            self._holders = max(self._holders - 1, 0)
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
