"""A child that was forked beside busy threads works, and leaves its parent's work alone."""

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


def test_workers_start_again_with_their_own_threads() -> None:
    run_forking(WORKERS)
