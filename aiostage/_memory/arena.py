"""One host mapping that holds many staged storages, its pages, and addresses without memory behind them."""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import inf
from time import monotonic, thread_time
from typing import Literal

import numpy
import numpy.typing

from aiostage._loop.coroutines import Finalizer
from aiostage._loop.forks import register_after_fork
from aiostage._memory.sending import offer
from aiostage._memory.shared import SentMemory, SharedFile, SharedHandle
from aiostage._platform.memory import (
    HAS_HUGE_PAGES,
    HUGE_PAGE_BYTES,
    PAGE_BYTES,
    advise_pages,
    advise_range,
    discard,
    leave_out_of_children,
    map_addresses,
    map_private,
    populate,
)
from aiostage.errors import HostMemoryError

__all__ = ["Arena", "ColdPages", "Exporter", "PageChoice", "pieces", "reserve_addresses", "whole_pages"]

Exporter = numpy.typing.NDArray[numpy.uint8]

PIECE_BYTES = 8 << 20
"""How much one uninterruptible step faults in: 1 to 4 ms as a rule, and 40 ms where a virtual machine has to ask its
host for each page. Smaller pieces would go back for the GIL more often, which costs 5 ms each beside a busy thread."""

_BLOCK_BYTES = 2 << 20
"""The grain in which an arena remembers what was faulted in: a huge page."""

_DISCARD_BYTES = 64 << 20

_SAMPLE_BYTES = HUGE_PAGE_BYTES
"""How much is written for one measurement."""

_FIRST_BYTES = {True: 8 << 20, False: 64 << 20}
"""After how much huge pages, and ordinary ones, are tried again for the first time. It doubles from trial to trial."""

_MOST_BYTES = {True: 256 << 20, False: 1 << 30}
"""After how much huge pages, and ordinary ones, are tried again at most. Only the speed of huge ones changes much."""

_STALE_SECONDS = 1.0
"""How long a measurement is believed. A hypervisor takes freed memory away within seconds of that."""

_POPULATED_BYTES = 256 << 10
"""How much is faulted in by one call, in ordinary pages: a tenth of a millisecond, during which the address space is
locked. Larger pieces are faster by a twentieth."""

_CLEAR = 0.5
"""Huge pages that take less of the time than this are not compared with ordinary ones again, once these were measured
three times: each look takes as long as three huge pages."""

_LOOKS = 3

_WEIGHT = 0.1
"""Of the newest measurement, in the mean: one huge page that comes slowly decides nothing, a second does."""


class PageChoice:
    """Which pages are faster, measured while they are written to for the first time.

    Memory that the kernel has ready comes six times faster in huge pages: one fault and one run of zeros instead of
    512. Memory that a hypervisor has taken away, or that the kernel has to move pieces of first, comes up to four
    times slower in them. Neither can be asked for, and it changes while a program runs. So both kinds are measured,
    the faster is used, and the other is tried again now and then, more rarely each time.

    Several threads may use it without a lock. A measurement that is lost to a race is made again by a later trial.

    Args:
        clock: Returns the time, in seconds.

    Attributes:
        huge: Whether huge pages are the faster kind, by what is known.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self.huge = True
        self._clock = clock
        self._costs: dict[bool, float] = {}
        self._since_trial = 0
        self._interval = 0
        self._last_trial = -inf
        self._looks = 0

    @property
    def tries(self) -> bool:
        """Whether the next sample is a trial of the kind that was slower."""
        if self.huge not in self._costs:
            return False
        due = self._since_trial >= self._interval
        # Ordinary pages always come at about one speed, so only huge ones are worth another look after a while.
        if self.huge:
            clear = self._looks >= _LOOKS and self._costs[True] < _CLEAR * self._costs[False]
            return due and not clear
        return due or self._clock() - self._last_trial > _STALE_SECONDS

    def next(self) -> bool:
        """Return whether the next sample is to have huge pages. A trial is then the caller's, and no other thread's."""
        if not self.tries:
            return self.huge
        other, now = not self.huge, self._clock()
        first = now - self._last_trial > _STALE_SECONDS or not self._interval
        self._interval = _FIRST_BYTES[other] if first else min(2 * self._interval, _MOST_BYTES[other])
        # Here and not once it is measured: two threads would make each trial at the same time.
        self._since_trial, self._last_trial = 0, now
        return other

    def record(self, huge: bool, nbytes: int, seconds: float) -> None:
        """Take note of a measurement.

        Args:
            huge: Whether the pages were asked to be huge.
            nbytes: How much was written.
            seconds: CPU time of the thread that wrote it.
        """
        cost = seconds / nbytes
        if huge is self.huge:
            self._since_trial += nbytes
            self._costs[huge] = cost + (1 - _WEIGHT) * (self._costs.get(huge, cost) - cost)
        else:
            self._looks += not huge
            # Ordinary pages may seem slow where something else has the core, and never seem fast.
            self._costs[huge] = cost if huge else min(cost, self._costs.get(huge, cost))
        if self._costs.get(not self.huge, inf) < self._costs.get(self.huge, inf):
            self.huge = not self.huge
            self._interval = _FIRST_BYTES[not self.huge]
            self._since_trial = 0


page_choice = PageChoice()
"""The process's own. The machine is the same for all of its arenas."""


class ColdPages:
    """The pages of a range that one thread is about to write to for the first time.

    Args:
        start: The address where the range begins.
        stop: Where it ends.
        within: The addresses of the private mapping that it is in.
        huge: Whether the mapping was asked to have huge pages.
        choice: Where measurements are kept.
    """

    __slots__ = ("_asked", "_begun", "_choice", "_huge", "_nbytes", "_range", "_within")

    def __init__(self, start: int, stop: int, within: range, huge: bool, choice: PageChoice) -> None:
        self._range = start, stop
        self._within = within
        self._asked = huge
        self._choice = choice
        self._huge = huge
        self._nbytes = 0
        self._begun = 0.0

    def before(self, address: int = 0, nbytes: int = 0) -> None:
        """Say what this thread writes next, and at the end that there is no more.

        Args:
            address: Where it begins, in the range.
            nbytes: How much; 0 after the last.
        """
        if self._nbytes >= _SAMPLE_BYTES:
            self._choice.record(self._huge, self._nbytes, thread_time() - self._begun)
            self._nbytes = 0
        if nbytes and not self._nbytes:
            self._huge = self._choice.next()
            if self._huge is not self._choice.huge:
                # A trial.
                if self._huge is not self._asked:
                    self._ask(address, address + max(nbytes, _SAMPLE_BYTES))
            elif self._huge is not self._asked:
                # All of the range at once: each question waits until no other thread faults in pages of the mapping,
                # 5 to 16 ms where these are slow, and whoever needs the lock of the address space waits with it.
                self._ask(*self._range)
                self._asked = self._huge
            self._begun = thread_time()
        if nbytes and not self._huge:
            # A fault for each page takes a quarter longer, with the copy: 1.16 ms for 2 MiB, and 0.92 so.
            first, last = address // PAGE_BYTES * PAGE_BYTES, whole_pages(address + nbytes)
            for start, stop in pieces(first, last, _POPULATED_BYTES):
                populate(start, stop - start)
        self._nbytes += nbytes

    def _ask(self, start: int, stop: int) -> None:
        """Ask for pages of the present kind. What has pages already keeps them."""
        # Whole huge pages.
        first = max(start // _SAMPLE_BYTES * _SAMPLE_BYTES, self._within.start)
        last = min(-(-stop // _SAMPLE_BYTES) * _SAMPLE_BYTES, self._within.stop)
        advise_range(first, last - first, huge=self._huge)


class Arena:
    """One private or shared mapping of host memory, page aligned, cold until it is written or populated.

    Memory is unmapped when nothing refers to it any more: the arena itself, or an exporter or anything over one.

    Attributes:
        nbytes: Its size, whole pages.
        address: Where it begins.
        reserved: Whether all its pages are certain to be had; not so for a new shared arena.
        pinning: Undoes the registration with an accelerator when called; None while it is not registered.
        registering: Held while it is being registered or closed. A registration cannot be broken off, so it may still
            run when the arena has been taken back, granted again, or is no longer wanted.
        closed: Whether it has been closed.
    """

    __slots__ = (
        "__weakref__",
        "_chooses_pages",
        "_exporter",
        "_file",
        "_huge",
        "_memory",
        "_warm",
        "address",
        "closed",
        "nbytes",
        "pinning",
        "registering",
        "reserved",
    )

    def __init__(self, memory: mmap.mmap, file: SharedFile | None = None) -> None:
        self._memory = memory
        self._file = file
        self._warm = bytearray(-(-len(memory) // _BLOCK_BYTES))
        self._exporter: weakref.ref[Exporter] | None = None
        self.nbytes = len(memory)
        self.address: int = _over(memory).ctypes.data
        self.reserved = file is None
        self.pinning: Finalizer | None = None
        self.registering = threading.Lock()
        self.closed = False
        # Shared memory has ordinary pages unless the administrator says otherwise.
        self._chooses_pages = file is None and HAS_HUGE_PAGES
        self._huge = self._chooses_pages and page_choice.huge
        if self._chooses_pages:
            advise_pages(memory, huge=self._huge)

    @classmethod
    def pageable(cls, nbytes: int) -> Arena:
        """Map ordinary private memory.

        Args:
            nbytes: How much, in bytes; rounded up to whole pages.

        Raises:
            HostMemoryError: If the kernel refuses.
        """
        size = whole_pages(nbytes)
        with _refusals(size):
            return cls(map_private(size))

    @classmethod
    def shared(cls, nbytes: int) -> Arena:
        """Map memory that another process can open, with one file behind it however many tensors it will hold.

        Args:
            nbytes: How much, in bytes; rounded up to whole pages.

        Raises:
            HostMemoryError: If the kernel refuses.
        """
        size = whole_pages(nbytes)
        with _refusals(size):
            file = SharedFile(size)
            arena = cls(file.map(), file)
        offer(arena)
        return arena

    @property
    def kind(self) -> Literal["pageable", "shared"]:
        """Whether another process can open it."""
        return "pageable" if self._file is None else "shared"

    @property
    def pinned(self) -> bool:
        """Whether it is registered with an accelerator."""
        return self.pinning is not None and self.pinning.alive

    def claim(self) -> bool:
        """Return whether no other process has it mapped; if so, handles on what it held are void from now on."""
        return self._file is None or self._file.claim()

    def share(self, nbytes: int) -> SharedHandle:
        """Return a handle by which another process can map the first ``nbytes`` bytes until the lease ends."""
        if self._file is None:
            raise HostMemoryError(
                "this memory is private to its process and cannot be opened by another.",
                remedy="Stage with StagingOptions(use_shared_memory=True).",
            )
        return self._file.handle(nbytes)

    def send(self) -> SentMemory | None:
        """Return what a message to another process carries of the present contents; None if that cannot be."""
        return self._file.send() if self._file is not None else None

    def reserve(self, start: int, stop: int) -> None:
        """Have the kernel find pages for a range of a shared arena, so that writing to it cannot end in SIGBUS. Blocks.

        Raises:
            HostMemoryError: If there is not enough memory for it.
        """
        if self._file is not None:
            try:
                self._file.reserve(start, stop - start)
            except OSError as error:
                raise refused(self.nbytes, error) from error

    def is_warm(self, start: int, stop: int) -> bool:
        """Return whether a range is known to have been faulted in."""
        return self._warm.find(0, start // _BLOCK_BYTES, -(-stop // _BLOCK_BYTES)) < 0

    def populate(self, start: int, stop: int) -> None:
        """Fault in the pages that lie wholly inside a range, leaving zeros where it was cold. Blocks, without the GIL.

        It writes to each page; ordinary ones are populated before, a little at a time. MADV_POPULATE_WRITE for all at
        once holds the lock of the address space all the while, so that the next ``mmap`` or ``munmap`` of any other
        thread waits: measured on Linux 6.18 beside it, 0.4 to 10 ms in the median where writing leaves it at 0.02 ms
        (docs/memory.md).

        Args:
            start: Where the range begins, in bytes from the beginning of the arena.
            stop: Where it ends. No other code may use the range meanwhile.
        """
        if self.is_warm(start, stop):
            return
        start, stop = whole_pages(start), stop // PAGE_BYTES * PAGE_BYTES
        if stop <= start:
            return
        cold = self.cold(start, stop)
        if cold is None:
            _over(self._memory)[start:stop:PAGE_BYTES] = 0
        else:
            for first, last in self._pieces_to_populate(start, stop):
                cold.before(self.address + first, last - first)
                _over(self._memory)[first:last:PAGE_BYTES] = 0
            cold.before()
        # Only blocks that lie wholly inside: for one that is half cold, faulting in is still worth a call.
        last = len(self._warm) if stop == self.nbytes else stop // _BLOCK_BYTES
        first = min(-(-start // _BLOCK_BYTES), last)
        self._warm[first:last] = b"\1" * (last - first)

    def _pieces_to_populate(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Cut a range in two where its first part is a trial of other pages, which may be slow."""
        first = min(start + HUGE_PAGE_BYTES, stop) if page_choice.tries else stop
        yield start, first
        if first < stop:
            yield first, stop

    def cold(self, start: int, stop: int) -> ColdPages | None:
        """Return what chooses the pages of a range as it is written to; None if it has pages, or has no choice."""
        if not self._chooses_pages or self._warm.find(0, start // _BLOCK_BYTES, -(-stop // _BLOCK_BYTES)) < 0:
            return None
        within = range(self.address, self.address + self.nbytes)
        return ColdPages(self.address + start, self.address + stop, within, self._huge, page_choice)

    def written(self, start: int, stop: int) -> None:
        """Take note that all of a range has been written to. The blocks that it shares with others count as well."""
        # One assignment of equal length to a bytearray, so threads that write to neighbouring ranges need no lock.
        first, last = start // _BLOCK_BYTES, -(-stop // _BLOCK_BYTES)
        self._warm[first:last] = b"\1" * (last - first)

    def exporter(self, nbytes: int) -> Exporter:
        """Return a new uint8 array over the first ``nbytes`` bytes.

        Everything that is made from it, tensors over it and NumPy's views of it included, keeps this very array
        alive: its base is a memoryview of its own, and NumPy stops looking for an older owner where types change. Its
        death therefore is the death of all that was made from it.
        """
        exporter: Exporter = numpy.frombuffer(self._memory, numpy.uint8, count=nbytes)
        # Weakly, for close() to ask whether anything of it lives. An arena is leased once at a time, so there is one.
        self._exporter = weakref.ref(exporter)
        return exporter

    def leave_out_of_children(self) -> None:
        """Leave private memory that is page-locked out of forked children.

        Linux copies such pages when a process forks, so that the driver's pages stay the parent's: 1.1 s for 512 MiB
        where pages that are not page-locked take 0.03 s (Linux 6.18), for every worker of a ``DataLoader``, which then
        has that much memory of its own. What the parent staged there cannot be read in a child: it ends with SIGSEGV.
        """
        if self._file is None:
            leave_out_of_children(self._memory)
            _left_out.mappings.add(self._memory)

    def close(self) -> None:
        """Undo the registration and give the memory back; while an exporter lives, leave the latter to its death.

        Blocks. Call it from a worker thread, or not at all: dropping the arena has the same effect.
        """
        with self.registering:
            # With the lock: a registration that has not begun looks at it there, and does not register memory that is
            # about to be unmapped.
            self.closed = True
            try:
                if self.pinning is not None:
                    self.pinning()
            finally:
                self._unmap()

    def _unmap(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._exporter is not None and self._exporter() is not None:
            return
        # Unmapping holds the lock of the address space until the last page is freed, 100 ms for 2 GiB of ordinary
        # pages, and the event loop's next malloc may need that lock. Discarding does not hold it.
        for start, stop in pieces(0, self.nbytes, _DISCARD_BYTES):
            discard(self.address + start, stop - start)
        # Another thread may be about to drop the last view of it, which then unmaps.
        with suppress(BufferError):
            self._memory.close()

    def __repr__(self) -> str:
        pinned = ", pinned" if self.pinned else ""
        return f"<Arena {self.kind}{pinned}, {self.nbytes} bytes at {self.address:#x}>"


class _ForkExclusions:
    """The mappings that a child does not have. It never unmaps them: something else may lie there by then."""

    def __init__(self) -> None:
        self.mappings: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
        self._never_unmapped: list[mmap.mmap] = []
        register_after_fork(self)

    def after_fork_in_child(self) -> None:
        """Keep the objects of the parent's mappings for as long as the child lives."""
        self._never_unmapped += self.mappings


_left_out = _ForkExclusions()


def pieces(start: int, stop: int, nbytes: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
    """Cut a range at the multiples of ``nbytes``, yielding where each piece starts and stops."""
    while start < stop:
        end = min(start - start % nbytes + nbytes, stop)
        yield start, end
        start = end


def whole_pages(nbytes: int) -> int:
    """Round a number of bytes up to whole pages."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


def refused(nbytes: int, error: BaseException) -> HostMemoryError:
    """Return the error for memory that the kernel will not give."""
    return HostMemoryError(
        f"the kernel refuses {nbytes} bytes of host memory: {error}.",
        remedy="Free memory, lower what is staged at once (max_host_bytes), or raise this process's memory limits.",
    )


@contextmanager
def _refusals(nbytes: int) -> Iterator[None]:
    """Raise what the system says of a mapping as a HostMemoryError."""
    try:
        yield
    except (OSError, MemoryError, OverflowError) as error:
        raise refused(nbytes, error) from error


def _over(memory: mmap.mmap) -> Exporter:
    view: Exporter = numpy.frombuffer(memory, numpy.uint8)
    return view


def reserve_addresses(nbytes: int) -> Exporter:
    """Return an array that takes addresses and no memory, for as long as nothing writes to it. It reads as zeros.

    Args:
        nbytes: How many bytes; may be more than the machine has.

    Raises:
        HostMemoryError: If the kernel has no such range of addresses.
    """
    size = whole_pages(max(nbytes, 1))
    with _refusals(size):
        memory = map_addresses(size)
    return numpy.frombuffer(memory, numpy.uint8, count=nbytes)
