from __future__ import annotations

from collections.abc import Callable
from itertools import count
from operator import attrgetter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aiostage._memory.ledger import Ledger, LedgerActions, Request
from aiostage._platform.memory import PAGE_BYTES
from aiostage.errors import HostMemoryError, StagerClosedError


class FakeArena:
    """What a ledger looks at of an arena."""

    numbers = count()

    def __init__(self, nbytes: int) -> None:
        self.number = next(self.numbers)
        self.nbytes = nbytes
        self.reserved = True
        self.held_elsewhere = False

    def claim(self) -> bool:
        return not self.held_elsewhere

    def __repr__(self) -> str:
        return f"<{self.nbytes // PAGE_BYTES} pages>"


class Bell:
    """Where a ledger's caller would wake a waiter."""

    def set(self) -> bool:
        return True


def ledger_of(pages: int | None, make: Callable[[int], object] = FakeArena) -> Ledger:
    return Ledger(make, None if pages is None else pages * PAGE_BYTES)


def ask(ledger: Ledger, pages: int) -> Request:
    request = Request(pages * PAGE_BYTES, Bell())
    ledger.add(request)
    return request


def granted(ledger: Ledger, pages: int) -> FakeArena:
    request = ask(ledger, pages)
    ledger.advance([])
    assert request.arena is not None
    return request.arena


def closed(ledger: Ledger, actions: LedgerActions) -> list[int]:
    """Carry out the closings, and return how many pages each had."""
    for arena in actions.close:
        ledger.closing.remove(arena)
    return [arena.nbytes // PAGE_BYTES for arena in actions.close]


class TestGranting:
    def test_sizes_are_whole_pages_and_never_nothing(self):
        assert Request(0, Bell()).size == PAGE_BYTES
        assert Request(PAGE_BYTES + 1, Bell()).size == 2 * PAGE_BYTES

    def test_a_first_request_gets_a_new_arena_of_its_size(self):
        ledger = ledger_of(None)
        request = ask(ledger, 3)
        actions = ledger.advance([])
        assert actions.answered == [request]
        assert request.arena.nbytes == 3 * PAGE_BYTES
        assert ledger.leased == {request.arena}
        assert not ledger.waiting

    def test_iterating_over_the_waiting_sees_them_as_they_were(self):
        """Finalizers do, in any thread and without a lock."""
        ledger = ledger_of(1)
        granted(ledger, 1)
        first, second = ask(ledger, 1), ask(ledger, 1)
        seen = iter(ledger.waiting)
        assert next(seen) is first
        ledger.advance([first])
        ask(ledger, 1)
        assert list(seen) == [second]

    def test_a_returned_arena_is_reused(self):
        ledger = ledger_of(None)
        arena = granted(ledger, 3)
        ledger.advance([arena])
        assert ledger.free == [arena]
        assert granted(ledger, 2) is arena

    def test_a_leased_arena_is_not(self):
        ledger = ledger_of(None)
        assert granted(ledger, 3) is not granted(ledger, 3)

    def test_the_smallest_that_fits_is_taken(self):
        ledger = ledger_of(None)
        arenas = [granted(ledger, pages) for pages in (8, 5, 6, 3)]
        ledger.advance(arenas)
        assert granted(ledger, 4) is arenas[1]

    def test_the_last_used_of_equals_is_taken(self):
        ledger = ledger_of(None)
        arenas = [granted(ledger, 4) for _ in range(3)]
        ledger.advance([arenas[0], arenas[2], arenas[1]])
        assert granted(ledger, 4) is arenas[1]

    def test_more_than_twice_the_size_is_waste_while_the_budget_allows_a_new_one(self):
        ledger = ledger_of(20)
        large = granted(ledger, 10)
        ledger.advance([large])
        small = granted(ledger, 4)
        assert small is not large
        assert small.nbytes == 4 * PAGE_BYTES

    def test_and_better_than_evicting_when_it_does_not(self):
        ledger = ledger_of(12)
        large = granted(ledger, 10)
        ledger.advance([large])
        assert granted(ledger, 4) is large


class TestBudget:
    def test_a_request_waits_until_enough_has_come_back(self):
        ledger = ledger_of(10)
        first, second = granted(ledger, 6), granted(ledger, 4)
        request = ask(ledger, 6)
        assert ledger.advance([second]).answered == []
        assert ledger.advance([first]).answered == [request]
        assert request.arena is first

    def test_idle_arenas_are_evicted_for_a_larger_one_which_waits_for_their_closing(self):
        ledger = ledger_of(10)
        arenas = [granted(ledger, 3), granted(ledger, 3), granted(ledger, 3)]
        ledger.advance(arenas)
        request = ask(ledger, 6)
        actions = ledger.advance([])
        assert actions.close == arenas[:2], "the least recently used, and no more than needed"
        assert not request.answered
        assert ledger.advance([]).close == [], "what is closing already is counted on"
        closed(ledger, actions)
        assert ledger.advance([]).answered == [request]

    def test_nothing_is_evicted_in_vain(self):
        ledger = ledger_of(10)
        idle, leased = granted(ledger, 3), granted(ledger, 5)
        ledger.advance([idle])
        request = ask(ledger, 8)
        actions = ledger.advance([])
        assert actions.close == []
        assert ledger.leased == {leased}
        assert not request.answered

    def test_requests_are_answered_in_order(self):
        ledger = ledger_of(10)
        held = granted(ledger, 8)
        large, small = ask(ledger, 9), ask(ledger, 1)
        assert ledger.advance([]).answered == [], "the small one would fit, but came later"
        closed(ledger, ledger.advance([held]))
        assert ledger.advance([]).answered == [large, small]

    def test_the_next_goes_on_when_the_first_withdraws(self):
        ledger = ledger_of(10)
        granted(ledger, 8)
        large, small = ask(ledger, 9), ask(ledger, 1)
        assert ledger.advance([large]).answered == [small]

    def test_a_request_may_withdraw_after_it_was_granted_and_twice(self):
        ledger = ledger_of(10)
        request = ask(ledger, 3)
        ledger.advance([])
        arena = request.arena
        ledger.advance([request, request])
        assert ledger.free == [arena]
        assert not ledger.leased

    def test_an_arena_that_was_never_reserved_is_closed(self):
        ledger = ledger_of(10)
        request = ask(ledger, 3)
        ledger.advance([])
        request.arena.reserved = False
        assert closed(ledger, ledger.advance([request])) == [3]


class TestHeldElsewhere:
    def test_an_arena_that_another_process_maps_is_not_reused(self):
        ledger = ledger_of(None)
        arena = granted(ledger, 3)
        arena.held_elsewhere = True
        ledger.advance([arena])
        assert granted(ledger, 3) is not arena

    def test_it_counts_and_the_ledger_says_that_time_may_help(self):
        ledger = ledger_of(4)
        arena = granted(ledger, 3)
        arena.held_elsewhere = True
        request = ask(ledger, 3)
        ledger.advance([arena])
        assert ledger.held_elsewhere
        assert not request.answered
        arena.held_elsewhere = False
        ledger.advance([])
        assert not ledger.held_elsewhere
        assert request.arena is arena

    def test_it_is_not_evicted(self):
        ledger = ledger_of(6)
        held, idle = granted(ledger, 3), granted(ledger, 3)
        held.held_elsewhere = True
        ledger.advance([held, idle])
        request = ask(ledger, 6)
        assert ledger.advance([]).close == []
        assert not request.answered
        assert ledger.held_elsewhere


class TestIdleMemory:
    def test_kept_as_long_as_recent_leases_needed_it_at_one_time(self):
        ledger = ledger_of(None)
        arenas = [granted(ledger, 2) for _ in range(4)]
        assert ledger.advance(arenas).close == []
        assert len(ledger.free) == 4

    def test_and_closed_once_they_no_longer_do(self):
        ledger = ledger_of(None)
        ledger.advance([granted(ledger, 2) for _ in range(4)])
        pages: list[int] = []
        for _ in range(20):
            request = ask(ledger, 2)
            pages += closed(ledger, ledger.advance([]))
            pages += closed(ledger, ledger.advance([request]))
        assert pages == [2, 2, 2]
        assert len(ledger.free) == 1

    def test_bursts_keep_their_arenas(self):
        ledger = ledger_of(None)
        made = set()
        for _ in range(5):
            burst = [granted(ledger, 2) for _ in range(6)]
            made.update(burst)
            assert closed(ledger, ledger.advance(burst)) == []
        assert len(made) == 6

    def test_growing_requests_do_not_leave_their_smaller_ones_behind(self):
        ledger = ledger_of(None)
        for pages in range(1, 200):
            arena = granted(ledger, pages)
            closed(ledger, ledger.advance([arena]))
            assert sum(idle.nbytes for idle in ledger.free) <= pages * PAGE_BYTES


class TestRefusal:
    def test_the_kernel_refusing_is_the_requests_error(self):
        def refuse(nbytes: int) -> FakeArena:
            raise HostMemoryError("no memory left")

        ledger = ledger_of(None, refuse)
        request, after = ask(ledger, 3), ask(ledger, 3)
        assert ledger.advance([]).answered == [request, after]
        assert isinstance(request.error, HostMemoryError)
        assert request.arena is None

    def test_idle_arenas_are_given_back_before_giving_up(self):
        def only_one_at_a_time(nbytes: int) -> FakeArena:
            if ledger.arenas:
                raise HostMemoryError("no memory left")
            return FakeArena(nbytes)

        ledger = ledger_of(None, only_one_at_a_time)
        ledger.advance([granted(ledger, 2)])
        request = ask(ledger, 6)
        actions = ledger.advance([])
        assert not request.answered
        assert ledger.advance([]).answered == [], "not while the closing goes on"
        assert closed(ledger, actions) == [2]
        assert ledger.advance([]).answered == [request]
        assert request.arena.nbytes == 6 * PAGE_BYTES


class TestClosing:
    def test_idle_arenas_are_closed_and_waiters_refused(self):
        ledger = ledger_of(5)
        idle, leased = granted(ledger, 2), granted(ledger, 3)
        request = ask(ledger, 5)
        ledger.closed = True
        actions = ledger.advance([idle])
        assert actions.answered == [request]
        assert isinstance(request.error, StagerClosedError)
        assert closed(ledger, actions) == [2]
        assert closed(ledger, ledger.advance([leased])) == [3]
        assert ledger.arenas == []

    def test_even_what_another_process_maps_is_closed_here(self):
        ledger = ledger_of(5)
        arena = granted(ledger, 2)
        arena.held_elsewhere = True
        ledger.closed = True
        assert closed(ledger, ledger.advance([arena])) == [2]


class AnyHistory(RuleBasedStateMachine):
    """Random operations keep the budget and the order, and no request waits without a reason."""

    budget = 12

    def __init__(self) -> None:
        super().__init__()
        self.ledger = ledger_of(self.budget)
        self.asked: list[Request] = []
        self.answers: list[Request] = []
        self.kept: list[FakeArena] = []

    def carry_out(self, actions: LedgerActions) -> None:
        self.answers += actions.answered
        self.kept += [request.arena for request in actions.answered if request.arena is not None]

    @rule(pages=st.integers(0, budget))
    def request(self, pages: int) -> None:
        self.asked.append(ask(self.ledger, pages))
        self.carry_out(self.ledger.advance([]))

    @precondition(lambda self: self.kept)
    @rule(data=st.data(), held_elsewhere=st.booleans())
    def end_leases(self, data: st.DataObject, held_elsewhere: bool) -> None:
        ended = data.draw(st.lists(st.sampled_from(self.kept), min_size=1, unique=True))
        for arena in ended:
            self.kept.remove(arena)
            arena.held_elsewhere = held_elsewhere
        self.carry_out(self.ledger.advance(ended))

    @precondition(lambda self: self.ledger.waiting)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.ledger.waiting))
        self.asked.remove(request)
        self.carry_out(self.ledger.advance([request]))

    @precondition(lambda self: self.ledger.closing)
    @rule(data=st.data())
    def close_one(self, data: st.DataObject) -> None:
        arenas = sorted(self.ledger.closing, key=attrgetter("number"))
        self.ledger.closing.remove(data.draw(st.sampled_from(arenas)))
        self.carry_out(self.ledger.advance([]))

    @rule()
    def other_processes_let_go(self) -> None:
        for arena in self.ledger.free:
            arena.held_elsewhere = False
        self.carry_out(self.ledger.advance([]))

    @invariant()
    def the_budget_holds(self) -> None:
        assert sum(arena.nbytes for arena in self.ledger.arenas) <= self.budget * PAGE_BYTES

    @invariant()
    def every_arena_is_in_one_place_and_leased_ones_are_those_that_are_kept(self) -> None:
        arenas = self.ledger.arenas
        assert len(arenas) == len(set(arenas))
        assert self.ledger.leased == set(self.kept)

    @invariant()
    def grants_fit(self) -> None:
        assert all(request.arena.nbytes >= request.nbytes for request in self.answers)

    @invariant()
    def answers_come_in_order(self) -> None:
        still = [request for request in self.asked if request in self.answers]
        assert still == self.answers
        assert self.asked[: len(still)] == still

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        ledger = self.ledger
        if ledger.waiting:
            assert ledger.leased or ledger.closing or ledger.held_elsewhere


AnyHistory.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestAnyHistory = pytest.mark.timeout(60)(AnyHistory.TestCase)
