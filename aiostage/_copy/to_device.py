"""Copies from host memory into live tensors on devices."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from aiostage._copy.pending import PendingCopies, PendingCopy
from aiostage._device.bits import without_bits, writing_to
from aiostage._device.streams import CallerStreams, CopyStreams
from aiostage._loop.coroutines import Closing
from aiostage.abc import Backend

__all__ = ["HostToDeviceCopier", "TensorCopy"]


class TensorCopy:
    """Copies of tensors into others.

    Args:
        destinations: On the device, or in host memory.
        sources: In host memory, kept alive until the copies have been made; or on the device.
        device: Which one.
    """

    number = 0

    def __init__(
        self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], device: torch.device
    ) -> None:
        self.device = device
        self.nbytes = sum(source.nbytes for source in sources)
        self.copies = len(sources)
        self.launches = 0
        self._destinations, self._sources = destinations, sources

    def enqueue(self, backend: Backend, stream: Any) -> None:
        """Tell the device to copy."""
        # In host memory what is copied by value is made here, and kept alive with the rest; on a device the backend
        # makes it, in the order of the stream.
        pairs = [
            without_bits(*pair) if pair[1].is_cpu else pair
            for pair in zip(self._destinations, self._sources, strict=True)
        ]
        self._destinations, self._sources = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        with writing_to(self._destinations):
            self.launches = backend.copy(self._destinations, self._sources, stream)
        for tensor in (*self._destinations, *self._sources):
            if backend.device_of(tensor) is not None:
                backend.keep(tensor, stream)

    def take_memory(self) -> list[object]:
        """Return what must outlive the copies."""
        return [self._destinations, self._sources]


class HostToDeviceCopier(PendingCopies):
    """Copies to devices: after what the caller had enqueued, and before what it enqueues once they are known of.

    Args:
        backend: How to reach the devices.
        streams: Where to copy.
        caller: What the copies follow.
        closing: The state of the stager. Once it is closed, all waits for them end; None where there is none.
    """

    def __init__(
        self, backend: Backend, streams: CopyStreams, caller: CallerStreams, closing: Closing | None = None
    ) -> None:
        super().__init__(backend, streams, caller, closing)
        self._not_ordered: list[PendingCopy] = []

    def _added(self, copy: PendingCopy) -> None:
        self._not_ordered.append(copy)

    async def wait(self, copy: PendingCopy) -> None:
        """Make later work of the caller's wait for all copies so far, and wait for some of them.

        Args:
            copy: For which to wait.

        Raises:
            StagingError: If the device has failed.
            StagerClosedError: If the stager is closed; later work waits for the copies all the same.

        Cancelling changes nothing.
        """
        self._order()
        # Ordered before the wait and not after it: a caller that is cancelled while it waits goes on, and its next step
        # must come behind the copies all the same.
        await super().wait(copy)
        # A load has thousands.
        with self._lock, suppress(ValueError):
            self._in_order.remove(copy)

    async def wait_for_all(self) -> None:
        """Wait like :meth:`wait` for all copies."""
        for copy in self:
            await self.wait(copy)

    def abandon(self) -> None:
        """Let what is still under way, after a failure, be watched over by a thread. Otherwise nothing is."""
        with suppress(Exception):
            self._order()
        super().abandon()

    def _order(self) -> None:
        while self._not_ordered:
            copy = self._not_ordered[0]
            # Taken out of the list only afterwards: if the device refuses, abandon() tries again. On the event loop
            # only; threads append at the other end, which is one operation of a list.
            self._caller.order_after(copy.event, copy.on.device)
            self._not_ordered.remove(copy)
