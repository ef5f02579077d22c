from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from aiostage._loop.workers import Workers
from tests.threads import until_none_of


@pytest.fixture
def workers() -> Iterator[Workers]:
    others = set(threading.enumerate())
    workers = Workers(2, "test-memory")
    yield workers
    workers.stop()
    until_none_of(("test-memory", "aiostage-leases"), others=others)
