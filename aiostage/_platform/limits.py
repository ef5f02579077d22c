"""How much memory this process may have, and how much of it locked."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

__all__ = [
    "MEMORY_LIMIT",
    "locked_memory_limit",
    "memory_limit",
]


def locked_memory_limit() -> int | None:
    """Return how many bytes of memory this process may lock, or None for no limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if limit == resource.RLIM_INFINITY else limit


def memory_limit(root: Path = Path("/")) -> int | None:
    """Return how many bytes of memory this process may have, by its control groups, or None for no limit of theirs.

    Args:
        root: The root of the file system in which to look.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            limits += _limits(root / "sys/fs/cgroup", path, "memory.max")
        elif "memory" in controllers.split(","):
            limits += _limits(root / "sys/fs/cgroup/memory", path, "memory.limit_in_bytes")
    return min(limits, default=None)


_UNLIMITED_BYTES = 1 << 62
"""Control groups of the first version say that they have no limit by a number near the largest."""


def _limits(mount: Path, path: str, name: str) -> list[int]:
    """Return the limits of a control group and of those around it; seen from a container, its own is the root."""
    found = []
    group = mount / path.strip("/")
    for directory in (group, *group.parents):
        with suppress(OSError, ValueError):
            limit = int((directory / name).read_text())
            if limit < _UNLIMITED_BYTES:
                found.append(limit)
        if directory == mount:
            break
    return found


MEMORY_LIMIT = memory_limit()
"""What :func:`memory_limit` said when this was imported; asking reads files."""
