"""Decides which operation of a simulated accelerator comes next, and executes it.

An operation may come next if it is at the head of its stream's queue and waits for no event. On a virtual clock the
test executes one at a time, in an order that it or a seed chooses. In real time, a thread executes them when they are
due.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from time import perf_counter

import torch

from aiostage.testing.bus import Bus
from aiostage.testing.clock import VirtualClock
from aiostage.testing.streams import Device, Operation, SimulatedDeviceError, SimulatedStream

__all__ = ["Scheduler"]

_IDLE_SECONDS = 1.0
"""How long the thread of a device in real time waits for work before it ends. The next operation starts another."""

_SPONTANEOUS_STEPS = (0, 0, 1, 1, 2, 4)
"""A spontaneous device executes one of these numbers of operations at a call, at random. Guesses: often few, so that
queues grow and there are orders to choose from; more than one in the mean, so that polling comes to an end."""


class _Current(threading.local):
    """The current device of a thread and its current stream of each device, now and before each :meth:`enter`."""

    def __init__(self) -> None:
        self.device: torch.device | None = None
        self.streams: dict[torch.device, SimulatedStream] = {}
        self.before: list[tuple[torch.device | None, dict[torch.device, SimulatedStream]]] = []


class Scheduler:
    """Executes the operations of all streams: one at a time, and those of one stream in order.

    Args:
        clock: The virtual clock. None: execute in a thread and in real time.
        seed: Chooses among the streams that can continue. None: the operation that would be done first.
        spontaneous: Execute some operations, chosen by the seed, at each call.
        settle: Called, with the lock held, before anything is executed or enqueued.
        bus_bandwidth: The bandwidth of the bus of each device, in bytes a second; None for no bus.
    """

    def __init__(
        self,
        clock: VirtualClock | None,
        seed: int | None,
        *,
        spontaneous: bool,
        settle: Callable[[], None],
        bus_bandwidth: float | None,
    ) -> None:
        self.lock = threading.Condition()
        """Held while queues and memory are read or changed, and notified when they change. It is reentrant."""
        self.streams: list[SimulatedStream] = []
        self.queries = 0
        self._current = _Current()
        self._clock = clock
        self._random = random.Random(seed) if seed is not None else None
        self._spontaneous = spontaneous
        self._settle = settle
        self._bus_bandwidth = bus_bandwidth
        self._buses: dict[torch.device, Bus] = {}
        self._executing = threading.RLock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def add(self, on: Device, *, low_priority: bool = False) -> SimulatedStream:
        """Make a stream of a device; the first is the default one of all threads."""
        with self.lock:
            stream = SimulatedStream(self, on, len(self.streams), low_priority=low_priority)
            self.streams.append(stream)
            return stream

    @property
    def current_device(self) -> torch.device:
        """The calling thread's current device, the first one unless it has entered another."""
        return self._current.device or self.streams[0].device

    def current_stream(self, device: torch.device) -> SimulatedStream:
        """Return the calling thread's current stream of a device."""
        if device in self._current.streams:
            return self._current.streams[device]
        return next(stream for stream in self.streams if stream.device == device)

    def enter(self, device: torch.device, stream: SimulatedStream | None = None) -> None:
        """Make a device, and a stream of it, current in the calling thread."""
        current = self._current
        current.before.append((current.device, dict(current.streams)))
        current.device = device
        if stream is not None:
            current.streams[device] = stream

    def leave(self) -> None:
        """Undo the last :meth:`enter` of the calling thread."""
        current = self._current
        current.device, current.streams = current.before.pop()

    def now(self) -> float:
        """Return the time of the clock, in seconds."""
        return self._clock.time() if self._clock is not None else perf_counter()

    def enqueue(self, stream: SimulatedStream, operation: Operation) -> None:
        """Put an operation at the end of a stream's queue.

        Raises:
            SimulatedDeviceError: If the device has failed.
            RuntimeError: If the accelerator is closed.
        """
        self.progress()
        with self.lock:
            self._settle()
            if self._closed:
                raise RuntimeError("the simulated accelerator is closed")
            stream.on.check()
            self.append(stream, operation)

    def append(self, stream: SimulatedStream, operation: Operation) -> None:
        """Put an operation at the end of a stream's queue, with the lock held. Nothing else happens."""
        # The allocator's operations come through here when tensors die, also after the end. They are dropped.
        if self._closed:
            return
        stream.on.in_use = True
        operation.enqueued_at = self.now()
        stream.queue.append(operation)
        if self._clock is None and self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="simulated-accelerator", daemon=True)
            self._thread.start()
        self.lock.notify_all()

    def polled(self) -> None:
        """Count a query, and execute some operations if the device is a spontaneous one."""
        with self.lock:
            self.queries += 1
        self.progress()

    def progress(self) -> None:
        """Execute some operations, if the device is a spontaneous one."""
        if self._spontaneous and self._random is not None:
            with self.lock:
                steps = self._random.choice(_SPONTANEOUS_STEPS)
            for _ in range(steps):
                self.step()

    def ready(self) -> list[SimulatedStream]:
        """Return the streams whose next operation may be executed now."""
        with self.lock:
            self._settle()
            return [stream for stream in self.streams if self._pass_waits(stream)]

    def step(self, stream: SimulatedStream | None = None) -> bool:
        """Execute one operation: of the given stream, of one that the seed chooses, or the one that is due first.

        Returns:
            Whether there was one.

        Raises:
            ValueError: If the stream has none that can be executed now.
            RuntimeError: If it runs in real time.
        """
        if self._clock is None:
            raise RuntimeError("a simulated accelerator in real time cannot be stepped; give it a clock or a seed")
        # Two locks, always in this order. The first lets one operation run at a time, so that they complete in the
        # order of their times. The second is free while one runs, because the operation may take it in another thread.
        with self._executing:
            # With the lock from the look to the taking, because close() may clear the queues.
            with self.lock:
                ready = self.ready()
                if stream is None:
                    if not ready:
                        return False
                    stream = self._random.choice(ready) if self._random is not None else self._first(ready)
                elif stream not in ready:
                    raise ValueError(f"{stream!r} has nothing that can be executed now")
                operation, finish = self._take(stream, ready)
            self._perform(stream, operation, finish)
        return True

    def due(self) -> float | None:
        """Return when the next operation would be done, or None if there is none."""
        with self.lock:
            ready = self.ready()
            return self._finishes(ready)[self._first(ready)] if ready else None

    def happen(self) -> None:
        """Execute the operation that is due first."""
        self.step(self._first(self.ready()))

    def synchronize(self, done: Callable[[], bool]) -> None:
        """Block until a condition holds; on a virtual clock, execute until it does."""
        if self._clock is None:
            with self.lock:
                self.lock.wait_for(lambda: self._closed or done())
            return
        while not done():
            # step() also drops waits that are over. Then it may be done although there was nothing to execute.
            if not self.step() and not done():
                raise RuntimeError("nothing is left to be executed, and it is still not done")

    def close(self) -> None:
        """Drop what is enqueued, and end the thread."""
        with self.lock:
            self._closed = True
            for stream in self.streams:
                stream.queue.clear()
            self.lock.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _pass_waits(self, stream: SimulatedStream) -> bool:
        """Drop waits that are over from the head of a queue; return whether an operation is at the head then."""
        while stream.queue and (event := stream.queue[0].waits_for) is not None:
            if event.completed_at is None:
                return False
            stream.queue.popleft()
            stream.time = max(stream.time, event.completed_at)
            stream.error = stream.error or event.error
        return bool(stream.queue)

    def _finishes(self, ready: list[SimulatedStream]) -> dict[SimulatedStream, float]:
        """Return when the operation at the head of each queue would be done."""
        if self._bus_bandwidth is None:
            return {stream: self._finish(stream) for stream in ready}
        finishes: dict[SimulatedStream, float] = {}
        for device, streams in _by_device(ready).items():
            finishes |= self._bus(device).finishes(streams)
        return finishes

    def _bus(self, device: torch.device) -> Bus:
        assert self._bus_bandwidth is not None  # noqa: S101 - asked for only where there are buses
        return self._buses.setdefault(device, Bus(self._bus_bandwidth))

    def _finish(self, stream: SimulatedStream) -> float:
        """Return when the operation at the head of a queue would be done, where there is no bus."""
        operation = stream.queue[0]
        start = max(stream.time, operation.enqueued_at)
        if operation.engine is not None:
            start = max(start, stream.on.engine_free_at.get(operation.engine, 0.0))
        return start + operation.seconds

    def _first(self, ready: list[SimulatedStream]) -> SimulatedStream:
        finishes = self._finishes(ready)
        return min(ready, key=lambda stream: finishes[stream])

    def _take(self, stream: SimulatedStream, ready: list[SimulatedStream]) -> tuple[Operation, float]:
        finish = self._finishes(ready)[stream]
        if self._bus_bandwidth is not None:
            # Before the operation is taken out: until its end, it has shared the bus with the others.
            self._bus(stream.device).pass_time(_by_device(ready)[stream.device], finish)
        operation = stream.queue.popleft()
        if operation.engine is not None:
            stream.on.engine_free_at[operation.engine] = finish
        return operation, finish

    def _perform(self, stream: SimulatedStream, operation: Operation, finish: float) -> None:
        """Execute an operation without the lock, so that other threads can query meanwhile; then record its end."""
        error: SimulatedDeviceError | None = None
        if operation.run is not None and stream.error is None and stream.on.error is None:
            try:
                operation.run()
            except Exception as cause:
                error = SimulatedDeviceError(f"{operation.name} on {stream.name} failed: {cause}")
                # A device keeps the error until it recovers. Its traceback must not keep memory of the operation.
                error.__cause__ = cause.with_traceback(None)
        with self.lock:
            stream.error = stream.error or error
            stream.time = finish
            if self._clock is not None:
                self._clock.move_to(finish)
            if operation.completes is not None:
                operation.completes.complete(finish, stream.error)
            self.lock.notify_all()

    def _serve(self) -> None:
        """Execute in real time, until there has been nothing to do for a while."""
        while True:
            with self.lock:
                ready = self.ready()
                if self._closed:
                    return
                if not ready:
                    # Waits that are not over are work too: the event of another stream will end them.
                    if not self.lock.wait(_IDLE_SECONDS) and not any(stream.queue for stream in self.streams):
                        self._thread = None
                        return
                    continue
                stream = self._first(ready)
                remaining = self._finishes(ready)[stream] - self.now()
                if remaining > 0:
                    # Then look again: an operation that was enqueued meanwhile may be due before this one.
                    self.lock.wait(remaining)
                    continue
                operation, finish = self._take(stream, ready)
            self._perform(stream, operation, finish)


def _by_device(streams: list[SimulatedStream]) -> dict[torch.device, list[SimulatedStream]]:
    grouped: dict[torch.device, list[SimulatedStream]] = {}
    for stream in streams:
        grouped.setdefault(stream.device, []).append(stream)
    return grouped
