"""What a save or a load must not leave behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic, sleep

from tests.threads import SOON, until_none_of

OWN = ("aiostage-save", "aiostage-load", "aiostage-disk", "aiostage-read")
ALL = (*OWN, "aiostage-copy", "aiostage-leases")


def descriptors() -> dict[str, str]:
    """Return what the process has open, by number."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            found[number] = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            # The one that the directory itself was read through.
            continue
    return found


@contextmanager
def nothing_left(names: tuple[str, ...] = ALL) -> Iterator[None]:
    """Check that no thread of such a name goes on, and that no descriptor stays open."""
    before = descriptors()
    others = set(threading.enumerate())
    yield
    until_none_of(names, others=others)
    deadline = monotonic() + SOON
    while new := {number: name for number, name in descriptors().items() if before.get(number) != name}:
        # Other threads open files for a moment, such as a probe that reads the lines of a source.
        assert monotonic() < deadline, new
        sleep(0.01)
