"""Which arenas are free, leased and wanted, as plain data that one function moves forward.

Nothing here waits, locks or knows of threads; :mod:`aiostage._memory.pool` does that around it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from aiostage._loop.coroutines import ThreadsafeEvent
from aiostage._memory.arena import Arena, whole_pages
from aiostage.errors import HostMemoryError, StagerClosedError, StagingError

__all__ = ["Ledger", "LedgerActions", "Request"]

_RECENT_LEASES = 8
"""How many of the last leases decide how much idle memory is kept: enough for a burst of stagings or for the
alternation of a few kinds of them, few enough that the memory for one that never comes back goes soon. A guess."""

_WASTE = 2
"""An idle arena up to this many times larger than what is asked for is a fit."""


class Request:
    """A request for memory, until it is granted.

    Attributes:
        nbytes: How much, in bytes.
        size: The same in whole pages, which is what it takes.
        event: Set when there is reason to look again; replaced by the waiter before each look.
        arena: What it was granted.
        error: Why it cannot be granted.
        abandoned: No task waits for the answer any more.
    """

    __slots__ = ("abandoned", "arena", "error", "event", "nbytes", "size")

    def __init__(self, nbytes: int, event: ThreadsafeEvent) -> None:
        self.nbytes = nbytes
        self.size = whole_pages(max(nbytes, 1))
        self.event = event
        self.arena: Arena | None = None
        self.error: StagingError | None = None
        self.abandoned = False

    @property
    def answered(self) -> bool:
        """Whether it was granted or refused."""
        return self.arena is not None or self.error is not None

    def take(self) -> Arena:
        """Return what was granted, or raise why it was not."""
        if self.error is not None:
            try:
                raise self.error
            finally:
                # The error's traceback leads to the waiter, and from there here.
                self.error = None
        assert self.arena is not None  # noqa: S101 - asked only when answered
        return self.arena


@dataclass(slots=True)
class LedgerActions:
    """What the caller has to carry out after the ledger has moved."""

    answered: list[Request] = field(default_factory=list)
    close: list[Arena] = field(default_factory=list)


class Ledger:
    """The state of a pool.

    Args:
        make: Maps a new arena of a number of bytes; raises HostMemoryError.
        max_bytes: How much all arenas together may take; None for no limit.

    Attributes:
        free: Idle arenas, the least recently used first.
        leased: Arenas that were granted and have not come back.
        closing: Arenas that are being closed and still count.
        waiting: Requests not yet answered, the oldest first. A tuple that is replaced at each change, because
            finalizers go through it in any thread and may take no lock.
        closed: Whether the pool is closed: nothing is granted, and what comes back is closed.
        held_elsewhere: Whether, at the last move, an idle arena could not be used because another process maps it.
    """

    def __init__(self, make: Callable[[int], Arena], max_bytes: int | None) -> None:
        self._make = make
        self._max_bytes = max_bytes
        self._needs: deque[int] = deque(maxlen=_RECENT_LEASES)
        self.free: list[Arena] = []
        self.leased: set[Arena] = set()
        self.closing: set[Arena] = set()
        self.waiting: tuple[Request, ...] = ()
        self.closed = False
        self.held_elsewhere = False

    @property
    def arenas(self) -> list[Arena]:
        """Every arena that takes memory."""
        return [*self.free, *self.leased, *self.closing]

    def add(self, request: Request) -> None:
        """Put a request behind all others; the next move looks at it."""
        self.waiting += (request,)

    def advance(self, returned: Iterable[Arena | Request]) -> LedgerActions:
        """Take back arenas, answer the requests that can be answered, and say what is to be closed.

        Args:
            returned: Arenas whose lease has ended, and requests that were withdrawn, granted or not.

        Returns:
            What the caller has to carry out.

        Requests are answered strictly in order: a small one never passes a large one, which would otherwise starve.
        """
        actions = LedgerActions()
        self.held_elsewhere = False
        # First, so that what has come back can be granted in the same move.
        for item in returned:
            self._take_back(item, actions)
        if self.closed:
            self._refuse_all(actions)
            self._evict(self.free, actions)
        # Up to the first that cannot be answered: those behind it wait, however little they need.
        while self.waiting:
            request = self.waiting[0]
            if not request.abandoned:
                self._answer(request, actions)
                if not request.answered:
                    break
                actions.answered.append(request)
            self.waiting = self.waiting[1:]
        self._evict_excess(actions)
        return actions

    def _take_back(self, item: Arena | Request, actions: LedgerActions) -> None:
        arena: Arena | None
        if isinstance(item, Request):
            # Withdrawing twice is harmless: the second time there is nothing left to take.
            item.abandoned = True
            self.waiting = tuple(request for request in self.waiting if request is not item)
            arena, item.arena = item.arena, None
            if arena is None:
                return
        else:
            arena = item
        # Raises if it is not leased: an arena that came back twice would be granted twice.
        self.leased.remove(arena)
        self.free.append(arena)
        if not arena.reserved:
            # Reserving it failed or was broken off; another try had better start afresh.
            self._evict([arena], actions)

    def _answer(self, request: Request, actions: LedgerActions) -> None:
        if self._reuse(request, _WASTE * request.size):
            return
        shortage = self._shortage(request.size)
        if shortage <= 0:
            self._allocate(request, actions)
        # Over the budget an arena that is far too large is better than waiting; only if there is none, idle ones go to
        # make room.
        elif not self._reuse(request, None):
            self._evict_for(shortage, actions)

    def _reuse(self, request: Request, at_most: int | None) -> bool:
        """Grant the smallest idle arena that fits, the last used among equals, since its pages are in the caches."""
        fitting = [
            arena
            for arena in reversed(self.free)
            if arena.nbytes >= request.size and (at_most is None or arena.nbytes <= at_most)
        ]
        for arena in sorted(fitting, key=_nbytes):
            if arena.claim():
                self.free.remove(arena)
                self._grant(request, arena)
                return True
            self.held_elsewhere = True
        return False

    def _allocate(self, request: Request, actions: LedgerActions) -> None:
        try:
            arena = self._make(request.size)
        except HostMemoryError as error:
            # The kernel may have enough once the idle arenas are gone.
            self._evict([arena for arena in self.free if arena.claim()], actions)
            # While some are being closed there is hope: the move after that tries again.
            if not self.closing:
                request.error = error
            return
        self._grant(request, arena)

    def _grant(self, request: Request, arena: Arena) -> None:
        self.leased.add(arena)
        request.arena = arena
        # Idle arenas that another process still maps count as needed, because they cannot be used for anything else.
        self._needs.append(_total(self.leased) + _total(arena for arena in self.free if not arena.claim()))

    def _evict_for(self, shortage: int, actions: LedgerActions) -> None:
        """Evict idle arenas if that, with what is closing already, makes up for a shortage."""
        shortage -= _total(self.closing)
        if shortage <= 0:
            return
        chosen: list[Arena] = []
        for arena in self.free:
            if arena.claim():
                chosen.append(arena)
                shortage -= arena.nbytes
                if shortage <= 0:
                    self._evict(chosen, actions)
                    return
            else:
                self.held_elsewhere = True

    def _evict_excess(self, actions: LedgerActions) -> None:
        """Evict idle arenas beyond what the last few leases together needed at any one time."""
        excess = _total(self.free) + _total(self.leased) - max(self._needs, default=0)
        chosen = []
        for arena in self.free:
            if excess <= 0:
                break
            if arena.claim():
                chosen.append(arena)
                excess -= arena.nbytes
        self._evict(chosen, actions)

    def _evict(self, arenas: Iterable[Arena], actions: LedgerActions) -> None:
        for arena in list(arenas):
            self.free.remove(arena)
            self.closing.add(arena)
            actions.close.append(arena)

    def _refuse_all(self, actions: LedgerActions) -> None:
        refused, self.waiting = self.waiting, ()
        for request in refused:
            request.error = StagerClosedError()
            actions.answered.append(request)

    def _shortage(self, size: int) -> int:
        return 0 if self._max_bytes is None else _total(self.arenas) + size - self._max_bytes


def _nbytes(arena: Arena) -> int:
    return arena.nbytes


def _total(arenas: Iterable[Arena]) -> int:
    return sum(map(_nbytes, arenas))
