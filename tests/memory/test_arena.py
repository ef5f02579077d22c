from __future__ import annotations

import gc
import mmap
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy
import pytest
import torch

from aiostage._memory.arena import Arena, pieces, whole_pages
from aiostage._platform.memory import PAGE_BYTES
from aiostage.errors import HostMemoryError
from tests.warm import PYTHON

MIB = 1 << 20

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")


def resident_bytes(arena: Arena) -> int:
    """Return how much of an arena's mapping is in memory, as the kernel counts it."""
    start = arena.address
    resident = inside = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if "-" in fields[0] and not fields[0].endswith(":"):
            low, high = (int(number, 16) for number in fields[0].split("-"))
            inside = low < start + arena.nbytes and start < high
        elif inside and fields[0] == "Rss:":
            resident += int(fields[1]) * 1024
    return resident


def is_mapped(start: int, nbytes: int) -> bool:
    """Return whether one mapping covers a whole range. A part of it may belong to other memory by now."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(number, 16) for number in line.split()[0].split("-"))
        if low <= start and start + nbytes <= high:
            return True
    return False


@pytest.mark.parametrize("make", [Arena.pageable, Arena.shared])
class TestBothKinds:
    def test_is_whole_pages_page_aligned_and_writable(self, make):
        arena = make(100)
        assert arena.nbytes == PAGE_BYTES
        assert arena.address % PAGE_BYTES == 0
        buffer = arena.exporter(100)
        assert buffer.shape == (100,)
        assert buffer.dtype == numpy.uint8
        assert buffer.ctypes.data == arena.address
        buffer[:] = 7
        assert arena.exporter(200)[:101].tolist() == [7] * 100 + [0]

    @linux
    def test_closing_unmaps(self, make):
        arena = make(64 * MIB)
        place = arena.address, arena.nbytes
        assert is_mapped(*place)
        arena.close()
        assert not is_mapped(*place)

    @linux
    def test_closing_under_an_exporter_leaves_it_to_the_exporters_death(self, make):
        arena = make(64 * MIB)
        tensor = torch.from_numpy(arena.exporter(MIB))[10:20]
        tensor.fill_(3)
        place = arena.address, arena.nbytes
        arena.close()
        del arena
        assert is_mapped(*place)
        assert tensor.tolist() == [3] * 10
        del tensor
        assert not is_mapped(*place)

    @linux
    def test_dropping_unmaps(self, make):
        arena = make(64 * MIB)
        place = arena.address, arena.nbytes
        del arena
        assert not is_mapped(*place)

    def test_more_than_there_can_be_is_refused_with_the_number(self, make):
        size = 1 << 62
        with pytest.raises(HostMemoryError, match=str(size)):
            make(size)

    @linux
    def test_populate_faults_a_range_in(self, make):
        arena = make(8 * MIB)
        arena.reserve(0, arena.nbytes)
        assert resident_bytes(arena) == 0
        assert not arena.is_warm(0, 1)
        arena.populate(0, 4 * MIB)
        assert 4 * MIB <= resident_bytes(arena) <= 6 * MIB
        assert arena.is_warm(0, 4 * MIB)
        assert not arena.is_warm(0, 4 * MIB + 1)
        arena.populate(4 * MIB, 8 * MIB)
        assert arena.is_warm(0, arena.nbytes)
        assert resident_bytes(arena) == 8 * MIB

    def test_populate_leaves_the_pages_at_its_ends_alone(self, make):
        arena = make(8 * PAGE_BYTES)
        arena.exporter(arena.nbytes)[:] = 9
        arena.populate(PAGE_BYTES - 1, 3 * PAGE_BYTES + 1)
        buffer = arena.exporter(arena.nbytes)
        assert buffer[:PAGE_BYTES].tolist() == [9] * PAGE_BYTES
        assert buffer[3 * PAGE_BYTES :].tolist() == [9] * 5 * PAGE_BYTES
        arena.populate(10, 20)
        assert buffer[:PAGE_BYTES].tolist() == [9] * PAGE_BYTES

    def test_populate_does_not_touch_what_is_warm(self, make):
        arena = make(2 * MIB)
        arena.populate(0, arena.nbytes)
        buffer = arena.exporter(arena.nbytes)
        buffer[:] = 9
        arena.populate(0, arena.nbytes)
        assert (buffer == 9).all()

    def test_ranges_of_one_arena_can_be_populated_side_by_side(self, make):
        arena = make(16 * MIB + 3 * PAGE_BYTES)
        threads = [threading.Thread(target=arena.populate, args=part) for part in pieces(0, arena.nbytes, MIB)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Whole blocks only are remembered; a range that begins inside one is looked at again.
        assert not arena.exporter(arena.nbytes).any()
        arena.populate(0, arena.nbytes)
        assert arena.is_warm(0, arena.nbytes)

    def test_repr(self, make):
        arena = make(MIB)
        assert repr(arena) == f"<Arena {arena.kind}, {MIB} bytes at {arena.address:#x}>"


VIEWS = {
    "the exporter": lambda exporter: exporter,
    "a slice": lambda exporter: exporter[8:16],
    "a slice of a slice": lambda exporter: exporter[8:32][4:12],
    "another dtype": lambda exporter: exporter[8:16].view(numpy.float32),
    "another shape": lambda exporter: exporter[:64].view(numpy.float32).reshape(4, 4)[1],
    "a row of an iteration": lambda exporter: list(exporter[:64].reshape(4, 16))[2],
    "strided": lambda exporter: exporter[:64:4],
    "a memoryview": lambda exporter: memoryview(exporter),
    "a part of a memoryview": lambda exporter: memoryview(exporter)[8:16],
    "from_numpy": lambda exporter: torch.from_numpy(exporter),
    "from_numpy of a slice": lambda exporter: torch.from_numpy(exporter[8:16]),
    "from_numpy, viewed": lambda exporter: torch.from_numpy(exporter[8:16]).view(torch.float32),
    "frombuffer": lambda exporter: torch.frombuffer(exporter, dtype=torch.float32, count=2, offset=8),
    "frombuffer of a slice": lambda exporter: torch.frombuffer(exporter[8:16], dtype=torch.float32),
    "frombuffer of a memoryview": lambda exporter: torch.frombuffer(memoryview(exporter)[8:16], dtype=torch.uint8),
    "a view of a tensor": lambda exporter: torch.from_numpy(exporter)[8:16][2:],
    "a detached tensor": lambda exporter: torch.from_numpy(exporter).detach(),
    "a parameter": lambda exporter: torch.nn.Parameter(torch.from_numpy(exporter[:8].view(numpy.float32))),
    "a storage": lambda exporter: torch.from_numpy(exporter).untyped_storage(),
    "a tensor over a storage": lambda exporter: torch.empty(0, dtype=torch.uint8).set_(
        torch.from_numpy(exporter).untyped_storage(), 8, (4,), (1,)
    ),
    "back to NumPy": lambda exporter: torch.from_numpy(exporter)[8:16].numpy(),
    "through DLPack": lambda exporter: torch.from_dlpack(exporter),
}


@pytest.mark.parametrize("make", [Arena.pageable, Arena.shared])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_everything_made_from_an_exporter_keeps_it_alive(make, view):
    arena = make(MIB)
    ended: list[bool] = []
    exporter = arena.exporter(MIB)
    weakref.finalize(exporter, ended.append, True)
    made = view(exporter)
    del exporter
    gc.collect()
    assert not ended
    del made
    assert ended, "and nothing else does"


def test_each_exporter_is_a_new_object():
    arena = Arena.pageable(MIB)
    ended: list[bool] = []
    first = arena.exporter(MIB)
    weakref.finalize(first, ended.append, True)
    second = arena.exporter(MIB)
    assert second is not first
    del first
    assert ended


def test_the_kernel_refusing_a_mapping_is_an_error_with_the_number():
    script = """
import resource
from aiostage._memory.arena import Arena
from aiostage.errors import HostMemoryError
from tests.warm import PYTHON
limit = 64 << 30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    Arena.pageable(2 * limit)
except HostMemoryError as error:
    assert isinstance(error, MemoryError)
    print(error)
"""
    done = subprocess.run([*PYTHON, "-c", script], capture_output=True, text=True, check=True)
    assert str(128 << 30) in done.stdout
    assert "Cannot allocate memory" in done.stdout


class TestArithmetic:
    @pytest.mark.parametrize(("nbytes", "pages"), [(0, 0), (1, 1), (PAGE_BYTES, 1), (PAGE_BYTES + 1, 2)])
    def test_whole_pages(self, nbytes: int, pages: int):
        assert whole_pages(nbytes) == pages * mmap.PAGESIZE

    def test_pieces_cut_at_multiples(self):
        assert list(pieces(3, 10, 4)) == [(3, 4), (4, 8), (8, 10)]
        assert list(pieces(4, 8, 4)) == [(4, 8)]
        assert list(pieces(5, 5, 4)) == []
