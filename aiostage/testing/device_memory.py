"""The memory of a simulated device: a caching allocator, and references to tensors that keep no memory alive."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch.multiprocessing import reductions

from aiostage._loop.coroutines import Finalizer

__all__ = ["Block", "DeviceMemory", "TensorReference"]

# As Any, because it has no types.
_weak_reference: Any = reductions.StorageWeakRef

_GRAIN_BYTES = 512
"""Blocks begin and end at multiples of this, as in CUDA's allocator."""


class Completes(Protocol):
    """An event, as the allocator uses it."""

    @property
    def completed(self) -> bool:
        """Whether all that was enqueued before it is done."""


class Block:
    """A range of a device's memory that was handed out.

    Attributes:
        offset: Where it begins, in bytes from the beginning of the memory.
        nbytes: Its size.
        stream: The stream that it was allocated for. Only this stream gets it again.
        users: Other streams that use it, as ``keep`` has said.
        events: These have to complete before it is free, when its last tensor has died.
    """

    __slots__ = ("events", "nbytes", "offset", "stream", "users")

    def __init__(self, offset: int, nbytes: int, stream: Any) -> None:
        self.offset = offset
        self.nbytes = nbytes
        self.stream = stream
        self.users: set[Any] = set()
        self.events: list[Completes] = []


class DeviceMemory:
    """A range of host memory in the role of a device's, with an allocator that behaves like CUDA's caching one.

    When the last tensor over a block dies, the block goes back at once to the stream that it was allocated for, also
    if other streams still use it. The next allocation of that stream gets it. The allocator waits only for streams that
    were named by ``record_stream``. Blocks are neither split nor joined.

    Not thread-safe, except that tensors may die in any thread at any time.

    Args:
        nbytes: Its size. Untouched memory costs nothing.
    """

    def __init__(self, nbytes: int) -> None:
        self._bytes = np.empty(nbytes, dtype=np.uint8)
        self._storage = torch.from_numpy(self._bytes).untyped_storage()
        self._address: int = self._bytes.ctypes.data
        self._unused = 0
        self._blocks: dict[int, Block] = {}
        self._cached: dict[Any, list[Block]] = {}
        # Finalizers run in any thread, where the last reference is dropped. They only append, which takes no lock.
        self._died: deque[Block] = deque()
        self._pending: list[Block] = []

    def __contains__(self, address: int) -> bool:
        return 0 <= address - self._address < self._bytes.size

    @property
    def allocated_bytes(self) -> int:
        """Size of the blocks that have tensors, or whose other streams are not done."""
        return self._unused - self.cached_bytes

    @property
    def cached_bytes(self) -> int:
        """Size of the blocks that wait for their stream's next allocation."""
        return sum(block.nbytes for blocks in self._cached.values() for block in blocks)

    def allocate(self, nbytes: int, stream: Any) -> torch.UntypedStorage:
        """Return uninitialized memory. It is freed when nothing refers to it.

        Raises:
            torch.OutOfMemoryError: If there is not enough.
        """
        block = self._cached_block(nbytes, stream) or self._new_block(nbytes, stream)
        owner = self._bytes[block.offset : block.offset + nbytes]
        Finalizer(owner, self._died.append, block)
        return torch.from_numpy(owner).untyped_storage()

    def block_of(self, tensor: torch.Tensor) -> Block:
        """Return the block that a tensor of this memory lives in."""
        return self._blocks[tensor.untyped_storage().data_ptr() - self._address]

    def collect(self, record: Callable[[Any], Completes]) -> list[Block]:
        """Make the blocks of tensors that have died ready for reuse.

        Args:
            record: Returns an event that completes when all operations that are enqueued on a stream now are done.

        Returns:
            The blocks that became free.
        """
        while self._died:
            block = self._died.popleft()
            # Recorded only now, as CUDA's allocator does it: what a user has enqueued until here is waited for.
            block.events = [record(stream) for stream in block.users]
            self._pending.append(block)
        free = [block for block in self._pending if all(event.completed for event in block.events)]
        for block in free:
            self._pending.remove(block)
            block.users.clear()
            block.events.clear()
            self._cached.setdefault(block.stream, []).append(block)
        return free

    @property
    def storage(self) -> torch.UntypedStorage:
        """The whole memory. A tensor over it does not keep its block from being allocated again."""
        return self._storage

    def offset_of(self, tensor: torch.Tensor) -> int:
        """Return where a tensor of this memory begins, in bytes."""
        return tensor.data_ptr() - self._address

    def _cached_block(self, nbytes: int, stream: Any) -> Block | None:
        """Take the smallest block of the stream that is large enough, the one freed last if there are several."""
        cached = self._cached.get(stream, [])
        fitting = [block for block in cached if block.nbytes >= nbytes]
        if not fitting:
            return None
        block = min(reversed(fitting), key=lambda block: block.nbytes)
        cached.remove(block)
        return block

    def _new_block(self, nbytes: int, stream: Any) -> Block:
        size = -(-nbytes // _GRAIN_BYTES) * _GRAIN_BYTES
        if self._unused + size > self._bytes.size:
            raise torch.OutOfMemoryError(
                f"the simulated device is out of memory: {nbytes} bytes were asked for, {self.allocated_bytes} of "
                f"{self._bytes.size} bytes are in use and {self.cached_bytes} are cached for reuse by one stream each"
            )
        block = self._blocks[self._unused] = Block(self._unused, size, stream)
        self._unused += size
        return block


class TensorReference:
    """Where a tensor is, as a device's queue knows it. It does not keep the tensor alive.

    Args:
        tensor: Any dense tensor.
        memory: The device memory that it is in; None for host memory.
    """

    __slots__ = ("_conjugate", "_dtype", "_memory", "_negative", "_offset", "_size", "_storage", "_stride")

    def __init__(self, tensor: torch.Tensor, memory: DeviceMemory | None) -> None:
        self._dtype, self._size, self._stride = tensor.dtype, tuple(tensor.shape), tensor.stride()
        self._conjugate, self._negative = tensor.is_conj(), tensor.is_neg()
        self._memory = memory
        self._storage: Any = None
        if memory is None:
            self._storage = _weak_reference(tensor.untyped_storage())
            self._offset = int(tensor.storage_offset())
        else:
            self._offset = memory.offset_of(tensor) // tensor.dtype.itemsize

    def tensor(self) -> torch.Tensor | None:
        """Return a tensor over the memory that is there now; None if it was in host memory that is gone."""
        # Device memory is always there: as on a device, it may have another owner now.
        if 0 in self._size:
            return torch.empty_strided(self._size, self._stride, dtype=self._dtype, device="cpu")
        if self._memory is not None:
            storage: torch.UntypedStorage | None = self._memory.storage
        else:
            storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            return None
        tensor = torch.empty(0, dtype=self._dtype, device="cpu").set_(storage, self._offset, self._size, self._stride)
        if self._conjugate:
            tensor = tensor.conj()
        return torch._neg_view(tensor) if self._negative else tensor
