"""aiostage and those it is compared with, behind one interface."""

from __future__ import annotations

import asyncio
import copy
import ctypes
import mmap
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
                ctypes.memmove(*move)

        await asyncio.gather(asyncio.to_thread(run), asyncio.to_thread(run))
        return array

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
}
