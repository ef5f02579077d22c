from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import suppress
from time import monotonic

import pytest

from aiostage._loop.workers import Workers

SOON = 10.0


@pytest.fixture
def workers() -> Iterator[Workers]:
    others = set(threading.enumerate())
    workers = Workers(2, "test-memory")
    yield workers
    workers.stop()
    # A test that keeps a failed task in a local is a circle with that task's traceback.
    gc.collect()
    deadline = monotonic() + SOON
    names = ("test-memory", "aiostage-leases")
    while alive := [t for t in threading.enumerate() if t.name.startswith(names) and t not in others]:
        assert monotonic() < deadline, f"{alive} outlive the test"
        for thread in alive:
            # One that is being started cannot be joined yet.
            with suppress(RuntimeError):
                thread.join(SOON)
