"""After the caller, beside the caller: the moment of a call, and streams for copies that follow it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from aiostage.abc import Backend, SupportsQuery

__all__ = ["Moment", "SideStreams"]


class Moment:
    """What the caller had enqueued when it called: an event on its current stream of every active device.

    Made by :meth:`record`, which has to run in the caller's thread and before anything is awaited; used from any
    thread afterwards.
    """

    __slots__ = ("_backend", "_events")

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._events: dict[torch.device, list[tuple[Any, SupportsQuery]]] = {}

    @classmethod
    def record(cls, backend: Backend) -> Moment:
        """Record the calling thread's moment. Costs some microseconds a device, and nothing before one is used."""
        moment = cls(backend)
        moment.renew()
        return moment

    def renew(self) -> None:
        """Move the moment to now: on the streams it was recorded on, and on those that are current by now."""
        for device in self._backend.active_devices():
            streams = [stream for stream, _ in self._events.get(device, ())]
            current = self._backend.current_stream(device)
            if current not in streams:
                streams.append(current)
            self._events[device] = [(stream, self._backend.record(stream)) for stream in streams]

    @property
    def events(self) -> Mapping[torch.device, Sequence[SupportsQuery]]:
        """The events of each device."""
        return {device: [event for _, event in recorded] for device, recorded in self._events.items()}

    def order_before(self, stream: Any, device: torch.device) -> None:
        """Make later work of a stream wait, on the device, for what the caller had enqueued on that device.

        Args:
            stream: A stream of the device.
            device: Which one. PyTorch orders copies between devices on the current streams of both, so that the
                events of other devices say nothing about tensors on this one.
        """
        events = self.events.get(device)
        if events is None:
            # The device came into use after the call, so there is nothing of the caller's that was enqueued before it.
            events = [self._backend.record(self._backend.current_stream(device))]
        for event in events:
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

    def forget(self, device: torch.device, stream: Any) -> None:
        """Make a new stream for a device next time, if it still is this one, on which something has failed."""
        if self._streams.get(device) is stream:
            self._streams.pop(device, None)
