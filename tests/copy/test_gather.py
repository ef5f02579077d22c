"""Gathering small pieces of memory: the bytes, and nothing beside them, in the thread that asks."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aiostage import AsyncStager
from aiostage._capture.versions import Sources
from aiostage._copy.host import Gather, one_thread


def gather(addresses: list[int], nbytes: int, destination: np.ndarray) -> Gather:
    made = Gather.over(addresses, nbytes, destination)
    assert made is not None
    return made


@given(st.integers(1, 50), st.lists(st.integers(0, 400), min_size=1, max_size=30))
def test_gathers_the_bytes_at_any_addresses(nbytes: int, starts: list[int]) -> None:
    source = np.random.default_rng(0).integers(0, 256, 500, dtype=np.uint8)
    target = np.zeros(len(starts) * nbytes, dtype=np.uint8)
    gathered = gather([source.ctypes.data + start for start in starts], nbytes, target)
    gathered.run(0, len(gathered))
    assert target.tobytes() == b"".join(source[start : start + nbytes].tobytes() for start in starts)


def test_writes_the_rows_that_were_asked_for_and_no_others() -> None:
    rows = [torch.full((8,), float(n)) for n in range(10)]
    target = np.zeros((10, 8), dtype=np.float32)
    gathered = gather([row.data_ptr() for row in rows], 32, target.reshape(-1).view(np.uint8))
    gathered.run(3, 5)
    assert target.sum(axis=1).tolist() == [0, 0, 0, 24, 32, 0, 0, 0, 0, 0]


def test_the_destination_may_lie_between_the_sources() -> None:
    memory = np.arange(96, dtype=np.uint8)
    address = memory.ctypes.data
    gathered = gather([address + 64, address], 32, memory[32:64].repeat(2))
    gathered.run(0, 2)
    inside = gather([address + 64], 32, memory[32:64])
    inside.run(0, 1)
    assert memory[32:64].tolist() == list(range(64, 96))
    assert memory[:32].tolist() == list(range(32))


def test_rows_from_all_over_the_address_space() -> None:
    heap, apart = np.arange(64, dtype=np.uint8), mmap.mmap(-1, mmap.PAGESIZE)
    apart[:64] = bytes(range(100, 164))
    mapped = np.frombuffer(apart, dtype=np.uint8)
    target = np.zeros(128, dtype=np.uint8)
    gathered = gather([heap.ctypes.data, mapped.ctypes.data], 64, target)
    gathered.run(0, 2)
    assert target.tolist() == [*range(64), *range(100, 164)]


def test_large_rows_at_odd_addresses_far_apart_are_refused() -> None:
    far = [4096, 1 << 46, (1 << 46) + 1]
    assert Gather.over(far, 2**18, np.zeros(3 * 2**18, dtype=np.uint8)) is None
    # Nothing is read before it runs.
    assert Gather.over([4096, 1 << 46], 2**18, np.zeros(2**19, dtype=np.uint8)) is not None


@pytest.mark.asyncio
async def test_what_cannot_be_gathered_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiostage._copy.host._MOST_ELEMENTS", 0)
    source = {str(n): torch.full((8,), float(n)) for n in range(100)}
    async with AsyncStager() as stager:
        staged = await stager.stage(source)
    assert all(torch.equal(staged[name], value) for name, value in source.items())


@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="this PyTorch divides its work without OpenMP")
def test_one_thread_means_the_calling_thread_alone() -> None:
    seen = []

    def look() -> None:
        before = torch.get_num_threads()
        with one_thread():
            seen.append(torch.get_num_threads())
        seen.append(torch.get_num_threads() == before)

    here = torch.get_num_threads()
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert seen == [1, True]
    assert torch.get_num_threads() == here


@pytest.mark.asyncio
async def test_few_leaves_are_looked_at_with_the_gil_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []
    real = Sources.are_there

    def count(self: Sources, indices: Sequence[int]) -> list[bool] | None:
        looked_at.append(len(indices))
        return real(self, indices)

    monkeypatch.setattr(Sources, "are_there", count)
    source = {str(n): torch.full((8,), float(n)) for n in range(2000)}
    async with AsyncStager() as stager:
        await stager.stage(source)
    assert sum(looked_at) == len(source)
    assert max(looked_at) <= 256
