"""What a save cannot do without, by plain threads: a copy into warm memory, and a digest of each part."""

from __future__ import annotations

import asyncio
import ctypes
import queue
import threading
from collections.abc import AsyncIterator
from time import perf_counter
from typing import Any

import xxhash
from places import PART_BYTES, filled
from workloads import leaves_of

__all__ = ["PlainCopies"]

_THREADS = 2
_memmove = ctypes.CDLL(None).memmove
_memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class PlainCopies:
    """Copies trees into warm memory by two threads, and computes the digest of each part in a third.

    Nothing is walked, checked or planned: all tensors have one size, and may not change meanwhile.

    Args:
        nbytes: Size of a tree.
    """

    def __init__(self, nbytes: int) -> None:
        self._memory = filled(nbytes)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    async def parts(self, tree: Any, captured: list[float]) -> AsyncIterator[memoryview]:
        """Start to copy a tree, and yield its parts in order, each once it is copied.

        Args:
            tree: Its tensors have one size, which divides that of a part or is a multiple of it.
            captured: When the last part was copied is appended.

        The digests are done when this ends.
        """
        sources = leaves_of(tree)
        size, total = sources[0].nbytes, len(self._memory)
        step = min(size, PART_BYTES)
        starts = range(0, total, PART_BYTES)
        numbers, lock = iter(range(len(starts))), threading.Lock()
        digests: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        loop = asyncio.get_running_loop()
        copied = [asyncio.Event() for _ in starts]

        def copy() -> None:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                begin, end = starts[number], min(starts[number] + PART_BYTES, total)
                for at in range(begin, end, step):
                    _memmove(self._address + at, sources[at // size].data_ptr() + at % size, min(step, end - at))
                loop.call_soon_threadsafe(copied[number].set)
                digests.put(self._memory[begin:end])

        def digest() -> None:
            while (part := digests.get()) is not None:
                xxhash.xxh3_64_hexdigest(part)

        copying = [threading.Thread(target=copy) for _ in range(_THREADS)]
        digesting = threading.Thread(target=digest)
        for thread in (*copying, digesting):
            thread.start()
        for number, begin in enumerate(starts):
            await copied[number].wait()
            if number == len(starts) - 1:
                captured.append(perf_counter())
            yield self._memory[begin : begin + PART_BYTES]
        for thread in copying:
            await asyncio.to_thread(thread.join)
        digests.put(None)
        await asyncio.to_thread(digesting.join)
