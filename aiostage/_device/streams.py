"""After the caller, beside the caller: the moment of a call, and streams for copies that follow it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from aiostage.abc import Backend, SupportsQuery

__all__ = ["Moment", "SideStreams"]


class Moment:
    """What the caller had enqueued when it called: one event on its current stream of every active device.

    Made by :meth:`record`, which has to run in the caller's thread and before anything is awaited; used from any
    thread afterwards.
    """

    __slots__ = ("_backend", "_events")

    def __init__(self, backend: Backend, events: Mapping[torch.device, SupportsQuery]) -> None:
        self._backend = backend
        self._events = events

    @classmethod
    def record(cls, backend: Backend) -> Moment:
        """Record the calling thread's moment. Costs some microseconds a device, and nothing before one is used."""
        return cls(
            backend, {device: backend.record(backend.current_stream(device)) for device in backend.active_devices()}
        )

    @property
    def events(self) -> Mapping[torch.device, SupportsQuery]:
        """The event of each device."""
        return MappingProxyType(self._events)

    def order_before(self, stream: Any, device: torch.device) -> None:
        """Make later work of a stream wait, on the device, for what the caller had enqueued on that device.

        Args:
            stream: A stream of the device.
            device: Which one. PyTorch orders copies between devices on the current streams of both, so that the
                events of other devices say nothing about tensors on this one.
        """
        event = self._events.get(device)
        if event is None:
            # The device came into use after the call, so there is nothing of the caller's that was enqueued before it.
            event = self._backend.record(self._backend.current_stream(device))
        self._backend.wait(stream, event)


class SideStreams:
    """One stream for copies on each device, made when it is first asked for and then kept.

    Copies of several stagings share it: they would share the device's copy engine anyway, and in one stream the first
    comes first.

    Args:
        backend: Whose streams.
        low_priority: As :meth:`~aiostage.Backend.side_stream` takes it.
    """

    def __init__(self, backend: Backend, *, low_priority: bool = True) -> None:
        self._backend = backend
        self._low_priority = low_priority
        self._streams: dict[torch.device, Any] = {}

    def of(self, device: torch.device) -> Any:
        """Return the side stream of a device."""
        stream = self._streams.get(device)
        if stream is None:
            # Should two threads meet here, both get the stream of the first; a stream that nobody uses costs nothing.
            made = self._backend.side_stream(device, low_priority=self._low_priority)
            stream = self._streams.setdefault(device, made)
        return stream

    def forget(self, device: torch.device) -> None:
        """Make a new stream for a device next time: on the one there was, something has failed."""
        self._streams.pop(device, None)
