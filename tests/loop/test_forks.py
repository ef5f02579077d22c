"""A child that was forked beside busy threads works, leaves its parent's work alone, and has a collector."""

from __future__ import annotations

import pytest

from tests.forking import run_forking

pytestmark = pytest.mark.slow

WORKERS = """
from aiostage._loop.workers import Workers

async def main():
    workers = Workers(1, "forked")
    running, go, served = threading.Event(), threading.Event(), []

    def first():
        running.set()
        go.wait()
        served.append("first")

    job = workers.job()
    job.put(first)
    job.put(lambda: served.append("second"))
    job.close()
    await asyncio.to_thread(running.wait)

    def child():
        assert workers.threads == 0
        assert asyncio.run(workers.run(lambda: threading.current_thread().name)).startswith("forked-")
        assert asyncio.run(workers.run(lambda: "again")) == "again"
        assert served == []

    in_child(child, workers._state.condition)
    go.set()
    await job.join()
    assert served == ["first", "second"]
    assert await workers.run(lambda: "works on") == "works on"
    in_child(lambda: asyncio.run(workers.run(lambda: None)))

asyncio.run(main())
"""


def test_workers_begin_anew_with_threads_of_their_own() -> None:
    run_forking(WORKERS)


COLLECTOR = """
from aiostage._loop import collection, slices

# So that no machine is too slow for what follows.
collection._EXPIRY = 1000.0

def child():
    assert gc.isenabled()
    with slices.collector_paused():
        assert not gc.isenabled()
        with slices.collector_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()

paused = slices.collector_paused()
paused.__enter__()
slices._collection_pause.renew()
in_child(child, slices._collection_pause._lock)
assert not gc.isenabled()

def closes_what_the_parent_began():
    with slices.collector_paused():
        paused.__exit__(None, None, None)
    assert gc.isenabled()
    with slices.collector_paused():
        assert not gc.isenabled()
    assert gc.isenabled()

in_child(closes_what_the_parent_began)
paused.__exit__(None, None, None)
assert gc.isenabled()

gc.disable()
with slices.collector_paused():
    in_child(lambda: gc.isenabled() and sys.exit("the user had switched it off"))
"""


def test_a_pause_of_the_collector_is_the_parents() -> None:
    run_forking(COLLECTOR)
