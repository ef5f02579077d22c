"""Memory for parts of files, used again by lifetime."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from aiostage.storage.files import aligned_memory

__all__ = ["PartBuffers"]


class PartBuffers:
    """Memory for parts that are gathered from many places, used again when nothing refers to what was made from it.

    Args:
        part_bytes: How large each is.
    """

    def __init__(self, part_bytes: int) -> None:
        self.part_bytes = part_bytes
        self._free: list[np.ndarray[Any, Any]] = []

    def take(self) -> np.ndarray[Any, Any]:
        """Return uninitialized memory. May be called from any thread."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = aligned_memory(self.part_bytes)
        # An array with a base of its own, which everything that is made from it keeps alive.
        lent: np.ndarray[Any, Any] = np.frombuffer(memory.data, np.uint8)
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return lent
