"""What a save or a load must not leave behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

NAMES = ("aiostage-save", "aiostage-load", "aiostage-copy")
SOON = 10.0


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
def nothing_left() -> Iterator[None]:
    """Check that no thread of a save or a load goes on, and that no descriptor stays open."""
    before = descriptors()
    yield
    for thread in threading.enumerate():
        if thread.name.startswith(NAMES):
            thread.join(SOON)
            assert not thread.is_alive(), f"{thread.name} goes on"
    new = {number: name for number, name in descriptors().items() if before.get(number) != name}
    assert not new, new
