"""Pages of memory: mappings, advice to the kernel, and files in memory that other processes can open."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Callable
from contextlib import suppress

from aiostage._platform.system import BUILT_FOR_LINUX, HAS_PROC, HAS_USUAL_FLAGS, c_library, find

__all__ = [
    "HAS_HUGE_PAGES",
    "HUGE_PAGE_BYTES",
    "PAGE_BYTES",
    "advise_pages",
    "advise_range",
    "discard",
    "leave_out_of_children",
    "map_addresses",
    "map_private",
    "memory_file",
    "populate",
    "reserve_memory",
    "shared_memory_reason",
]

PAGE_BYTES = mmap.PAGESIZE
"""4 KiB on x86_64, 16 KiB on Apple's processors, up to 64 KiB on other aarch64 machines."""

_LARGEST_HUGE_PAGE_BYTES = 32 << 20
"""Huge pages are as large as a page of page tables maps: 2 MiB for pages of 4 KiB, 32 MiB for 16 KiB, 512 MiB for
64 KiB. Filling one of the largest with zeros is a single step of the kernel that takes a tenth of a second."""

HUGE_PAGE_BYTES = PAGE_BYTES * (PAGE_BYTES // 8)

_NO_RESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000 if HAS_USUAL_FLAGS else 0)
"""Python has a name for it from 3.13 on."""

_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def map_private(nbytes: int) -> mmap.mmap:
    """Map memory of this process alone. Python's own default is MAP_SHARED, which gets no huge pages."""
    return mmap.mmap(-1, nbytes, flags=_ANONYMOUS)


def map_addresses(nbytes: int) -> mmap.mmap:
    """Map addresses that take no memory, and count for none, until they are written to."""
    return mmap.mmap(-1, nbytes, flags=_ANONYMOUS | _NO_RESERVE)


HAS_HUGE_PAGES = hasattr(mmap, "MADV_HUGEPAGE") and HUGE_PAGE_BYTES <= _LARGEST_HUGE_PAGE_BYTES
"""Whether there is anything to ask for."""


def advise_pages(memory: mmap.mmap, *, huge: bool) -> None:
    """Ask for huge pages, or for ordinary ones, for a new mapping."""
    if HAS_HUGE_PAGES:
        _advise(memory, mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE, 0, len(memory))


def leave_out_of_children(memory: mmap.mmap) -> None:
    """Leave memory out of forked children, whose accesses to it then end them. For private memory only."""
    if BUILT_FOR_LINUX:
        _advise(memory, mmap.MADV_DONTFORK, 0, len(memory))


def _advise(memory: mmap.mmap, advice: int, start: int, nbytes: int) -> None:
    # Advice only: a kernel built without huge pages refuses it, and ordinary ones do.
    with suppress(OSError):
        memory.madvise(advice, start, nbytes)


# Python's own madvise() keeps the GIL, which for this advice on this much memory is tens of milliseconds. Other systems
# than Linux take it for a hint that frees nothing.
_madvise = find("madvise", c_library) if BUILT_FOR_LINUX else None
if _madvise is not None:
    _madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def advise_range(address: int, nbytes: int, *, huge: bool) -> None:
    """Ask for huge pages, or for ordinary ones, where a range of a mapping has none yet. Blocks, without the GIL.

    Args:
        address: Where it begins; a multiple of :data:`PAGE_BYTES`.
        nbytes: Its length.
        huge: Which.
    """
    if HAS_HUGE_PAGES and _madvise is not None:
        # Advice only, as above.
        _madvise(address, nbytes, mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)


_MADV_POPULATE_WRITE = 23
"""Linux 5.14 and newer; the number is the same on all of these. Python has no name for it."""


def populate(address: int, nbytes: int) -> None:
    """Fault in pages as writing to them would, and change nothing in them; an older kernel leaves it to the writing.

    Blocks, without the GIL, but with the lock of the address space, which the next ``mmap`` of any thread waits for.

    Args:
        address: Where they begin; a multiple of :data:`PAGE_BYTES`.
        nbytes: How much.
    """
    if HAS_USUAL_FLAGS and _madvise is not None:
        _madvise(address, nbytes, _MADV_POPULATE_WRITE)


def discard(address: int, nbytes: int) -> None:
    """Give pages back before they are unmapped, which holds the lock of the address space for as long as it takes."""
    if _madvise is not None:
        _madvise(address, nbytes, mmap.MADV_DONTNEED)


_MEMORY_FILES = "/dev/shm"


def shared_memory_reason() -> str | None:
    """Return why memory cannot be shared between processes here, or None if it can."""
    if not HAS_PROC:
        return f"sharing staged memory needs /proc, which {sys.platform} does not have, or not here"
    if not hasattr(os, "memfd_create") and not hasattr(os, "O_TMPFILE"):
        return "sharing staged memory needs memfd_create or O_TMPFILE, and this Python was built without them"
    return None


def memory_file(name: str) -> int:
    """Return a descriptor of a new file in memory that has no name and goes with the last who has it open.

    Raises:
        OSError: If the system refuses.
    """
    create: Callable[[str, int], int] | None = getattr(os, "memfd_create", None)
    if create is not None:
        try:
            return create(name, os.MFD_CLOEXEC)
        except OSError as error:
            # A seccomp filter may answer for the kernel.
            if error.errno not in (errno.ENOSYS, errno.EPERM):
                raise
    return os.open(_MEMORY_FILES, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)


def reserve_memory(descriptor: int, offset: int, nbytes: int) -> None:
    """Have the kernel find the pages of a range of a file in memory, keeping what is in it. Blocks.

    Raises:
        OSError: If there are not enough.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, offset, nbytes)
        return
    for page in range(offset, offset + nbytes, PAGE_BYTES):
        os.pwrite(descriptor, os.pread(descriptor, 1, page) or b"\0", page)
