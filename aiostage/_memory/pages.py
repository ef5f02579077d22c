"""What the kernel is told about the pages of memory."""

from __future__ import annotations

import ctypes
import mmap
import sys
from threading import Lock

__all__ = ["HugePages", "discard"]

_ORDINARY_SECONDS_PER_BYTE = 0.4e-3 / (1 << 20)
"""What it costs to read a file from the page cache into ordinary pages; into huge ones, a quarter of that."""

_PATIENCE_SECONDS = 0.03
"""How much more than ordinary pages huge ones may have cost, all in all, before they are done without. They have to be
assembled first where memory is fragmented, or to be fetched from a hypervisor, 15 ms for 8 MiB; a few of those are soon
made up for."""

if sys.platform == "linux":
    # mmap.madvise() keeps the GIL, which for discarding much memory is tens of milliseconds.
    _madvise = ctypes.CDLL(None, use_errno=True).madvise
    _madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    # A mark on the mapping is made within a microsecond, and giving the GIL away for it could cost five milliseconds.
    _mark = ctypes.PyDLL(None).madvise
    _mark.argtypes = _madvise.argtypes

    def discard(address: int, nbytes: int) -> None:
        """Give pages back to the kernel; the memory reads as zeros afterwards. Blocks, without the GIL."""
        _madvise(address, nbytes, mmap.MADV_DONTNEED)

    def _prefer(address: int, nbytes: int, *, huge: bool) -> None:
        start = address // mmap.PAGESIZE * mmap.PAGESIZE
        stop = -(-(address + nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        # Advice only: a kernel built without huge pages refuses it, and ordinary ones do.
        _mark(start, stop - start, mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)

else:

    def discard(address: int, nbytes: int) -> None:
        """Leave it to the unmapping."""

    def _prefer(address: int, nbytes: int, *, huge: bool) -> None:
        """Take the pages that come."""


class HugePages:
    """New memory in huge pages, as long as they come quickly.

    Whoever uses it keeps the memory until all of it was written to.
    """

    def __init__(self) -> None:
        self._preferred: list[tuple[int, int]] = []
        self._are_slow = False
        self._lock = Lock()
        self._cost = 0.0

    def prefer(self, address: int, nbytes: int) -> None:
        """Have memory that was not written to yet come in huge pages.

        Args:
            address: Any.
            nbytes: How much. The pages at both ends are included, so that what lies side by side stays one mapping to
                the kernel, of which a process may have 65,530.
        """
        if not self._are_slow:
            _prefer(address, nbytes, huge=True)
            self._preferred.append((address, nbytes))

    def took(self, seconds: float, nbytes: int) -> None:
        """Note for how long a thread was at work to read into some of the memory, and do without if it is too long."""
        with self._lock:
            self._cost += seconds - _ORDINARY_SECONDS_PER_BYTE * nbytes
            if self._cost < _PATIENCE_SECONDS:
                return
            self._are_slow = True
            preferred, self._preferred = self._preferred, []
            for address, length in preferred:
                _prefer(address, length, huge=False)
