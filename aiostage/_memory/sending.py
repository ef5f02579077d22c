"""Staged storages in shared memory, sent to other processes by ``multiprocessing``: as a descriptor, without a copy.

Only multiprocessing's own pickler, which writes for a process that will read at once, is given a descriptor. Every
other pickler (``pickle``, ``torch.save``, cloudpickle) may write for a file, and gets the bytes, as for any storage.
"""

from __future__ import annotations

import os
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import TYPE_CHECKING, Any
from weakref import ref

import numpy
import numpy.typing
import torch

from aiostage import _private
from aiostage._memory.shared import SentMemory, map_memory

if TYPE_CHECKING:
    from aiostage._memory.arena import Arena

__all__ = ["offer", "offered"]

_offered: dict[int, ref[Arena]] = {}
"""The shared arenas of this process. A dict, which a thread can copy in one step while others change it."""

_reduce_otherwise: Any = (_private.forking_reducers or {}).get(torch.UntypedStorage)
"""PyTorch's own, for storages that are not ours. Without it, all are left to PyTorch."""


def offer(arena: Arena) -> None:
    """Have multiprocessing send the storages of a shared arena as places in it."""
    number = id(arena)
    # The callback goes through the number and not through the arena, which is gone by then.
    _offered[number] = ref(arena, lambda gone: _offered.pop(number, None))
    if _reduce_otherwise is None:
        return
    ForkingPickler.register(SentMemory, _reduce_memory)
    ForkingPickler.register(torch.UntypedStorage, _reduce_storage)


def offered() -> list[Arena]:
    """Return the shared arenas of this process that are open."""
    arenas = [weak() for weak in list(_offered.values())]
    return [arena for arena in arenas if arena is not None and not arena.closed]


def _reduce_storage(storage: torch.UntypedStorage) -> Any:
    nbytes = storage.nbytes()
    if storage.device.type == "cpu" and nbytes:
        address = storage.data_ptr()
        for arena in offered():
            if arena.address <= address and address + nbytes <= arena.address + arena.nbytes:
                # None if it has just been closed: the bytes are sent then, as for any other storage.
                sent = arena.send()
                if sent is not None:
                    return _storage, (sent, address - arena.address, nbytes)
    return _reduce_otherwise(storage)


def _reduce_memory(sent: SentMemory) -> Any:
    # Reduced once in each message, however many storages refer to it.
    return _memory, (DupFd(sent.descriptor), sent.nbytes)


def _memory(descriptor: Any, nbytes: int) -> numpy.typing.NDArray[numpy.uint8]:
    """Map what was sent. The mapping's duplicate of the descriptor holds the lock that keeps the memory as it is."""
    number = descriptor.detach()
    try:
        return map_memory(number, nbytes)
    finally:
        os.close(number)


def _storage(memory: numpy.typing.NDArray[numpy.uint8], offset: int, nbytes: int) -> torch.UntypedStorage:
    return torch.from_numpy(memory[offset : offset + nbytes]).untyped_storage()
