"""Everything that an operating system may lack, each call with the portable second that stands in for it.

Linux is what aiostage is measured on. No other module asks which system it runs on, or calls what only some systems
have. Calls are looked up once, when this is imported; what is missing then is done without.

=====================  ==================================================================================
``memfd_create``       a nameless file in /dev/shm; without /proc memory cannot be shared between processes
``posix_fallocate``    each page of shared memory is written to; files grow as they are written
``madvise``            memory goes back when it is unmapped, and has ordinary pages
``O_DIRECT``           reads and writes pass through the page cache
``cachestat``          ``mincore``, which takes five times as long; so too where a filter looks at system calls
``mincore``            every file counts as cached
``preadv``             ``pread``, and a copy
``renameat2``          ``renamex_np`` of macOS, else two renames that readers and later savers can tell from one
``timerfd``            the event loop's own clock, in whole milliseconds
``sched_yield``        a sleep of no length, likewise without the GIL
``F_FULLFSYNC``        macOS only, where ``fsync`` leaves the disk's own cache alone; ``fsync`` elsewhere
=====================  ==================================================================================
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import sleep
from typing import Any, Protocol
from weakref import WeakSet

if sys.platform == "win32":
    raise ImportError(
        "aiostage does not support Windows, whose files and locks are not those of POSIX; use it in WSL 2 instead."
    )

import fcntl
import resource

__all__ = [
    "DESCRIPTORS",
    "HAS_HUGE_PAGES",
    "HAS_TIMERS",
    "HUGE_PAGE_BYTES",
    "MEMORY_LIMIT",
    "NOT_SUPPORTED",
    "PAGE_BYTES",
    "advise_pages",
    "advise_range",
    "counts_cached_pages",
    "discard",
    "is_cached",
    "let_threads_run",
    "lock",
    "locked_memory_limit",
    "map_addresses",
    "map_private",
    "memory_file",
    "memory_limit",
    "open_direct",
    "open_timer",
    "populate",
    "read_into",
    "rename",
    "reserve_file",
    "reserve_memory",
    "set_direct",
    "set_timer",
    "shared_memory_reason",
    "sync",
    "try_lock",
    "unlock",
    "yield_core",
]

NOT_SUPPORTED = frozenset((errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY))
"""What a kernel or a file system says that does not have what it was asked for."""

PAGE_BYTES = mmap.PAGESIZE
"""4 KiB on x86_64, 16 KiB on Apple's processors, up to 64 KiB on other aarch64 machines."""

_BUILT_FOR_LINUX = sys.platform == "linux"
_HAS_PROC = os.path.isdir("/proc/self/fd")


def _find(name: str, library: Any) -> Any:
    """Return a function of the C library, or None where there is no such function."""
    try:
        return getattr(library, name)
    except AttributeError:
        return None


_c_library = ctypes.CDLL(None, use_errno=True)
# Not CDLL for what is over at once: that gives up the GIL around each call, and a busy worker thread may not hand it
# back for 5 ms.
_c_library_with_gil = ctypes.PyDLL(None, use_errno=True)


# Memory

_LARGEST_HUGE_PAGE_BYTES = 32 << 20
"""Huge pages are as large as a page of page tables maps: 2 MiB for pages of 4 KiB, 32 MiB for 16 KiB, 512 MiB for
64 KiB. Filling one of the largest with zeros is a single step of the kernel that takes a tenth of a second."""

HUGE_PAGE_BYTES = PAGE_BYTES * (PAGE_BYTES // 8)

_HAS_USUAL_FLAGS = _BUILT_FOR_LINUX and platform.machine() in ("x86_64", "aarch64", "riscv64", "s390x", "loongarch64")
_NO_RESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000 if _HAS_USUAL_FLAGS else 0)
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
    if _BUILT_FOR_LINUX:
        _advise(memory, mmap.MADV_DONTFORK, 0, len(memory))


def _advise(memory: mmap.mmap, advice: int, start: int, nbytes: int) -> None:
    # Advice only: a kernel built without huge pages refuses it, and ordinary ones do.
    with suppress(OSError):
        memory.madvise(advice, start, nbytes)


# Python's own madvise() keeps the GIL, which for this advice on this much memory is tens of milliseconds. Other systems
# than Linux take it for a hint that frees nothing.
_madvise = _find("madvise", _c_library) if _BUILT_FOR_LINUX else None
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
    if _HAS_USUAL_FLAGS and _madvise is not None:
        _madvise(address, nbytes, _MADV_POPULATE_WRITE)


def discard(address: int, nbytes: int) -> None:
    """Give pages back before they are unmapped, which holds the lock of the address space for as long as it takes."""
    if _madvise is not None:
        _madvise(address, nbytes, mmap.MADV_DONTNEED)


_MEMORY_FILES = "/dev/shm"


def shared_memory_reason() -> str | None:
    """Return why memory cannot be shared between processes here, or None if it can."""
    if not _HAS_PROC:
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


# Files

_O_DIRECT: int = getattr(os, "O_DIRECT", 0)


def set_direct(descriptor: int, on: bool) -> bool:
    """Switch direct I/O; return whether it is on now.

    Raises:
        OSError: If it cannot be switched for another reason than that there is none.
    """
    if not _O_DIRECT:
        return False
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _O_DIRECT if on else flags & ~_O_DIRECT)
    except OSError as error:
        if not on or error.errno not in NOT_SUPPORTED:
            raise
        return False
    return on


def open_direct(name: str, directory: int) -> int | None:
    """Open a file to read it past the page cache, and return its descriptor; None where that is not possible.

    That is so as well where no more files can be open: it is open already, and can be read without this.

    Args:
        name: The name of the file. A link is not followed, and a FIFO not waited for.
        directory: The descriptor of the directory that it is in.

    Raises:
        OSError: If the file cannot be opened for another reason.
    """
    if not _O_DIRECT:
        return None
    try:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW | _O_DIRECT
        return os.open(name, flags, dir_fd=directory)
    except OSError as error:
        if error.errno not in (*NOT_SUPPORTED, errno.EMFILE, errno.ENFILE):
            raise
        return None


_mmap, _munmap, _mincore = (
    (_find(name, _c_library) for name in ("mmap", "munmap", "mincore")) if _BUILT_FOR_LINUX else (None, None, None)
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


_syscall = _find("syscall", _c_library) if _BUILT_FOR_LINUX else None
_CACHESTAT = 451
"""Linux 6.5 and newer; the number is the same on all of these. glibc has no function for it."""

_HAS_CACHESTAT = _syscall is not None and _HAS_USUAL_FLAGS and sys.maxsize > 2**32
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


def reserve_file(descriptor: int, nbytes: int) -> None:
    """Reserve the space of a new file, where the file system can.

    Raises:
        OSError: If the disk is full.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise


_HAS_PREADV = hasattr(os, "preadv")


def read_into(descriptor: int, into: Any, offset: int) -> int:
    """Read as much as one call gives into a writable buffer of bytes; return how much that was, 0 at the end."""
    if _HAS_PREADV:
        return os.preadv(descriptor, [into], offset)
    data = os.pread(descriptor, len(into), offset)
    into[: len(data)] = data
    return len(data)


def sync(descriptor: int) -> None:
    """Wait until a file or a directory is on the disk, and not only in the disk's cache. Blocks."""
    full: int | None = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        try:
            fcntl.fcntl(descriptor, full)
        except OSError as error:
            # Not every file system of macOS has it.
            if error.errno not in NOT_SUPPORTED:
                raise
        else:
            return
    os.fsync(descriptor)


def lock(descriptor: int) -> None:
    """Take a shared lock on an open file, which the kernel drops with the last descriptor of its opening. Blocks."""
    fcntl.flock(descriptor, fcntl.LOCK_SH)


def try_lock(descriptor: int) -> bool:
    """Take an exclusive lock on an open file; return whether it was free.

    Raises:
        OSError: If the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(descriptor: int) -> None:
    """Give a lock back."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)


_AT_FDCWD = -100
_renameat2 = _find("renameat2", _c_library)
_RENAMEAT2_NOREPLACE, _RENAMEAT2_EXCHANGE = 1, 2
_renamex_np = _find("renamex_np", _c_library)
_RENAMEX_SWAP, _RENAMEX_EXCL = 2, 4


def rename(source: str, target: str, *, exchange: bool) -> bool:
    """Rename in one step with a condition; return False where the system or the file system cannot.

    Args:
        source: What is renamed.
        target: To what.
        exchange: Give what is at the target the name of the source. Otherwise there must be nothing.

    Raises:
        OSError: If it cannot be done.
    """
    old, new = os.fsencode(source), os.fsencode(target)
    if _renameat2 is not None:
        flag = _RENAMEAT2_EXCHANGE if exchange else _RENAMEAT2_NOREPLACE
        failed = _renameat2(_AT_FDCWD, old, _AT_FDCWD, new, flag)
    elif _renamex_np is not None:
        failed = _renamex_np(old, new, _RENAMEX_SWAP if exchange else _RENAMEX_EXCL)
    else:
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in NOT_SUPPORTED:
        return False
    raise OSError(number, os.strerror(number), source, None, target)


DESCRIPTORS = "/proc/self/fd" if _HAS_PROC else "/dev/fd"
"""The directory of this process's open descriptors; where there is no /proc, it does not tell what they refer to."""


# Time and threads

_CLOCK_MONOTONIC = 1
_TIMER_ABSOLUTE = 1
_NANOSECONDS = 1_000_000_000

_timerfd_create = _find("timerfd_create", _c_library_with_gil)
_timerfd_settime = _find("timerfd_settime", _c_library_with_gil)

HAS_TIMERS = _timerfd_create is not None and _timerfd_settime is not None
"""Whether :func:`open_timer` may have one to give."""


class _TimerSpecification(ctypes.Structure):
    """What C calls ``struct itimerspec``."""

    _fields_ = (
        ("interval_seconds", ctypes.c_long),
        ("interval_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    )


def open_timer() -> int:
    """Return a descriptor that can be read once its time has come, or -1 if there is none to be had."""
    if not HAS_TIMERS:
        return -1
    descriptor: int = _timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
    return descriptor


def set_timer(descriptor: int, when: float) -> None:
    """Set a timer to a time of :func:`time.monotonic`; what it was set to before is forgotten, and it is unread."""
    # Zero would mean never.
    nanoseconds = max(int(when * _NANOSECONDS), 1)
    value = _TimerSpecification(0, 0, *divmod(nanoseconds, _NANOSECONDS))
    _timerfd_settime(descriptor, _TIMER_ABSOLUTE, ctypes.byref(value), None)


# os.sched_yield() keeps the GIL, and with it from running whom the core is for.
_sched_yield = _find("sched_yield", _c_library)


def _sleep_briefly() -> None:
    sleep(0)


yield_core: Callable[[], object] = _sched_yield or _sleep_briefly
"""Offer the core to threads that wait for one, without the GIL meanwhile."""

_usleep = _find("usleep", _c_library)


def let_threads_run() -> None:
    """Give the GIL to threads that wait for it; takes about 60 microseconds.

    A thread that works in short steps and releases the GIL for a moment between them has it back before those that
    wait have woken up, and they ask for it in earnest after 5 ms only. So it has to be away for longer.
    """
    if _usleep is not None:
        _usleep(1)
    else:
        sleep(1e-6)


# Forks
#
# A child has its parent's objects, but none of its parent's threads: a lock that one of those held stays locked, and a
# wait for such a thread never ends. PyTorch's DataLoader and multiprocessing fork at any time, so the parent cannot
# prepare for it.


class ForkHandler(Protocol):
    """Something with threads, locks or memory that a child must not take over."""

    def after_fork_in_child(self) -> object:
        """Reset the object. Called in the child, in its only thread.

        Returns:
            Objects that the child must drop. They are dropped after all handlers have run, because a finalizer may need
            a lock that a later handler makes again.
        """


_handlers: WeakSet[ForkHandler] = WeakSet()


def register_after_fork(owner: ForkHandler) -> None:
    """Call :meth:`ForkHandler.after_fork_in_child` in every child that is forked while ``owner`` is alive."""
    _handlers.add(owner)


def _after_fork_in_child() -> None:
    to_drop = [owner.after_fork_in_child() for owner in list(_handlers)]
    del to_drop


os.register_at_fork(after_in_child=_after_fork_in_child)


# Limits


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
