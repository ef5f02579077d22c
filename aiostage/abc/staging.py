"""What stages, what it stages from, and what can be waited for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Coroutine, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch

__all__ = ["Backend", "CheckpointStager", "SupportsQuery"]

T = TypeVar("T")


@runtime_checkable
class SupportsQuery(Protocol):
    """Something that will be done one day and can be asked whether it is. This is all that it has to have."""

    def query(self) -> bool:
        """Return True when done, at once and without blocking."""


class CheckpointStager(ABC):
    """Makes training-safe copies of state dicts. ``stage`` and ``aclose`` are all that a stager has to have."""

    @abstractmethod
    def stage(self, state_dict: T) -> Coroutine[Any, Any, T]:
        """Return a coroutine that returns a copy of ``state_dict`` in host memory.

        Args:
            state_dict: Any deep-copyable tree with tensors in it.

        Returns:
            A coroutine; once it returns, no change to the source shows in the copy.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Give back what the stager holds. May be called more than once, and has closed it also when cancelled."""

    async def __aenter__(self: S) -> S:
        """Return self; entering does nothing that needs undoing."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close."""
        await self.aclose()


S = TypeVar("S", bound=CheckpointStager)


class Backend(ABC):
    """How staging reaches accelerators. These methods are all that a backend has to have.

    Streams and events are opaque to the rest of aiostage: they are only handed back to the backend that made them,
    except that events have ``query()``. Users' own streams may be handed in too. Every method may be called from any
    thread; none but :meth:`allocate` may initialize a device that the process has not used, also not by way of the
    calling thread's current device, and only that, :meth:`register` and :meth:`unregister` wait for the device.

    What is enqueued is not referred to: the caller keeps sources, destinations and registered memory alive until an
    event recorded afterwards has completed, or tells the allocator by :meth:`keep`.
    """

    @property
    @abstractmethod
    def unavailable_reason(self) -> str | None:
        """Why there is no accelerator to use, or None if there is one."""

    @property
    @abstractmethod
    def pinned_memory_reason(self) -> str | None:
        """Why host memory cannot be page-locked for this backend, or None if it can."""

    @abstractmethod
    def active_devices(self) -> Sequence[torch.device]:
        """Return the devices that this process has initialized, the only ones a state dict can live on."""

    @abstractmethod
    def device_of(self, tensor: torch.Tensor) -> torch.device | None:
        """Return the device that a tensor's storage is on, or None for host memory."""

    @abstractmethod
    def current_device(self) -> torch.device:
        """Return the calling thread's current device, with its index; the first one before any was used."""

    @abstractmethod
    def allocate(self, nbytes: int, device: torch.device, stream: Any | None) -> torch.Tensor:
        """Return new memory of a device. Blocks: call it from a worker thread.

        Args:
            nbytes: How much, in bytes.
            device: Which one.
            stream: A stream of the device, for whose work it is allocated; others have to wait for what that had
                enqueued before. None: the calling thread's current one, which initializes a device that the process
                has not used.

        Returns:
            A one-dimensional uint8 tensor, uninitialized.

        Raises:
            torch.OutOfMemoryError: If the device has no room.
            Exception: What PyTorch says of a device that there is not.
        """

    @abstractmethod
    def current_stream(self, device: torch.device) -> Any:
        """Return the calling thread's current stream of a device."""

    @abstractmethod
    def side_stream(self, device: torch.device, *, low_priority: bool = True) -> Any:
        """Return a new stream of a device, for copies beside the caller's work.

        Args:
            device: An active device.
            low_priority: Let kernels of other streams go first, where the device can. Otherwise its own go first.
        """

    @abstractmethod
    def record(self, stream: Any) -> SupportsQuery:
        """Return an event that completes when all that is enqueued on the stream now has completed.

        Args:
            stream: Any stream; the event belongs to its device.

        Returns:
            The event. Its ``query()`` raises the error of the work if that failed.
        """

    @abstractmethod
    def wait(self, stream: Any, event: Any) -> None:
        """Make later work of a stream wait, on the device, for an event, which may be another device's."""

    @abstractmethod
    def copy(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], stream: Any) -> int:
        """Enqueue copies between a device and host memory, in either direction.

        Copies to or from memory that is not registered may hold the calling thread until they are done: call it from
        a worker thread.

        Args:
            destinations: Tensors of the sources' shapes; contiguous, or they are copied twice. A dtype that differs
                from the source's casts.
            sources: Tensors; conjugate and negative views are copied by value.
            stream: A stream of the device on which either all destinations or all sources are.

        Returns:
            How many device operations were enqueued.
        """

    @abstractmethod
    def pack(self, sources: Sequence[torch.Tensor], stream: Any) -> tuple[torch.Tensor, int]:
        """Enqueue the gathering of many one-dimensional tensors of one dtype into one flat tensor on their device.

        Args:
            sources: One-dimensional contiguous tensors of one dtype on the stream's device.
            stream: A stream from :meth:`side_stream`.

        Returns:
            The flat device tensor, its elements in the order of ``sources``, and how many device operations were
            enqueued. It belongs to the stream, and may be dropped once what reads it has been enqueued there: its
            memory goes to later work of the same stream only.

        Raises:
            torch.OutOfMemoryError: If the device has no room for the flat tensor.
        """

    @abstractmethod
    def keep(self, tensor: torch.Tensor, stream: Any) -> None:
        """Tell the device's allocator that what is enqueued on a stream uses a tensor.

        Its memory is then not given to others before that is done, also if every reference is dropped.
        """

    @abstractmethod
    def register(self, address: int, nbytes: int, device: torch.device) -> None:
        """Page-lock host memory for a device. Blocks, for about 0.1 s a GiB: call it from a worker thread.

        Raises:
            OSError: If the driver refuses, with the driver's reason.
        """

    @abstractmethod
    def unregister(self, address: int, device: torch.device) -> None:
        """Undo :meth:`register`. Blocks. Does nothing in a forked child, which has no registration.

        Raises:
            OSError: If the driver refuses, with the driver's reason.
        """

    @abstractmethod
    def guard(self, device: torch.device) -> AbstractContextManager[object]:
        """Return a context manager that makes a device the calling thread's current one."""

    def on(self, stream: Any) -> AbstractContextManager[object]:
        """Return a context manager that makes a stream the calling thread's current one of its device.

        Not abstract: without it the stream itself is entered, which is one that several threads may enter at once.
        """
        return cast("AbstractContextManager[object]", stream)

    def is_capturing(self) -> bool:
        """Return whether the calling thread's current stream is being captured into a graph, and carries nothing out.

        Not abstract: a device without graphs never does that. Called only once a device is in use.
        """
        return False
