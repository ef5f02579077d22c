"""Copies from host memory into live tensors on devices."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from aiostage._copy.device import PendingCopy
from aiostage._copy.pending import in_flight, wait_until_copied
from aiostage._device.bits import without_bits, writing_to
from aiostage._device.streams import CallerStreams, CopyStreams
from aiostage._loop.closing import Closing
from aiostage._loop.transfers import BandwidthEstimator
from aiostage.abc import Backend

__all__ = ["HostToDeviceCopier"]


class HostToDeviceCopier:
    """Copies to devices: after what the caller had enqueued, and before what it enqueues once they are known of.

    Args:
        backend: How to reach the devices.
        streams: Where to copy.
        caller: What the copies follow.
        bandwidth: Where to announce the copies.
        closing: Of the stager, after which all waits for them end; None where there is none.
    """

    def __init__(
        self,
        backend: Backend,
        streams: CopyStreams,
        caller: CallerStreams,
        bandwidth: BandwidthEstimator,
        closing: Closing | None = None,
    ) -> None:
        self._backend = backend
        self._streams = streams
        self._bandwidth = bandwidth
        self._closing = closing
        self._caller = caller
        self._beside: dict[torch.device, Any] = {}
        self._pending: list[PendingCopy] = []
        self._not_ordered: list[PendingCopy] = []
        self._count = 0

    def follow_the_caller(self, device: torch.device) -> None:
        """Make the copies to a device wait for the caller's moment."""
        if device not in self._beside:
            # Asked for once: after a failure elsewhere the next answer is another stream, which waits for nothing.
            stream = self._streams.of(device)
            self._caller.order_before(stream, device)
            self._beside[device] = stream

    def enqueue(
        self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], device: torch.device
    ) -> PendingCopy:
        """Tell a device to copy; runs in a worker thread.

        Args:
            destinations: On the device, which follows the caller already; or in host memory.
            sources: In host memory, kept alive until the copies have been made; or on the device.
            device: Which one.

        Returns:
            The copies under way, for :meth:`wait`.
        """
        stream, launches = self._beside[device], 0
        # In host memory what is copied by value is made here, and kept alive with the rest; on a device the backend
        # makes it, in the order of the stream.
        pairs = [without_bits(*pair) if pair[1].is_cpu else pair for pair in zip(destinations, sources, strict=True)]
        destinations, sources = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        try:
            with writing_to(destinations):
                launches = self._backend.copy(destinations, sources, stream)
            for tensor in (*destinations, *sources):
                if self._backend.device_of(tensor) is not None:
                    self._backend.keep(tensor, stream)
        except Exception:
            # Some of it may be under way. Should that not even be recorded, the device has failed and copies no more.
            with suppress(Exception):
                self._record(destinations, sources, device, launches)
            raise
        return self._record(destinations, sources, device, launches)

    def _record(
        self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], device: torch.device, launches: int
    ) -> PendingCopy:
        stream = self._beside[device]
        event = self._backend.record(stream)
        nbytes = sum(source.nbytes for source in sources)
        keep: list[object] = [destinations, sources]
        transfer = self._bandwidth.announce((device, "to device"), nbytes, stream)
        self._count += 1
        copy = PendingCopy(event, transfer, device, nbytes, self._count, len(sources), launches, keep)
        in_flight.add(copy)
        self._pending.append(copy)
        self._not_ordered.append(copy)
        return copy

    async def wait(self, copy: PendingCopy | None = None) -> None:
        """Make later work of the caller's wait for the copies, and wait for them too. Cancelling changes nothing.

        Args:
            copy: For which to wait; None for all.

        Raises:
            StagingError: If the device has failed.
            StagerClosedError: If the stager is closed; later work waits for the copies all the same.
        """
        self._order()
        for each in tuple(self._pending) if copy is None else (copy,):
            await wait_until_copied(each, self._streams, self._closing)
            # Another may have waited for the same one.
            if each in self._pending:
                self._pending.remove(each)

    def abandon(self) -> None:
        """Let what is still under way, after a failure, be watched over by a thread. Otherwise nothing is."""
        with suppress(Exception):
            self._order()
        in_flight.orphan(self._pending)

    def _order(self) -> None:
        while self._not_ordered:
            copy = self._not_ordered[0]
            self._caller.order_after(copy.event, copy.device)
            self._not_ordered.remove(copy)
