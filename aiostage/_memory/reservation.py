"""Addresses without memory behind them."""

from __future__ import annotations

from typing import Any

import numpy as np

from aiostage._memory.arena import refused, whole_pages
from aiostage._platform import map_addresses

__all__ = ["reserve_addresses"]


def reserve_addresses(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return an array that takes addresses and no memory, for as long as nothing writes to it. It reads as zeros.

    Args:
        nbytes: How many bytes; may be more than the machine has.

    Raises:
        HostMemoryError: If the kernel has no such range of addresses.
    """
    size = whole_pages(max(nbytes, 1))
    try:
        memory = map_addresses(size)
    except (OSError, MemoryError, OverflowError) as error:
        raise refused(size, error) from error
    return np.frombuffer(memory, np.uint8, count=nbytes)
