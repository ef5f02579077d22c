"""The roll call, its ranks as threads, each with a connection of its own to a store of this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch.distributed as dist

from aiostage.dcp.barrier import RankBarrier, StoreLostError
from tests.patience import seconds

PATIENCE = seconds(10)
"""How long what comes is waited for. A store may take seconds to notice a connection of a busy machine."""

TIMEOUT = seconds(0.125)
"""How long a late rank is waited for: half a second where nothing else runs. The others arrive within it."""

GRACE = seconds(0.25)
"""How long the others may take to answer whoever blames them: a second where nothing else runs."""


def new_store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def together(
    size: int, act: Callable[[RankBarrier, int], Any], store: Any = None, *, grace: float | None = None
) -> list[Any]:
    store = store if store is not None else new_store()
    # One after another: of several that connect at once, some do so 5 s later.
    calls = [RankBarrier(store.clone(), 0, rank, size, grace=grace) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(act, calls, range(size)))


def test_all_come() -> None:
    assert together(5, lambda call, _: call.arrive(PATIENCE)) == [{}] * 5


def test_one_is_late_and_all_say_the_same() -> None:
    given_up = Barrier(4)

    def act(call: RankBarrier, rank: int) -> Mapping[int, str]:
        if rank == 1:
            given_up.wait(PATIENCE)
            return call.arrive(TIMEOUT)
        failures = call.arrive(TIMEOUT)
        given_up.wait(PATIENCE)
        return failures

    assert together(4, act) == [{1: f"it did not arrive within {TIMEOUT:g} seconds"}] * 4


def test_one_refuses_before_the_others_come() -> None:
    store = new_store()
    assert RankBarrier(store, 0, 2, 3).refuse("no room")
    assert (
        together(2, lambda call, _: RankBarrier(store.clone(), 0, call._rank, 3).arrive(PATIENCE))
        == [{2: "no room"}] * 2
    )


def test_one_refuses_while_the_others_wait() -> None:
    def act(call: RankBarrier, rank: int) -> Any:
        if rank == 0:
            time.sleep(0.2)
            return call.refuse("no room")
        return call.arrive(PATIENCE)

    assert together(3, act) == [True, {0: "no room"}, {0: "no room"}]


def test_too_late_to_refuse() -> None:
    def act(call: RankBarrier, rank: int) -> Any:
        assert call.arrive(PATIENCE) == {}
        return call.refuse("changed my mind")

    assert together(3, act) == [False] * 3


def test_of_two_that_refuse_one_is_named() -> None:
    outcomes = together(2, lambda call, rank: call.refuse(str(rank)))
    assert sorted(outcomes) == [False, True]


class TestBlame:
    def test_the_one_whose_process_is_gone(self) -> None:

        def act(call: RankBarrier, rank: int) -> Any:
            if rank == 0:
                return call.blame("Connection closed by peer")
            if rank == 1:
                # Busy with writing; its process answers from another thread.
                while not call.answer():
                    time.sleep(0.01)
            return None

        assert together(3, act, grace=GRACE)[0] == {2: "its process was lost"}

    def test_the_one_that_does_not_come_out(self) -> None:

        def act(call: RankBarrier, rank: int) -> Any:
            if rank != 2:
                return call.blame("Timed out")
            while not call.answer():
                time.sleep(0.01)
            return None

        assert together(3, act, grace=GRACE)[:2] == [{2: "it keeps the others waiting"}] * 2

    def test_no_rank_in_particular(self) -> None:
        def act(call: RankBarrier, rank: int) -> Any:
            if rank == 0:
                call.leave()
                return None
            return call.blame("Connection reset")

        first, *others = together(3, act)
        assert first is None
        assert others[0] == others[1]
        assert list(others[0].values()) == ["Connection reset"]

    def test_no_rank_asks(self) -> None:
        assert not RankBarrier(new_store(), 0, 0, 2).answer()


def test_nothing_is_left_in_the_store() -> None:
    store, later = new_store(), Barrier(3)

    def act(call: RankBarrier, rank: int) -> None:
        call.arrive(PATIENCE)
        call.answer()
        call.blame("broken")
        later.wait(PATIENCE)
        call.forget()

    together(3, act, store)
    assert [key for key in store.list_keys() if "aiostage" in key] == []


def test_calls_do_not_disturb_each_other() -> None:
    store = new_store()
    RankBarrier(store, 0, 0, 2).refuse("not this one")
    assert together(2, lambda call, rank: RankBarrier(store.clone(), 1, rank, 2).arrive(PATIENCE)) == [{}, {}]


@pytest.mark.parametrize("size", [2, 8])
def test_messages_do_not_grow_with_the_number_of_ranks(size: int) -> None:
    store = new_store()
    counts: list[int] = [0] * size

    class Counting:
        def __init__(self, rank: int, store: dist.TCPStore) -> None:
            self._rank = rank
            self._store = store

        def __getattr__(self, name: str) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                # Lists of keys count by their length.
                counts[self._rank] += len(arguments[0]) if isinstance(arguments[0], list) else 1
                return getattr(self._store, name)(*arguments)

            return call

    def act(rank: int, mine: dist.TCPStore) -> None:
        call = RankBarrier(Counting(rank, mine), 0, rank, size)
        assert call.arrive(PATIENCE) == {}
        call.leave()
        call.forget()

    with ThreadPoolExecutor(size) as pool:
        list(pool.map(act, range(size), [store.clone() for _ in range(size)]))
    assert max(counts[1:]) <= 8
    assert counts[0] <= 13


def test_a_store_that_is_gone() -> None:
    store = new_store()
    client = store.clone()
    call = RankBarrier(client, 0, 0, 2)
    call.leave()
    del store
    for act in (lambda: call.arrive(1), lambda: call.refuse(""), call.leave, call.answer, lambda: call.blame("")):
        with pytest.raises(StoreLostError):
            act()
