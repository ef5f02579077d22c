from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

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
    for thread in set(threading.enumerate()) - others:
        if thread.name.startswith(("test-memory", "aiostage-leases")):
            thread.join(SOON)
            assert not thread.is_alive(), f"{thread.name} outlives the test"
