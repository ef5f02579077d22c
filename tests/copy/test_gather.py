"""Gathering small pieces of memory: the bytes, and nothing beside them, in the thread that asks."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aiostage._copy.gather import Gather, one_thread


@given(st.integers(1, 50), st.lists(st.integers(0, 400), min_size=1, max_size=30))
def test_gathers_the_bytes_at_any_addresses(nbytes: int, starts: list[int]) -> None:
    source = np.random.default_rng(0).integers(0, 256, 500, dtype=np.uint8)
    target = np.zeros(len(starts) * nbytes, dtype=np.uint8)
    gather = Gather([source.ctypes.data + start for start in starts], nbytes, target)
    gather.run(0, len(gather))
    assert target.tobytes() == b"".join(source[start : start + nbytes].tobytes() for start in starts)


def test_writes_the_rows_that_were_asked_for_and_no_others() -> None:
    rows = [torch.full((8,), float(n)) for n in range(10)]
    target = np.zeros((10, 8), dtype=np.float32)
    gather = Gather([row.data_ptr() for row in rows], 32, target.reshape(-1).view(np.uint8))
    gather.run(3, 5)
    assert target.sum(axis=1).tolist() == [0, 0, 0, 24, 32, 0, 0, 0, 0, 0]


def test_the_destination_may_lie_between_the_sources() -> None:
    memory = np.arange(96, dtype=np.uint8)
    address = memory.ctypes.data
    gather = Gather([address + 64, address], 32, memory[32:64].repeat(2))
    gather.run(0, 2)
    inside = Gather([address + 64], 32, memory[32:64])
    inside.run(0, 1)
    assert memory[32:64].tolist() == list(range(64, 96))
    assert memory[:32].tolist() == list(range(32))


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
