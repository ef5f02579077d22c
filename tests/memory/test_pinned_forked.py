"""A forked child does not have its parent's page-locked memory, which Linux would copy page by page."""

from __future__ import annotations

import sys

import pytest

from tests.forking import run_forking

PROGRAM = """
import torch, aiostage
from aiostage.testing import SimulatedAccelerator

accelerator = SimulatedAccelerator()
live = {"a": accelerator.to_device(torch.ones(1 << 20))}

def mapped(address):
    with open("/proc/self/maps") as maps:
        lines = maps.readlines()
    for line in lines:
        start, stop = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= address < stop:
            return True
    return False

async def stage(stager):
    return await stager.stage(live)

stager = aiostage.AsyncStager(backend=accelerator)
staged = asyncio.run(stage(stager))
assert stager.statistics().pinned_bytes
address = staged["a"].data_ptr()
assert mapped(address)

def child():
    global staged
    assert not mapped(address)
    # What lies there now is the child's, and is not unmapped with the parent's tensor.
    import ctypes, mmap
    size = staged["a"].nbytes
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    start = address - address % mmap.PAGESIZE
    there = libc.mmap(ctypes.c_void_p(start), ctypes.c_size_t(size), 3, 0x22, -1, ctypes.c_long(0))
    del staged
    gc.collect()
    # Elsewhere, if the child has already put something there.
    ctypes.memset(there, 1, size)
    with accelerator_of_the_child() as own:
        again = asyncio.run(stage_on(own))
        assert float(again["a"].mean()) == 2

@contextlib.contextmanager
def accelerator_of_the_child():
    with SimulatedAccelerator() as own:
        yield own

async def stage_on(own):
    async with aiostage.AsyncStager(backend=own) as mine:
        return await mine.stage({"a": own.to_device(torch.full((1000,), 2.0))})

in_child(child)
assert float(staged["a"].mean()) == 1
asyncio.run(stager.aclose())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux copies page-locked memory when a process forks")
def test_it_is_left_out() -> None:
    run_forking(PROGRAM)
