"""The streams and events of a simulated device: queues of operations, and which of them wait for which."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

import torch

from aiostage.testing.device_memory import DeviceMemory

__all__ = ["Device", "Operation", "Queues", "SimulatedDeviceError", "SimulatedEvent", "SimulatedStream"]


class SimulatedDeviceError(RuntimeError):
    """An operation of a simulated device has failed. The cause says why, unless a test asked for the failure."""

    def again(self) -> SimulatedDeviceError:
        """Return an equal error to raise. Each raise of one object would make its traceback longer."""
        error = SimulatedDeviceError(*self.args)
        error.__cause__ = self.__cause__
        return error


class Queues(Protocol):
    """The interface of the scheduler for streams and events."""

    def enqueue(self, stream: SimulatedStream, operation: Operation) -> None:
        """Put an operation at the end of a stream's queue."""

    def polled(self) -> None:
        """Count a query, and let a spontaneous device execute something."""

    def synchronize(self, done: Callable[[], bool]) -> None:
        """Block until a condition holds."""

    def current_stream(self, device: torch.device) -> SimulatedStream:
        """Return the calling thread's current stream of a device."""

    def enter(self, device: torch.device, stream: SimulatedStream | None = None) -> None:
        """Make a device, and a stream of it, current in the calling thread."""

    def leave(self) -> None:
        """Undo the last :meth:`enter` of the calling thread."""


@dataclass(eq=False)
class Device:
    """One simulated device.

    Attributes:
        device: Its name for PyTorch.
        memory: Its memory.
        in_use: Whether the process has used it.
        error: Why everything on it fails, if it does.
        engine_free_at: For each copy engine, when it has done all that it was given.
    """

    device: torch.device
    memory: DeviceMemory
    in_use: bool = False
    error: SimulatedDeviceError | None = None
    engine_free_at: dict[str, float] = field(default_factory=dict)

    def check(self) -> None:
        """Raise if it has failed."""
        if self.error is not None:
            raise self.error.again()


@dataclass(eq=False, slots=True, kw_only=True)
class Operation:
    """One entry in the queue of a stream.

    Attributes:
        name: For messages.
        seconds: How long it takes.
        run: Does its work.
        completes: The event that it completes.
        waits_for: The event that has to complete before the operations after this one may start.
        engine: The copy engine that it uses.
        moved_bytes: How many bytes it moves over the bus, if there is one.
        enqueued_at: When it was enqueued. It cannot start before.
        done: Which part of it is done, from 0 to 1, at the last time of the bus.
    """

    name: str
    seconds: float = 0.0
    run: Callable[[], object] | None = None
    completes: SimulatedEvent | None = None
    waits_for: SimulatedEvent | None = None
    engine: str | None = None
    moved_bytes: int = 0
    enqueued_at: float = 0.0
    done: float = 0.0


class SimulatedEvent:
    """An event, like ``torch.Event``. It completes when all operations that were enqueued before it are done.

    It is recorded once, by :meth:`SimulatedStream.record_event`.
    """

    def __init__(self, stream: SimulatedStream, *, fails: bool) -> None:
        self._stream = stream
        self._fails = fails
        self.completed_at: float | None = None
        self.error: SimulatedDeviceError | None = None

    def __repr__(self) -> str:
        state = "pending" if self.completed_at is None else f"completed at {self.completed_at:.9g} s"
        return f"<SimulatedEvent of {self._stream.name}, {state}>"

    @property
    def device(self) -> torch.device:
        """The device of its stream."""
        return self._stream.device

    @property
    def completed(self) -> bool:
        """Whether it is done or has failed. This does not count as a query and does not raise."""
        return self.completed_at is not None

    def query(self) -> bool:
        """Return whether it is done.

        Raises:
            SimulatedDeviceError: If an operation before it has failed, or the device.
        """
        self._stream.queues.polled()
        if (error := self._stream.on.error or self.error) is not None:
            raise error.again()
        if self._fails and self.completed:
            raise SimulatedDeviceError(f"an event of {self._stream.name} failed, as the test wanted")
        return self.completed

    def wait(self, stream: SimulatedStream | None = None) -> None:
        """Make later work of a stream, by default the thread's current one, wait for the event."""
        (stream or self._stream.queues.current_stream(self.device)).wait_event(self)

    def synchronize(self) -> None:
        """Block until it is done; on a virtual clock, execute until it is."""
        self._stream.queues.synchronize(lambda: self.completed)
        self.query()

    def complete(self, when: float, error: SimulatedDeviceError | None) -> None:
        """Complete it. The scheduler calls this when all operations before it are done, or one of them has failed."""
        self.error = error
        self.completed_at = when


class SimulatedStream:
    """An in-order queue of a simulated device. Like ``torch.Stream``; ``with stream:`` makes it current."""

    def __init__(self, queues: Queues, on: Device, number: int, *, low_priority: bool = False) -> None:
        self.queues = queues
        self.on = on
        self.name: str = f"stream {number} of {on.device}"
        self.low_priority = low_priority
        self.queue: deque[Operation] = deque()
        self.time: float = 0.0
        """When its last operation ended."""
        self.error: SimulatedDeviceError | None = None

    def __repr__(self) -> str:
        return f"<SimulatedStream {self.name}: {', '.join(operation.name for operation in self.queue) or 'idle'}>"

    @property
    def device(self) -> torch.device:
        """Its device."""
        return self.on.device

    def query(self) -> bool:
        """Return whether everything enqueued so far is done.

        Raises:
            SimulatedDeviceError: If some of it has failed.
        """
        self.queues.polled()
        if (error := self.on.error or self.error) is not None:
            raise error.again()
        return not self.queue

    def synchronize(self) -> None:
        """Block until everything enqueued so far is done; on a virtual clock, execute until it is."""
        self.record_event().synchronize()

    def record_event(self, *, fails: bool = False) -> SimulatedEvent:
        """Return an event that completes when everything enqueued so far is done; ``fails`` makes only it fail."""
        event = SimulatedEvent(self, fails=fails)
        self.queues.enqueue(self, Operation(name="event", completes=event))
        return event

    def wait_event(self, event: SimulatedEvent) -> None:
        """Make later work of this stream wait for an event."""
        self.queues.enqueue(self, Operation(name=f"wait for {event!r}", waits_for=event))

    def wait_stream(self, stream: SimulatedStream) -> None:
        """Make later work of this stream wait for everything enqueued so far on another."""
        self.wait_event(stream.record_event())

    def __enter__(self) -> SimulatedStream:
        self.queues.enter(self.device, self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.queues.leave()
