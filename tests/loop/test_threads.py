from __future__ import annotations

import threading

from aiostage._loop.workers import start_thread
from tests.patience import seconds

SOON = seconds(10.0)


def test_runs_the_thread_under_its_name():
    names: list[str] = []
    ran = threading.Event()

    def run() -> None:
        names.append(threading.current_thread().name)
        ran.set()

    start_thread(threading.Thread(target=run, name="test-begun", daemon=True))
    assert ran.wait(SOON)
    assert names == ["test-begun"]


def test_does_not_wait_for_its_first_turn():
    turn, ran = threading.Event(), threading.Event()

    class Late(threading.Thread):
        def start(self) -> None:
            assert turn.wait(SOON)
            super().start()

    start_thread(Late(target=ran.set, daemon=True))
    assert not ran.is_set()
    turn.set()
    assert ran.wait(SOON)


def test_one_thread_is_enough():
    ran = threading.Event()

    class Refused(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    start_thread(Refused(target=ran.set, daemon=True))
    assert ran.wait(SOON)
