"""What a save or a load must not leave behind."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import monotonic

OWN = ("aiostage-save", "aiostage-load", "aiostage-disk")
ALL = (*OWN, "aiostage-copy", "aiostage-leases")
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
def nothing_left(names: tuple[str, ...] = ALL) -> Iterator[None]:
    """Check that no thread of such a name goes on, and that no descriptor stays open."""
    before = descriptors()
    others = set(threading.enumerate())
    yield
    # What an error's traceback keeps alive is often a circle, the owner of threads among it.
    gc.collect()
    deadline = monotonic() + SOON
    while alive := [t for t in threading.enumerate() if t.name.startswith(names) and t not in others]:
        assert monotonic() < deadline, f"{alive} go on"
        for thread in alive:
            # One that is being started cannot be joined yet.
            with suppress(RuntimeError):
                thread.join(SOON)
    new = {number: name for number, name in descriptors().items() if before.get(number) != name}
    assert not new, new
