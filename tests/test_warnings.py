"""Warnings that are ignored inside leave the filters of the process as they are."""

from __future__ import annotations

import threading
import warnings

from aiostage._warnings import without_warnings


def test_two_threads_at_once_leave_the_filters_as_they_were() -> None:
    before = list(warnings.filters)
    first_is_in, second_is_in, first_is_out = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with without_warnings():
            first_is_in.set()
            # In vain, as one enters at a time.
            second_is_in.wait(0.2)
        first_is_out.set()

    def second() -> None:
        first_is_in.wait()
        with without_warnings():
            second_is_in.set()
            first_is_out.wait()

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


def test_one_thread_may_enter_twice() -> None:
    with without_warnings(), without_warnings():
        warnings.warn("nothing", UserWarning, stacklevel=1)
