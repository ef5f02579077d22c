"""A simulated accelerator that makes races visible: it can execute enqueued operations in every legal order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch

from aiostage.errors import shown
from aiostage.testing.backend import FailureKind, SimulatedBackend, count_change
from aiostage.testing.clock import VirtualClock
from aiostage.testing.streams import SimulatedDeviceError, SimulatedEvent, SimulatedStream

__all__ = [
    "SimulatedAccelerator",
    "SimulatedDeviceError",
    "SimulatedEvent",
    "SimulatedHazardError",
    "SimulatedStatistics",
    "SimulatedStream",
]


class SimulatedHazardError(AssertionError):
    """Something happened that on a real device would have used memory that is no longer the caller's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedStatistics:
    """What a simulated accelerator has been asked to do so far, and what it holds now.

    Attributes:
        kernels: Kernels launched.
        packs: Calls of ``pack``. Each enqueues one kernel.
        copies: Tensors in enqueued copies.
        pinned_copies: Those of them whose host memory was registered.
        copied_bytes: Their size in bytes.
        queries: How often an event or a stream was queried.
        pending: Operations that are enqueued and not executed yet.
        allocated_bytes: Device memory in use.
        cached_bytes: Device memory that was freed and is kept for its stream.
        registered_bytes: Host memory that is registered now.
    """

    kernels: int
    packs: int
    copies: int
    pinned_copies: int
    copied_bytes: int
    queries: int
    pending: int
    allocated_bytes: int
    cached_bytes: int
    registered_bytes: int


class SimulatedAccelerator(SimulatedBackend):
    """Devices made of host memory and queues, with streams, events, a caching allocator and failures on demand.

    An enqueued operation refers to memory and keeps nothing alive. It reads and writes that memory when it is executed.
    Therefore a missing wait, or memory that is freed or used again too early, gives wrong bytes here as on a device,
    and more reliably: on a virtual clock, operations are executed one at a time and in any order that streams and
    events allow. A seed or the test chooses the order.

    Use it as a context manager, so that hazards which leave no wrong bytes behind are raised at the end.

    Args:
        devices: How many.
        clock: Execute on this clock, when the test steps or advances it. None: in real time, in a thread, unless there
            is a seed.
        seed: Execute on a virtual clock, and choose at random among the streams that can continue. None: the operation
            that would be done first comes first.
        spontaneous: Execute a few operations, chosen by the seed, whenever anything is enqueued or queried, so that
            the test need not call ``step``. Needs a seed.
        bandwidth: The bandwidth of a copy, in bytes a second. Each direction of each device has this bandwidth.
        bus_bandwidth: The bandwidth that everything on one device shares, in bytes a second: copies of both directions,
            of which several may then run at once, and kernels with ``moved_bytes``. None: there is no bus.
        latency: The latency of each copy, in seconds.
        memory_bytes: Memory of each device.
        max_registered_bytes: How much host memory can be registered at a time. None: any amount.
        poison_freed: Overwrite freed memory, in the order of the stream that it was allocated for. The next allocation
            of that stream could do the same.

    Raises:
        ValueError: If there is no device, the bus has no bandwidth, or ``spontaneous`` has no seed.
    """

    def __init__(
        self,
        devices: int = 1,
        *,
        clock: VirtualClock | None = None,
        seed: int | None = None,
        spontaneous: bool = False,
        bandwidth: float = 25e9,
        bus_bandwidth: float | None = None,
        latency: float = 10e-6,
        memory_bytes: int = 1 << 30,
        max_registered_bytes: int | None = None,
        poison_freed: bool = True,
    ) -> None:
        if devices < 1:
            raise ValueError(f"a simulated accelerator has 1 device or more, not {shown(devices)}")
        if bus_bandwidth is not None and not bus_bandwidth > 0:
            raise ValueError(f"bus_bandwidth is above 0 bytes a second, or None, not {shown(bus_bandwidth)}")
        if spontaneous and seed is None:
            raise ValueError("spontaneous=True needs a seed to choose by")
        self._clock = VirtualClock() if clock is None and seed is not None else clock
        super().__init__(
            devices,
            self._clock,
            seed,
            spontaneous=spontaneous,
            bandwidth=bandwidth,
            latency=latency,
            memory_bytes=memory_bytes,
            max_registered_bytes=max_registered_bytes,
            poison_freed=poison_freed,
            bus_bandwidth=bus_bandwidth,
        )
        if self._clock is not None:
            self._clock.attach(self._scheduler)
        self._kernels = 0

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Its devices, used or not."""
        return tuple(self._devices)

    @property
    def clock(self) -> VirtualClock:
        """The virtual clock that it runs on.

        Raises:
            RuntimeError: If it runs in real time.
        """
        if self._clock is None:
            raise RuntimeError("this simulated accelerator runs in real time")
        return self._clock

    @property
    def violations(self) -> tuple[str, ...]:
        """Operations that would have written to, or read, memory that is gone."""
        return tuple(self._violations)

    def statistics(self) -> SimulatedStatistics:
        """Return what it has been asked to do so far, and what it holds now."""
        with self._scheduler.lock:
            self._settle()
            memories = [device.memory for device in self._devices.values()]
            return SimulatedStatistics(
                kernels=self._kernels,
                packs=self._packs,
                copies=self._copies,
                pinned_copies=self._pinned_copies,
                copied_bytes=self._copied_bytes,
                queries=self._scheduler.queries,
                pending=sum(len(stream.queue) for stream in self._scheduler.streams),
                allocated_bytes=sum(memory.allocated_bytes for memory in memories),
                cached_bytes=sum(memory.cached_bytes for memory in memories),
                registered_bytes=sum(self._registered.values()),
            )

    def empty(self, *size: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> torch.Tensor:
        """Allocate an uninitialized tensor for the current stream. Often it gets the memory that was freed last.

        Args:
            size: Its shape.
            dtype: Its dtype.
            device: The device; None is the thread's current one.

        Raises:
            torch.OutOfMemoryError: If the device has no room.
        """
        stride = torch.empty(size, device="meta").stride()
        return self._allocate(size, stride, dtype, self._stream(device))

    def to_device(self, tensor: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
        """Copy a host tensor to a device, on the current stream. The host tensor may change at once.

        Args:
            tensor: A tensor in host memory.
            device: The device; None is the thread's current one.

        Returns:
            A tensor with the same strides and without autograd history. Its values are there when the stream has
            executed the copy.

        Raises:
            torch.OutOfMemoryError: If the device has no room.
        """
        stream = self._stream(device)
        # A copy that only the operation refers to, so that the caller may change or drop the tensor.
        value = tensor.detach().clone()
        copied = self._allocate(value.shape, value.stride(), value.dtype, stream)
        self._enqueue_kernel(
            "upload",
            lambda target: target.copy_(value),
            [self._reference(copied, stream)],
            self._copy_seconds(value.nbytes),
            stream,
            value.nbytes,
        )
        return copied

    def launch(
        self,
        kernel: Callable[..., object],
        *writes: torch.Tensor,
        reads: Sequence[torch.Tensor] = (),
        seconds: float = 0.0,
        moved_bytes: int = 0,
        stream: SimulatedStream | None = None,
    ) -> None:
        """Enqueue a kernel. As with PyTorch's own operations, the versions of the tensors that it writes increase now.

        Args:
            kernel: Called when it is executed, with ``writes`` and then ``reads`` as plain tensors over their memory.
                An exception fails the stream.
            *writes: Device tensors that it changes.
            reads: Device tensors that it only reads.
            seconds: How long it takes alone.
            moved_bytes: How many bytes it moves over the device's bus meanwhile, if there is one.
            stream: The stream; None is the current one of the first tensor's device, or of the current device.

        Raises:
            ValueError: If a tensor is not on the device of the stream.
        """
        tensors = (*writes, *reads)
        if stream is None:
            stream = self._stream(self.device_of(tensors[0]) if tensors else None)
        # References, as on a device: if a tensor dies before the kernel runs, the kernel uses what is there then.
        references = [self._reference(tensor, stream) for tensor in tensors]
        count_change(writes)
        self._enqueue_kernel("kernel", kernel, references, seconds, stream, moved_bytes)
        with self._scheduler.lock:
            self._kernels += 1

    def ready(self) -> list[SimulatedStream]:
        """Return the streams whose next operation may be executed now."""
        return self._scheduler.ready()

    def step(self, stream: SimulatedStream | None = None) -> bool:
        """Execute one operation, on a virtual clock.

        Args:
            stream: The stream whose operation to run; None lets the seed choose, or takes the operation that is due
                first.

        Returns:
            Whether there was one.

        Raises:
            ValueError: If the stream has none that could be executed now.
            RuntimeError: If it runs in real time.
        """
        return self._scheduler.step(stream)

    def synchronize(self) -> None:
        """Block until nothing is left in any queue; on a virtual clock, execute it all."""
        self._scheduler.synchronize(lambda: not any(stream.queue for stream in self._scheduler.streams))

    def close(self) -> None:
        """Drop what is enqueued and end the thread, if there is one. May be called again; tensors stay valid."""
        self._scheduler.close()
        if self._clock is not None:
            self._clock.detach(self._scheduler)

    def __enter__(self) -> SimulatedAccelerator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        if error is None and self._violations:
            raise SimulatedHazardError("; ".join(self._violations))

    def fail_next(self, kind: FailureKind, *, after: int = 0) -> None:
        """Let something fail, once.

        Args:
            kind: A ``"copy"``, when it is executed, and with it everything behind it on its stream until
                :meth:`recover`; an ``"event"`` and nothing else, when it completes; a ``"registration"`` of host memory
                or an ``"allocation"`` of device memory, which are refused.
            after: How many of the kind go well before.
        """
        self._failing[kind] = after

    def fail_device(self, device: torch.device | None = None) -> None:
        """Let a device fail: nothing more is executed, every event and every call raises.

        Args:
            device: The device; None is the first one.
        """
        failed = self._devices[device or self.devices[0]]
        failed.error = SimulatedDeviceError(f"{failed.device} has failed, as the test wanted")

    def recover(self) -> None:
        """Undo all failures that were asked for or have happened. Operations that failed are not executed again."""
        with self._scheduler.lock:
            self._failing.clear()
            for device in self._devices.values():
                device.error = None
            for stream in self._scheduler.streams:
                stream.error = None
                for operation in stream.queue:
                    # A stream that still waits for an event that has failed would fail too. Drop the wait.
                    if operation.waits_for is not None and operation.waits_for.error is not None:
                        operation.waits_for = None

    def _stream(self, device: torch.device | None) -> SimulatedStream:
        """Return the thread's current stream of a device, or of its current device."""
        return self.current_stream(device or self._scheduler.current_device)
