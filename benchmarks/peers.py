"""aiostage and those it is compared with, behind one interface."""

from __future__ import annotations

import asyncio
import copy
import ctypes
import gc
import mmap
from time import perf_counter
from typing import Any

import numpy
import torch
from torch.distributed.checkpoint.staging import DefaultStager
from torch.distributed.checkpoint.staging import StagingOptions as TorchOptions
from workloads import leaves_of

import aiostage

__all__ = ["PEERS", "Limit", "Peer"]

PAGE_BYTES = 2 << 20
MADV_POPULATE_WRITE = 23


class Peer:
    """Stages trees, in the way that its users do it in a coroutine."""

    async def stage(self, tree: Any) -> Any:
        """Return a staged copy."""
        raise NotImplementedError

    async def close(self) -> None:
        """Give up what it holds."""


class Aiostage(Peer):
    """This library; keyword arguments are its options."""

    def __init__(self, **options: Any) -> None:
        self.stager = aiostage.AsyncStager(aiostage.StagingOptions(**options))
        self.timings: Any = None

    async def stage(self, tree: Any) -> Any:
        async with self.stager.snapshot(tree) as snapshot:
            staged = await snapshot.result()
            self.timings = snapshot.timings
            return staged

    async def close(self) -> None:
        await self.stager.aclose()


class Torch(Peer):
    """PyTorch's DefaultStager, in its own thread."""

    def __init__(self, *, use_shared_memory: bool = False) -> None:
        self.stager = DefaultStager(TorchOptions(False, use_shared_memory, True, False))

    async def stage(self, tree: Any) -> Any:
        return await asyncio.wrap_future(self.stager.stage(tree))

    async def close(self) -> None:
        self.stager.close()


class TorchCheckpointing(Peer):
    """torch_checkpointing's DefaultStager, in its own thread."""

    def __init__(self, *, use_shared_memory: bool = False) -> None:
        from torch_checkpointing.staging import CheckpointStagerConfig, DefaultStager

        self.stager = DefaultStager(CheckpointStagerConfig(use_shared_memory=use_shared_memory))

    async def stage(self, tree: Any) -> Any:
        return await asyncio.wrap_future(self.stager.stage(tree))

    async def close(self) -> None:
        self.stager.close()


class Deepcopy(Peer):
    """What most people do today."""

    async def stage(self, tree: Any) -> Any:
        return await asyncio.to_thread(copy.deepcopy, tree)


class Limit(Peer):
    """No stager: one fused copy of the tensors into memory that is there, on the thread that is measured."""

    def __init__(self) -> None:
        self.warm: list[torch.Tensor] = []

    async def stage(self, tree: Any) -> None:
        self.copy(leaves_of(tree))

    def copy(self, sources: list[torch.Tensor]) -> None:
        """Copy, into the tensors of the first time."""
        if len(self.warm) != len(sources):
            self.warm = [source.clone() for source in sources]
        torch._foreach_copy_(self.warm, sources)


class LimitInThread(Limit):
    """The same in a worker thread, beside the event loop."""

    async def stage(self, tree: Any) -> None:
        await asyncio.to_thread(self.copy, leaves_of(tree))


class PopulateAndCopy(Peer):
    """No stager: cold memory faulted in by the kernel at one go, then one fused copy."""

    async def stage(self, tree: Any) -> Any:
        sources = leaves_of(tree)
        nbytes = sum(-(-source.nbytes // 64) * 64 for source in sources)
        size = -(-nbytes // PAGE_BYTES) * PAGE_BYTES
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        array = numpy.frombuffer(memory, numpy.uint8)
        if self.huge:
            memory.madvise(mmap.MADV_HUGEPAGE)
        if ctypes.CDLL(None).madvise(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(size), MADV_POPULATE_WRITE):
            raise OSError("MADV_POPULATE_WRITE needs Linux 5.14")
        targets, offset = [], 0
        for source in sources:
            flat = torch.from_numpy(array[offset : offset + source.nbytes]).view(source.dtype)
            targets.append(flat.view(source.shape))
            offset += -(-source.nbytes // 64) * 64
        torch._foreach_copy_(targets, sources)
        return targets

    huge = True


class PopulateSmallAndCopy(PopulateAndCopy):
    """The same with ordinary pages."""

    huge = False


class TwoThreads(Peer):
    """No stager: two threads write to cold memory with huge pages by copying, 2 MiB a call, without the GIL."""

    grain = PAGE_BYTES
    """Where the copy of a tensor may begin: a multiple of it."""

    async def stage(self, tree: Any) -> Any:
        sources = leaves_of(tree)
        array = self.memory(sum(-(-source.nbytes // self.grain) * self.grain for source in sources))
        moves, begin = [], array.ctypes.data
        for source in sources:
            origin, nbytes = source.data_ptr(), source.nbytes
            moves += [
                (begin + start, origin + start, min(PAGE_BYTES, nbytes - start))
                for start in range(0, nbytes, PAGE_BYTES)
            ]
            begin += -(-source.nbytes // self.grain) * self.grain
        left = iter(moves)

        def run() -> None:
            for move in left:
                self.before_each()
                ctypes.memmove(*move)

        await asyncio.gather(asyncio.to_thread(run), asyncio.to_thread(run))
        return array

    def before_each(self) -> None:
        """Do nothing before each call."""

    def memory(self, nbytes: int) -> Any:
        """Return new memory for the copies."""
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        return numpy.frombuffer(memory, numpy.uint8)


class TwoThreadsWarm(TwoThreads):
    """The same into the memory of the first time, where small tensors lie side by side."""

    grain = 64

    def __init__(self) -> None:
        self.array: Any = None

    def memory(self, nbytes: int) -> Any:
        if self.array is None or len(self.array) != nbytes:
            self.array = super().memory(nbytes)
        return self.array


class TwoThreadsOffering(TwoThreadsWarm):
    """The same, and each thread offers its core before each call: the least that delays an event loop beside it."""

    def before_each(self) -> None:
        _sched_yield()


_sched_yield = ctypes.CDLL(None).sched_yield
"""Without the GIL, which ``os.sched_yield`` keeps."""


class PlainSlices(Peer):
    """No stager: what many tensors cost the loop at least, while two threads copy as many bytes.

    Of each tensor its storage and address are asked for, a new one is made over a row of one buffer, and put into a
    dict: in slices of 0.3 ms, after which the loop has two turns. The collector runs after as many objects as beside
    aiostage. Nothing is compared, and the threads copy 2 MiB a call, whatever the tensors are.
    """

    slice_seconds = 0.0003
    at_once = 32
    objects_before_collection = 7919

    def __init__(self) -> None:
        self.memory: Any = None

    async def stage(self, tree: Any) -> Any:
        names, sources = list(tree), list(tree.values())
        nbytes = sources[0].nbytes
        if self.memory is None:
            pages = mmap.mmap(-1, len(sources) * nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            pages.madvise(mmap.MADV_HUGEPAGE)
            self.memory = numpy.frombuffer(pages, numpy.float32)
        rows = self.memory.reshape(len(sources), -1)
        piece = numpy.ones(PAGE_BYTES, numpy.uint8)
        left = iter(range(0, self.memory.nbytes, PAGE_BYTES))

        def copy_pieces() -> None:
            for start in left:
                _sched_yield()
                size = min(PAGE_BYTES, self.memory.nbytes - start)
                ctypes.memmove(self.memory.ctypes.data + start, piece.ctypes.data, size)

        copied = asyncio.gather(asyncio.to_thread(copy_pieces), asyncio.to_thread(copy_pieces))
        before = gc.get_threshold()
        gc.set_threshold(self.objects_before_collection, *before[1:])
        try:
            made: dict[str, torch.Tensor] = {}
            held: list[tuple[list[torch.UntypedStorage], list[int]]] = []
            end = perf_counter() + self.slice_seconds
            for start in range(0, len(sources), self.at_once):
                part = slice(start, start + self.at_once)
                held.append(
                    ([each.untyped_storage() for each in sources[part]], [each.data_ptr() for each in sources[part]])
                )
                made.update(zip(names[part], map(torch.from_numpy, rows[part]), strict=True))
                if perf_counter() > end:
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                    end = perf_counter() + self.slice_seconds
        finally:
            gc.set_threshold(*before)
        await copied
        return made


PEERS: dict[str, type[Any]] = {
    "aiostage": Aiostage,
    "DefaultStager": Torch,
    "torch_checkpointing": TorchCheckpointing,
    "copy.deepcopy": Deepcopy,
    "_foreach_copy_": Limit,
    "_foreach_copy_ in a thread": LimitInThread,
    "populate + copy": PopulateAndCopy,
    "populate + copy, 4 KiB pages": PopulateSmallAndCopy,
    "two threads": TwoThreads,
    "two threads, warm": TwoThreadsWarm,
    "two threads that offer their cores": TwoThreadsOffering,
    "plain slices": PlainSlices,
}
