"""All that users may implement: stagers, backends, and what can be waited for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Coroutine, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol, TypeVar, runtime_checkable

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
        """Give back what the stager holds. May be called more than once."""

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
    except that events have ``query()``. No method may block on the device, and none may initialize a device that
    the process has not used.
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
    def current_stream(self, device: torch.device) -> Any:
        """Return the calling thread's current stream of a device."""

    @abstractmethod
    def side_stream(self, device: torch.device, *, low_priority: bool = True) -> Any:
        """Return a new stream of a device, for copies beside the caller's work."""

    @abstractmethod
    def record(self, stream: Any) -> SupportsQuery:
        """Return an event that completes when all that is enqueued on the stream now has completed."""

    @abstractmethod
    def wait(self, stream: Any, event: Any) -> None:
        """Make later work of a stream wait, on the device, for an event."""

    @abstractmethod
    def copy(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], stream: Any) -> int:
        """Enqueue copies from a device to host tensors of the same shapes on a stream.

        Args:
            destinations: Host tensors; their dtypes may differ from the sources', which casts.
            sources: Tensors on the stream's device.
            stream: A stream from :meth:`side_stream`.

        Returns:
            How many device operations were enqueued.
        """

    @abstractmethod
    def pack(self, sources: Sequence[torch.Tensor], stream: Any) -> tuple[torch.Tensor, int]:
        """Enqueue the gathering of many one-dimensional tensors of one dtype into one flat tensor on their device.

        Args:
            sources: One-dimensional contiguous tensors of one dtype on one device.
            stream: A stream from :meth:`side_stream`.

        Returns:
            The flat device tensor, its elements in the order of ``sources``, and how many device operations were
            enqueued.
        """

    @abstractmethod
    def keep(self, tensor: torch.Tensor, stream: Any) -> None:
        """Tell the device's allocator that a stream uses a tensor, so that its memory is not reused too early."""

    @abstractmethod
    def register(self, address: int, nbytes: int, device: torch.device) -> None:
        """Page-lock host memory for a device. Blocks: call it from a worker thread.

        Raises:
            OSError: If the driver refuses, with the driver's reason.
        """

    @abstractmethod
    def unregister(self, address: int, device: torch.device) -> None:
        """Undo :meth:`register`. Blocks: call it from a worker thread."""

    @abstractmethod
    def elapsed(self, start: Any, end: Any) -> float:
        """Return the seconds between two completed events of one device."""

    @abstractmethod
    def guard(self, device: torch.device) -> AbstractContextManager[object]:
        """Return a context manager that makes a device the calling thread's current one."""
