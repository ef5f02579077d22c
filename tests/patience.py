"""How long tests wait for what must come.

Such a wait ends a test that hangs; it measures nothing. So it is generous, and grows with how much slower than an idle
machine this one is now.
"""

from __future__ import annotations

import os
from time import perf_counter

__all__ = ["seconds"]

_GENEROUS = 4.0
_MOST = 20.0
_REFERENCE_SECONDS = 0.025
"""What the work below takes on the machine that the figures were measured on, when it is idle."""


def _work() -> float:
    begin = perf_counter()
    total = 0
    for number in range(500_000):
        total += number & 7
    return perf_counter() - begin


_SLOWNESS = max(1.0, min(_work() for _ in range(3)) / _REFERENCE_SECONDS)
"""How much slower the processor is. The shortest of three, since other processes make it longer."""


def seconds(on_an_idle_machine: float) -> float:
    """Return how long to wait for something that takes so long where nothing else runs."""
    load = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    return on_an_idle_machine * min(_GENEROUS * _SLOWNESS * load, _MOST)
