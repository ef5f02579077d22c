"""Which descriptors a test has opened.

A test shares its process with threads that other tests have left, with probes that read source files, and with garbage
that the collector may close at any time. So a test names the kind that it is about, and looks for new ones: the number
of all descriptors may fall or rise while it runs.
"""

from __future__ import annotations

import os

__all__ = ["SHARED_MEMORY", "SOCKETS", "TIMERS", "opened"]

SHARED_MEMORY = ("/memfd:aiostage", "/dev/shm/")
SOCKETS = ("socket:",)
TIMERS = ("anon_inode:[timerfd]",)


def opened(kind: tuple[str, ...]) -> set[tuple[str, str]]:
    """Return number and name of each open descriptor of a kind."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            # The one that the directory itself was read through, or one of another thread.
            continue
        if name.startswith(kind):
            found.add((number, name))
    return found
