"""Addresses without memory behind them."""

from __future__ import annotations

import mmap
import sys
from typing import Any

import numpy as np

from aiostage._memory.arena import refused, whole_pages

__all__ = ["reserve_addresses"]

_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0
"""MAP_NORESERVE, for which Python has no name."""


def reserve_addresses(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return an array that takes addresses and no memory, for as long as nobody writes to it. It reads as zeros.

    Args:
        nbytes: How many bytes; may be more than the machine has.

    Raises:
        HostMemoryError: If the kernel has no such range of addresses.
    """
    size = whole_pages(max(nbytes, 1))
    try:
        if sys.platform == "win32":
            memory = mmap.mmap(-1, size)
        else:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    except (OSError, MemoryError, OverflowError) as error:
        raise refused(size, error) from error
    return np.frombuffer(memory, np.uint8, count=nbytes)
