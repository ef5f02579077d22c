"""What of a file the page cache has."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

from aiostage._platform.system import BUILT_FOR_LINUX, HAS_USUAL_FLAGS, c_library, find

__all__ = [
    "counts_cached_pages",
    "is_cached",
]

_mmap, _munmap, _mincore = (
    (find(name, c_library) for name in ("mmap", "munmap", "mincore")) if BUILT_FOR_LINUX else (None, None, None)
)
_MINCORE_BYTES = os.sysconf("SC_PAGE_SIZE")
"""What each byte of its answer is about; from the kernel itself, which writes as many."""

_FAILED = ctypes.c_void_p(-1).value
if _mmap is not None:
    _mmap.restype = ctypes.c_void_p
    _mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
if _munmap is not None:
    _munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
if _mincore is not None:
    _mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


_syscall = find("syscall", c_library) if BUILT_FOR_LINUX else None
_CACHESTAT = 451
"""Linux 6.5 and newer; the number is the same on all of these. glibc has no function for it."""

_HAS_CACHESTAT = _syscall is not None and HAS_USUAL_FLAGS and sys.maxsize > 2**32
if _syscall is not None:
    _syscall.restype = ctypes.c_long
    _syscall.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]


def _is_filtered() -> bool:
    """Return whether a filter looks at the system calls of this thread. True where the system does not say.

    A filter may end the process for a call that is newer than itself, and ``cachestat`` is newer than many.
    """
    try:
        with open("/proc/thread-self/status") as file:
            return "\nSeccomp:\t0\n" not in file.read()
    except OSError:
        return True


def counts_cached_pages() -> bool:
    """Return whether :func:`is_cached` may ask the kernel for the number of pages, in this thread. Blocks.

    Ask before each look at a file, because a program may filter its calls from some moment on. Not before each of its
    parts: to ask takes 20 microseconds, which is more than to count the pages of most parts.
    """
    return _HAS_CACHESTAT and not _is_filtered()


def _cached_pages(descriptor: int, offset: int, nbytes: int) -> int | None:
    """Return how many pages of a range of a file the page cache has; None if the kernel does not say."""
    if _syscall is None:
        return None
    # Cached, dirty, being written, evicted, recently evicted.
    wanted, counts = (ctypes.c_uint64 * 2)(offset, nbytes), (ctypes.c_uint64 * 5)()
    # An older kernel does not have it, and it refuses a file that the caller may not write to.
    return None if _syscall(_CACHESTAT, descriptor, wanted, counts, 0) else int(counts[0])


def is_cached(descriptor: int, offset: int, nbytes: int, *, count: bool) -> bool:
    """Return whether the page cache has half of a range of a file or more. Blocks, without the GIL.

    True also where the system does not say, as Linux does not of a file that the caller may not write to.

    Args:
        descriptor: Of the file.
        offset: Where the range begins; a multiple of :data:`PAGE_BYTES`.
        nbytes: Its length, more than 0.
        count: What :func:`counts_cached_pages` has returned in this thread.
    """
    pages = -(-nbytes // _MINCORE_BYTES)
    cached = _cached_pages(descriptor, offset, nbytes) if count else None
    if cached is not None:
        return 2 * cached >= pages
    if _mmap is None or _munmap is None or _mincore is None:
        return True
    # Mapped for this question alone: nothing is read through it.
    address = _mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, offset)
    if address in (None, _FAILED):
        return True
    try:
        answer = ctypes.create_string_buffer(pages)
        if _mincore(address, nbytes, answer):
            return True
        # The lowest bit of each byte counts; the others are 0 today.
        return 2 * answer.raw.translate(_LOWEST_BIT).count(1) >= pages
    finally:
        _munmap(address, nbytes)


_LOWEST_BIT = bytes(number & 1 for number in range(256))
