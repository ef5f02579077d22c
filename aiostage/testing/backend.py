"""The part of a simulated accelerator that staging uses: copies, events, memory, registration."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal, TypeAlias

import torch

from aiostage.abc import Backend
from aiostage.testing.clock import VirtualClock
from aiostage.testing.device_memory import Block, DeviceMemory, TensorReference
from aiostage.testing.scheduler import Scheduler
from aiostage.testing.streams import Device, Operation, SimulatedEvent, SimulatedStream

__all__ = ["FailureKind", "SimulatedBackend", "count_change"]

FailureKind: TypeAlias = Literal["copy", "event", "registration", "allocation"]

_POISON = 0xFF
"""The byte that freed memory is filled with: NaN in floating point, -1 in integers."""


class SimulatedBackend(Backend):
    """The backend of :class:`~aiostage.testing.simulator.SimulatedAccelerator`, which documents the arguments."""

    def __init__(
        self,
        devices: int,
        clock: VirtualClock | None,
        seed: int | None,
        *,
        spontaneous: bool,
        bandwidth: float,
        latency: float,
        memory_bytes: int,
        max_registered_bytes: int | None,
        poison_freed: bool,
        bus_bandwidth: float | None,
    ) -> None:
        self._scheduler = Scheduler(
            clock, seed, spontaneous=spontaneous, settle=self._settle, bus_bandwidth=bus_bandwidth
        )
        self._has_bus = bus_bandwidth is not None
        # PyTorch's type for devices that it does not know. None of its own functions accepts it by mistake.
        names = [torch.device("privateuseone", index) for index in range(devices)]
        self._devices = {name: Device(name, DeviceMemory(memory_bytes)) for name in names}
        for device in self._devices.values():
            self._scheduler.add(device)
        self._bandwidth, self._latency = bandwidth, latency
        self._max_registered_bytes = max_registered_bytes
        self._poison_freed = poison_freed
        self._registered: dict[int, int] = {}
        self._failing: dict[FailureKind, int] = {}
        self._violations: list[str] = []
        self._packs = self._copies = self._pinned_copies = self._copied_bytes = 0

    @property
    def unavailable_reason(self) -> str | None:
        """None: there is always a device."""
        return None

    @property
    def pinned_memory_reason(self) -> str | None:
        """None: host memory can be registered."""
        return None

    def active_devices(self) -> Sequence[torch.device]:
        """Return the devices on which anything was allocated, enqueued or registered."""
        return [device.device for device in self._devices.values() if device.in_use]

    def device_of(self, tensor: torch.Tensor) -> torch.device | None:
        """Return the device that a tensor's storage is on, or None for host memory."""
        address = tensor.untyped_storage().data_ptr()
        for name, device in self._devices.items():
            if address in device.memory:
                return name
        return None

    def current_device(self) -> torch.device:
        """Return the calling thread's current device."""
        return self._scheduler.current_device

    def allocate(self, nbytes: int, device: torch.device, stream: SimulatedStream | None) -> torch.Tensor:
        """Return new, uninitialized memory of a device.

        Raises:
            ValueError: If there is no such device.
            torch.OutOfMemoryError: If it has no room.
        """
        if device not in self._devices:
            raise ValueError(f"there are {len(self._devices)} simulated devices, and {device} is none of them")
        return self._allocate((nbytes,), (1,), torch.uint8, stream or self.current_stream(device))

    def current_stream(self, device: torch.device) -> SimulatedStream:
        """Return the calling thread's current stream of a device."""
        return self._scheduler.current_stream(device)

    def side_stream(self, device: torch.device, *, low_priority: bool = True) -> SimulatedStream:
        """Return a new stream of a device. Priorities decide who goes first on the bus, if there is one."""
        self._devices[device].in_use = True
        return self._scheduler.add(self._devices[device], low_priority=low_priority)

    def record(self, stream: SimulatedStream) -> SimulatedEvent:
        """Return an event that completes when all that is enqueued on the stream now has completed."""
        return stream.record_event(fails=self._strike("event"))

    def wait(self, stream: SimulatedStream, event: SimulatedEvent) -> None:
        """Make later work of a stream wait for an event."""
        stream.wait_event(event)

    def copy(
        self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], stream: SimulatedStream
    ) -> int:
        """Enqueue one operation for each pair. Copies never block, with registered memory or without.

        Raises:
            ValueError: If a pair has different shapes, or not exactly one of its tensors is on the stream's device.
        """
        for destination, source in zip(destinations, sources, strict=True):
            if destination.shape != source.shape:
                raise ValueError(f"cannot copy shape {tuple(source.shape)} to shape {tuple(destination.shape)}")
            to_host = self.device_of(destination) is None
            # References and not the tensors: a device's queue keeps no memory alive either.
            host = TensorReference(destination if to_host else source, None)
            device = self._reference(source if to_host else destination, stream)
            operation = Operation(
                name="copy",
                seconds=self._copy_seconds(source.nbytes),
                run=partial(self._copy_one, *((host, device) if to_host else (device, host))),
                engine=None if self._has_bus else "to host" if to_host else "to device",
                moved_bytes=source.nbytes,
            )
            self._scheduler.enqueue(stream, operation)
        # Now and not when the copy is executed: staging compares versions, and must see what was enqueued.
        count_change(destinations)
        hosts = [
            source if self.device_of(source) is None else to for to, source in zip(destinations, sources, strict=True)
        ]
        with self._scheduler.lock:
            self._copies += len(sources)
            self._pinned_copies += sum(map(self._is_registered, hosts))
            self._copied_bytes += sum(source.nbytes for source in sources)
        return len(destinations)

    def pack(self, sources: Sequence[torch.Tensor], stream: SimulatedStream) -> tuple[torch.Tensor, int]:
        """Enqueue one kernel that gathers tensors into a new flat one, which is allocated for the stream."""
        parts = [self._reference(source, stream) for source in sources]
        length = sum(source.numel() for source in sources)
        flat = self._allocate((length,), (1,), sources[0].dtype, stream)
        self._enqueue_kernel("pack", _gather, [self._reference(flat, stream), *parts], 0.0, stream)
        with self._scheduler.lock:
            self._packs += 1
        return flat, 1

    def keep(self, tensor: torch.Tensor, stream: SimulatedStream) -> None:
        """When a device tensor dies, let its memory wait for the operations that the stream has by then."""
        device = self.device_of(tensor)
        if device is None:
            return
        with self._scheduler.lock:
            block = self._devices[device].memory.block_of(tensor)
            if block.stream is not stream:
                block.users.add(stream)

    def register(self, address: int, nbytes: int, device: torch.device) -> None:
        """Record that host memory is registered.

        Raises:
            OSError: If some of it is registered already, the limit is reached, or a test asked for the failure.
            SimulatedDeviceError: If the device has failed.
        """
        with self._scheduler.lock:
            self._devices[device].check()
            self._devices[device].in_use = True
            limit, held = self._max_registered_bytes, sum(self._registered.values())
            if self._strike("registration") or (limit is not None and held + nbytes > limit):
                raise OSError(errno.ENOMEM, f"the simulated driver refuses {nbytes} bytes of host memory")
            if any(address < start + size and start < address + nbytes for start, size in self._registered.items()):
                raise OSError(errno.EINVAL, "some of the host memory is registered already")
            self._registered[address] = nbytes

    def unregister(self, address: int, device: torch.device) -> None:
        """Undo :meth:`register`.

        Raises:
            OSError: If the memory is not registered.
        """
        with self._scheduler.lock:
            if self._registered.pop(address, None) is None:
                raise OSError(errno.EINVAL, f"host memory at {address:#x} is not registered")

    def guard(self, device: torch.device) -> AbstractContextManager[object]:
        """Return a context manager that makes a device the calling thread's current one."""
        return self._guard(device)

    @contextmanager
    def _guard(self, device: torch.device) -> Iterator[None]:
        self._scheduler.enter(device)
        try:
            yield
        finally:
            self._scheduler.leave()

    def _allocate(
        self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, stream: SimulatedStream
    ) -> torch.Tensor:
        """Return a dense device tensor, allocated for a stream."""
        self._scheduler.progress()
        tensor = torch.empty_strided(size, stride, dtype=dtype, device="meta")
        nbytes = tensor.untyped_storage().nbytes()
        # It has no memory, so it is on no device.
        if nbytes == 0:
            return torch.empty_strided(size, stride, dtype=dtype, device="cpu")
        with self._scheduler.lock:
            self._settle()
            stream.on.check()
            if self._strike("allocation"):
                raise torch.OutOfMemoryError("the simulated device is out of memory, as the test wanted")
            stream.on.in_use = True
            storage = stream.on.memory.allocate(nbytes, stream)
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, tuple(size), tuple(stride))

    def _enqueue_kernel(
        self,
        name: str,
        kernel: Callable[..., object],
        tensors: Sequence[TensorReference],
        seconds: float,
        stream: SimulatedStream,
        moved_bytes: int = 0,
    ) -> None:
        operation = Operation(name=name, seconds=seconds, run=partial(_call, kernel, tensors), moved_bytes=moved_bytes)
        self._scheduler.enqueue(stream, operation)

    def _copy_one(self, destination: TensorReference, source: TensorReference) -> None:
        """Execute a copy."""
        if self._strike("copy"):
            raise OSError(errno.EIO, "the test wanted it")
        target, origin = destination.tensor(), source.tensor()
        if target is None or origin is None:
            # Not raised here: this may be another thread. The simulator raises it at the end of its `with` block.
            touched = "written to" if target is None else "read from"
            self._violations.append(f"host memory was gone when a copy would have {touched} it")
            return
        target.copy_(origin)

    def _is_registered(self, tensor: torch.Tensor) -> bool:
        """Return whether host memory lies in one registration, with the lock held."""
        first = tensor.data_ptr()
        return any(start <= first and first + tensor.nbytes <= start + size for start, size in self._registered.items())

    def _copy_seconds(self, nbytes: int) -> float:
        return self._latency + nbytes / self._bandwidth

    def _reference(self, tensor: torch.Tensor, stream: SimulatedStream) -> TensorReference:
        """Return a reference to a tensor, which has to be on the stream's device unless it has no elements."""
        if tensor.numel() == 0:
            return TensorReference(tensor, None)
        device = self.device_of(tensor)
        if device != stream.device:
            raise ValueError(f"a tensor on {device or 'the host'} was given to {stream.name}")
        return TensorReference(tensor, stream.on.memory)

    def _settle(self) -> None:
        """Take back the memory of tensors that have died, with the lock held."""
        for device in self._devices.values():
            for block in device.memory.collect(self._record_quietly):
                if self._poison_freed:
                    self._poison(device, block)

    def _record_quietly(self, stream: Any) -> SimulatedEvent:
        """Record an event of the allocator, with the lock held: it neither fails nor lets anything else happen."""
        event = SimulatedEvent(stream, fails=False)
        self._scheduler.append(stream, Operation(name="allocator's event", completes=event))
        return event

    def _poison(self, device: Device, block: Block) -> None:
        """Enqueue overwriting freed memory on the stream that gets it next, with the lock held."""
        freed = torch.empty(0, dtype=torch.uint8, device="cpu").set_(
            device.memory.storage, block.offset, (block.nbytes,), (1,)
        )
        self._scheduler.append(block.stream, Operation(name="poison", run=lambda: freed.fill_(_POISON)))

    def _strike(self, kind: FailureKind) -> bool:
        """Return whether a failure that a test asked for is due now."""
        remaining = self._failing.get(kind)
        if remaining is None:
            return False
        if remaining > 0:
            self._failing[kind] = remaining - 1
            return False
        del self._failing[kind]
        return True


def _call(kernel: Callable[..., object], references: Sequence[TensorReference]) -> None:
    kernel(*(reference.tensor() for reference in references))


def _gather(flat: torch.Tensor, *sources: torch.Tensor) -> None:
    torch.cat(sources, out=flat)


def count_change(tensors: Sequence[torch.Tensor]) -> None:
    """Count a change when it is enqueued, as PyTorch does, and not when it is executed."""
    for tensor in tensors:
        # Inference tensors have no version.
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
