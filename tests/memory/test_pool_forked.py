"""A pool in a forked child has memory of its own."""

from __future__ import annotations

import pytest

from tests.forking import run_forking

PROGRAM = """
from aiostage._loop.workers import Workers
from aiostage._memory.pool import Pool

MIB = 1 << 20

async def main(shared):
    pool = Pool(Workers(2, "pool"), max_bytes=2 * MIB, shared=shared)
    kept, idle = await pool.acquire(MIB), await pool.acquire(MIB)
    kept.buffer[:], idle.buffer[:] = 1, 2
    address = idle.arena.address
    del idle
    staged = [kept.buffer[5:9]]
    waiting = asyncio.ensure_future(pool.acquire(2 * MIB))
    await asyncio.sleep(0)
    assert pool.statistics().waiting == 1

    def child():
        assert pool.statistics().arenas == 0

        async def use():
            for _ in range(3):
                lease = await pool.acquire(2 * MIB)
                lease.buffer[:] = 255
                del lease
            await pool.aclose()

        asyncio.run(use())
        assert staged.pop().tolist() == [1] * 4
        gc.collect()
        assert pool.statistics().arenas == 0

    in_child(child, pool._lock)
    assert pool.statistics().waiting == 1
    waiting.cancel()
    await asyncio.wait([waiting])
    again = await pool.acquire(MIB)
    assert again.arena.address == address
    assert (again.buffer == 2).all() and (kept.buffer == 1).all()
    await pool.aclose()

    def closed():
        assert pool.statistics().leases == 0
        pool.close()
        asyncio.run(pool.aclose())

    in_child(closed)
    del again, kept, staged

for shared in (False, True):
    asyncio.run(main(shared))
"""


@pytest.mark.slow
def test_a_child_begins_with_none_and_writes_to_none_of_its_parents() -> None:
    run_forking(PROGRAM)
