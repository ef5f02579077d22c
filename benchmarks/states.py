"""Free memory in a state that is known: ready, or given back to the hypervisor.

On a virtual machine the kernel's free memory need not exist. The hypervisor finds it when it is first touched, at its
own speed, and takes it away again some time after it was freed ("free page reporting"): Linux looks every two seconds
while there is something to report, and takes a part of it each time, in pieces of a huge page or more. So memory that
was freed just now may be gone before it is used, by whoever happens to be measured then.

Both states are made here by using memory, and both are measured: by how long single huge pages take, before the work,
and by what the kernel has reported until its end.
"""

from __future__ import annotations

import mmap
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, perf_counter, sleep

import numpy

__all__ = ["State", "given_back", "ready"]

HUGE_BYTES = 2 << 20
_COUNTERS = Path("/sys/module/page_reporting/parameters")
_SLOW_SECONDS = 1e-3
"""A huge page that is there takes 0.2 ms, most of it for zeros; one that the hypervisor has to find takes 4 ms."""

_REPORT_SECONDS = 2.2
"""How long to wait for the kernel's next look at what can be reported: a tenth more than it waits itself."""

_PROBES = 16
_LEFTOVER = 256
"""So many huge pages are taken at most, until as many as are probed have come from the hypervisor one after another."""

_GIVEN_BACK_SECONDS = 60.0
"""The kernel reports half a gibibyte a second."""


@dataclass
class State:
    """What the free memory of the machine was like.

    Attributes:
        wanted: ``ready`` or ``given back``.
        probe: Seconds that a huge page took just before the work, in the median.
        reported: Bytes that went to the hypervisor from then to the end of the work; None if the kernel does not say.
    """

    wanted: str
    probe: float
    reported: int | None = None

    @property
    def found(self) -> bool:
        """Whether the state was the one that was wanted."""
        if self.wanted == "ready":
            return self.probe < _SLOW_SECONDS and not self.reported
        return self.probe >= _SLOW_SECONDS


@contextmanager
def ready(nbytes: int) -> Iterator[State]:
    """Have memory ready for the block: it was in use just before, and is not reported within two seconds.

    Args:
        nbytes: How much the work in the block needs.
    """
    with ExitStack() as held:
        memory = _Memory(nbytes + nbytes // 8)
        for _ in memory.touched():
            pass
        # The kernel looks for the first time two seconds after something was freed, and again two seconds later for
        # as long as it finds more than it takes at once. Right after a look is when the next one is farthest.
        _wait_for_a_report()
        memory.close()
        with _measured("ready", held) as state:
            yield state


@contextmanager
def given_back() -> Iterator[State]:
    """Have the hypervisor hold the memory for the block: nothing was freed that it does not have by now."""
    with ExitStack() as held:
        begin = monotonic()
        while monotonic() - begin < _GIVEN_BACK_SECONDS and _wait_for_a_report():
            pass
        # A few are left that are in nobody's list to report. They would be the first to be used.
        leftover = _Memory(_LEFTOVER * HUGE_BYTES)
        held.callback(leftover.close)
        slow = 0
        for seconds in leftover.touched():
            slow = slow + 1 if seconds >= _SLOW_SECONDS else 0
            if slow == _PROBES:
                break
        with _measured("given back", held) as state:
            yield state


@contextmanager
def _measured(wanted: str, held: ExitStack) -> Iterator[State]:
    """Measure the state at the beginning and at the end of the block."""
    before = _reported()
    probe = _Memory(_PROBES * HUGE_BYTES)
    # Freed with the rest: it would be the first to be used.
    held.callback(probe.close)
    state = State(wanted, statistics.median(probe.touched()))
    yield state
    after = _reported()
    state.reported = after - before if before is not None and after is not None else None


class _Memory:
    """A mapping of huge pages that nobody has touched yet."""

    def __init__(self, nbytes: int) -> None:
        self._memory = mmap.mmap(-1, nbytes + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._nbytes = nbytes

    def touched(self) -> Iterator[float]:
        """Touch one huge page after another, yielding how many seconds it took."""
        array = numpy.frombuffer(self._memory, numpy.uint8)
        begin = -array.ctypes.data % HUGE_BYTES
        for start in range(begin, begin + self._nbytes, HUGE_BYTES):
            before = perf_counter()
            array[start] = 1
            yield perf_counter() - before

    def close(self) -> None:
        self._memory.close()


def _wait_for_a_report() -> bool:
    """Wait until the kernel has looked at what it can report; return False if it does not, for it has nothing."""
    begin, already = monotonic(), _counter("passes")
    while monotonic() - begin < _REPORT_SECONDS:
        if _counter("passes") != already:
            return True
        sleep(0.002)
    return False


def _reported() -> int | None:
    kibibytes = _counter("reported_kib")
    return None if kibibytes is None else kibibytes * 1024


def _counter(name: str) -> int | None:
    """Return one of the kernel's counters of free page reporting; None if it does not count."""
    try:
        return int((_COUNTERS / name).read_text())
    except (OSError, ValueError):
        return None
