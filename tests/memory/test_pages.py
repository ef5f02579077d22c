from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from aiostage._memory.pages import HugePages, discard

MIB = 1 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes advice")


def flags(address: int) -> set[str]:
    """Return what the kernel says of the mapping that an address is in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if "-" in fields[0] and not fields[0].endswith(":"):
            low, high = (int(number, 16) for number in fields[0].split("-"))
            inside = low <= address < high
        elif inside and fields[0] == "VmFlags:":
            return set(fields[1:])
    raise AssertionError("nothing is mapped there")


def preferred(pages: HugePages) -> torch.Tensor:
    memory = torch.empty(64 * MIB, dtype=torch.uint8)
    pages.prefer(memory.data_ptr(), memory.nbytes)
    if "hg" not in flags(memory.data_ptr()):
        pytest.skip("this kernel has no huge pages")
    return memory


def test_the_pages_at_both_ends_are_included() -> None:
    memory = preferred(HugePages())
    assert memory.data_ptr() % mmap.PAGESIZE
    assert "hg" in flags(memory.data_ptr() + memory.nbytes - 1)


def test_a_few_that_come_slowly_are_made_up_for() -> None:
    pages = HugePages()
    memory = preferred(pages)
    for _ in range(100):
        pages.took(0.015, 8 * MIB)
        for _ in range(6):
            pages.took(0.001, 8 * MIB)
    assert "hg" in flags(memory.data_ptr())


def test_many_that_come_slowly_are_done_without() -> None:
    pages = HugePages()
    memory = preferred(pages)
    for _ in range(3):
        pages.took(0.015, 8 * MIB)
    assert "nh" in flags(memory.data_ptr())
    later = torch.empty(64 * MIB, dtype=torch.uint8)
    pages.prefer(later.data_ptr(), later.nbytes)
    assert "hg" not in flags(later.data_ptr())


def test_what_is_discarded_reads_as_zeros() -> None:
    with mmap.mmap(-1, 4 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
        mapping[:] = b"1" * len(mapping)
        memory = torch.frombuffer(mapping, dtype=torch.uint8)
        discard(memory.data_ptr() + mmap.PAGESIZE, mmap.PAGESIZE)
        assert bytes(mapping) == b"1" * mmap.PAGESIZE + bytes(mmap.PAGESIZE) + b"1" * 2 * mmap.PAGESIZE
        del memory
