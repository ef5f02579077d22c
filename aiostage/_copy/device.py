"""Copying a batch from a device to an arena: few launches, in stream order, and never into memory given away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from aiostage._capture.faithful import Spec
from aiostage._capture.plan import Batch
from aiostage.abc import Backend, SupportsQuery

__all__ = ["DeviceCopy", "Flight", "Moment"]

_PACKED_BYTES = 64 * 1024
"""Up to this size leaves are gathered on their device first: a copy of its own costs about as much as moving this many
bytes at 10 GB/s does, and copies of pieces below some 28 KiB were reported to collapse altogether."""


class Moment:
    """What was enqueued on the caller's current streams when it called, on every device that a tree may touch.

    Args:
        backend: How to reach accelerators.
    """

    __slots__ = ("events",)

    def __init__(self, backend: Backend) -> None:
        self.events = {device: backend.record(backend.current_stream(device)) for device in backend.active_devices()}


@dataclass(slots=True)
class Flight:
    """Copies that a device has been told to make, and everything that must outlive them.

    Attributes:
        event: Completes when they are done.
        device: Which device.
        nbytes: How many bytes they bring.
        number: Of the batch.
        keep: Sources, temporaries and the lease.
    """

    event: SupportsQuery
    device: torch.device
    nbytes: int
    number: int
    keep: list[object] = field(repr=False)


class DeviceCopy:
    """The copies of one batch, ready to be enqueued from a worker thread.

    Args:
        batch: What to copy.
        tensors: The source leaves.
        staged: Their staged copies, built where the batch needs them.
        specs: Of the leaves.
        memory: One-dimensional uint8, the whole arena.
    """

    def __init__(
        self,
        batch: Batch,
        tensors: Sequence[torch.Tensor],
        staged: Sequence[torch.Tensor],
        specs: Sequence[Spec | None],
        memory: np.ndarray[Any, Any],
    ) -> None:
        self._batch = batch
        self._memory = memory
        self._packs: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
        self._destinations: list[torch.Tensor] = []
        self._sources: list[torch.Tensor] = []
        offset = batch.start
        pack: list[torch.Tensor] = []
        pack_spec: Spec | None = None
        for index in batch.whole:
            spec = specs[index]
            assert spec is not None  # noqa: S101 - a plan places leaves with memory only
            small = spec.nbytes <= _PACKED_BYTES and spec.target is spec.dtype and not spec.by_value
            if pack and not (small and pack_spec is not None and spec.dtype is pack_spec.dtype):
                self._add_pack(pack, offset)
                pack = []
            if small:
                if not pack:
                    offset = staged[index].data_ptr() - memory.ctypes.data
                    pack_spec = spec
                pack.append(tensors[index].detach().reshape(-1))
            else:
                self._destinations.append(staged[index])
                self._sources.append(tensors[index].detach())
        if pack:
            self._add_pack(pack, offset)
        for piece in batch.pieces:
            spec, tensor = specs[piece.index], tensors[piece.index]
            assert spec is not None  # noqa: S101 - a plan has pieces of leaves with memory only
            stop = piece.offset + piece.length * spec.target.itemsize
            destination = torch.from_numpy(memory[piece.offset : stop])
            if spec.target is spec.dtype and not spec.by_value:
                size = spec.dtype.itemsize
                source = torch.empty(0, dtype=torch.uint8, device=tensor.device)
                begin = (tensor.storage_offset() + piece.start) * size
                source.set_(tensor.untyped_storage(), begin, (piece.length * size,), (1,))
            else:
                destination = destination.view(spec.target)
                first = tensor.storage_offset() + piece.start
                source = tensor.detach().as_strided((piece.length,), (1,), first)
            self._destinations.append(destination)
            self._sources.append(source)

    def _add_pack(self, sources: list[torch.Tensor], offset: int) -> None:
        """Note leaves in consecutive slots that are to be gathered first."""
        dtype = sources[0].dtype
        nbytes = sum(source.numel() for source in sources) * dtype.itemsize
        if len(sources) == 1:
            self._sources.append(sources[0])
            self._destinations.append(torch.from_numpy(self._memory[offset : offset + nbytes]).view(dtype))
            return
        self._packs.append((torch.from_numpy(self._memory[offset : offset + nbytes]).view(dtype), sources))

    def enqueue(self, backend: Backend, stream: Any, number: int, lease: object) -> tuple[Flight, int, int]:
        """Tell the device to copy.

        Args:
            backend: How to reach the device.
            stream: A side stream of the batch's device that waits for the caller's work already.
            number: Of the batch.
            lease: Kept until the copies are done.

        Returns:
            The copies under way, how many copies those are, and how many operations were enqueued in all.
        """
        device = self._batch.device
        assert device is not None  # noqa: S101 - host batches are copied by HostCopy
        launches = 0
        keep: list[object] = [lease, self._memory, self._sources]
        destinations, sources = list(self._destinations), list(self._sources)
        for destination, parts in self._packs:
            flat, packed = backend.pack(parts, stream)
            launches += packed
            destinations.append(destination)
            sources.append(flat)
            keep += (flat, parts)
            for part in parts:
                backend.keep(part, stream)
        launches += backend.copy(destinations, sources, stream)
        for source in sources:
            backend.keep(source, stream)
        event = backend.record(stream)
        nbytes = self._batch.stop - self._batch.start
        return Flight(event, device, nbytes, number, keep), len(destinations), launches
