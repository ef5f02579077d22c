"""What cold host memory costs, by every way of getting it warm, and what each way does to the rest of the process.

Every round takes the ways in a new random order, each in a fresh mapping, so that no way profits from what another left
behind. Beside each, a thread that does what an event loop's next large allocation does, a small mmap and munmap every
millisecond, notes how long that takes it.

    python benchmarks/memory.py --gib 2 --rounds 7
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import mmap
import os
import random
import statistics
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter, sleep

import numpy
import torch

PIECE_BYTES = 8 << 20
MADV_POPULATE_WRITE = 23

libc = ctypes.CDLL(None, use_errno=True)
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def advise(address: int, nbytes: int, advice: int) -> None:
    if libc.madvise(address, nbytes, advice):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@dataclass
class Mapping:
    """A fresh mapping and the ways of warming one piece of it."""

    nbytes: int
    kind: str
    source: torch.Tensor

    def __post_init__(self) -> None:
        if self.kind == "shared":
            self.descriptor = os.memfd_create("benchmark")
            os.ftruncate(self.descriptor, self.nbytes)
            self.memory = mmap.mmap(self.descriptor, self.nbytes)
        else:
            self.memory = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.bytes = numpy.frombuffer(self.memory, numpy.uint8)
        self.tensor = torch.from_numpy(self.bytes)
        self.address = self.bytes.ctypes.data
        if self.kind != "shared":
            self.memory.madvise(mmap.MADV_HUGEPAGE if self.kind == "huge" else mmap.MADV_NOHUGEPAGE)

    def touch(self, start: int) -> None:
        self.bytes[start : start + PIECE_BYTES : mmap.PAGESIZE] = 0

    def populate(self, start: int) -> None:
        advise(self.address + start, PIECE_BYTES, MADV_POPULATE_WRITE)

    def copy(self, start: int) -> None:
        stop = start + PIECE_BYTES
        ctypes.memmove(self.address + start, self.source.data_ptr() + start, stop - start)

    def touch_and_copy(self, start: int) -> None:
        self.touch(start)
        self.copy(start)

    def populate_and_copy(self, start: int) -> None:
        self.populate(start)
        self.copy(start)

    def reserve_and_touch(self, start: int) -> None:
        os.posix_fallocate(self.descriptor, start, PIECE_BYTES)
        self.touch(start)

    def discard_and_unmap(self) -> None:
        del self.tensor, self.bytes
        advise(self.address, self.nbytes, mmap.MADV_DONTNEED)
        self.unmap()

    def unmap(self) -> None:
        self.__dict__.pop("tensor", None)
        self.__dict__.pop("bytes", None)
        self.memory.close()
        if self.kind == "shared":
            os.close(self.descriptor)


@dataclass
class Bystander:
    """A thread that maps and unmaps a little every millisecond, and how long each took it, in seconds."""

    delays: list[float] = field(default_factory=list)

    def __enter__(self) -> Bystander:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            sleep(0.001)
            begin = perf_counter()
            mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
            self.delays.append(perf_counter() - begin)


@dataclass
class Result:
    """The rounds of one way: seconds each took, and the bystander's delays of all of them."""

    seconds: list[float] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)

    def row(self) -> str:
        delays = sorted(self.delays) or [0.0]
        numbers = [statistics.median(self.seconds), min(self.seconds), max(self.seconds)]
        waits = [delays[len(delays) // 2], delays[int(len(delays) * 0.99)]]
        return " | ".join([*(f"{1e3 * n:.0f}" for n in numbers), *(f"{1e3 * n:.2f}" for n in waits)])


def in_threads(work: Callable[[int], None], nbytes: int, threads: int) -> None:
    starts = iter(range(0, nbytes, PIECE_BYTES))

    def run() -> None:
        for start in starts:
            work(start)

    workers = [threading.Thread(target=run) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def measure(mapping: Mapping, way: str, threads: int, result: Result) -> None:
    if "unmap" in way:
        in_threads(mapping.touch, mapping.nbytes, 2)
    with Bystander(result.delays):
        begin = perf_counter()
        if "unmap" in way:
            getattr(mapping, way)()
        else:
            in_threads(getattr(mapping, way), mapping.nbytes, threads)
        result.seconds.append(perf_counter() - begin)
    if "unmap" not in way:
        mapping.discard_and_unmap()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=2, help="how much memory each way warms")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    nbytes = int(arguments.gib * 2**30) // PIECE_BYTES * PIECE_BYTES
    source = torch.ones(nbytes, dtype=torch.uint8)
    private = ("touch", "populate", "copy", "touch_and_copy", "populate_and_copy")
    cases = [
        *itertools.product(("ordinary", "huge"), private, (1, 2)),
        *itertools.product(("shared",), ("touch", "populate", "reserve_and_touch"), (1, 2)),
        *itertools.product(("ordinary", "huge"), ("unmap", "discard_and_unmap"), (1,)),
    ]
    results = {case: Result() for case in cases}
    for _ in range(arguments.rounds):
        for kind, way, threads in random.sample(cases, len(cases)):
            measure(Mapping(nbytes, kind, source), way, threads, results[kind, way, threads])
    print(f"{nbytes / 2**30:.1f} GiB, {arguments.rounds} rounds; milliseconds\n")
    print("| pages | way | threads | median | least | most | mmap beside it, median | 99th percentile |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for (kind, way, threads), result in results.items():
        print(f"| {kind} | {way.replace('_', ' ')} | {threads} | {result.row()} |")


if __name__ == "__main__":
    main()
