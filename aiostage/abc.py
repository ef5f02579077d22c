"""All that users may implement: stagers, backends, storages, observers, and what can be waited for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, Collection, Coroutine, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import torch

__all__ = [
    "Backend",
    "Buffer",
    "CheckpointStager",
    "Draft",
    "Observer",
    "Reader",
    "SharedDraft",
    "SharedStorage",
    "Span",
    "Storage",
    "SupportsQuery",
]

T = TypeVar("T")

Buffer: TypeAlias = memoryview
"""Contiguous bytes (format B) over somebody's memory. What refers to it, or to anything made from it, keeps the memory
from being used again; whoever is done with it lets go."""


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
    def record(self, stream: Any, *, timed: bool = False) -> SupportsQuery:
        """Return an event that completes when all that is enqueued on the stream now has completed.

        Args:
            stream: Any stream; the event belongs to its device.
            timed: Whether :meth:`elapsed` is to take it, which makes it a little dearer.

        Returns:
            The event. Its ``query()`` raises what became of the work if that failed.
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
    def elapsed(self, start: Any, end: Any) -> float:
        """Return the seconds between two completed events of one device that were recorded with ``timed=True``."""

    @abstractmethod
    def guard(self, device: torch.device) -> AbstractContextManager[object]:
        """Return a context manager that makes a device the calling thread's current one."""


class Storage(ABC):
    """Where checkpoints lie, each under a name. Its abstract methods are all that a storage has to have.

    A checkpoint is a few files and a manifest. It is there once its manifest is, and whoever looks finds all of it or
    nothing. Names are relative paths with ``/`` between their steps. Every coroutine may be cancelled at any await, and
    none blocks the event loop.
    """

    @property
    def location(self) -> str:
        """Where it is, as a person would write it, for errors; its ``repr`` unless the storage knows better."""
        return repr(self)

    @abstractmethod
    async def open(self, name: str, *, overwrite: bool = False) -> Draft:
        """Begin a checkpoint.

        Args:
            name: Under which it is to appear.
            overwrite: Whether it may replace a checkpoint that is there.

        Returns:
            Where its files are to be written. Nothing of it can be seen before it is committed.

        Raises:
            CheckpointExistsError: If there is something and it may not be, or is no checkpoint.
            OSError: If the storage refuses.

        When cancelled, nothing is left behind.
        """

    @abstractmethod
    async def read(self, name: str) -> Reader:
        """Open a committed checkpoint.

        Raises:
            CheckpointNotFoundError: If there is none of that name.
            OSError: If the storage refuses.
        """

    @abstractmethod
    async def list(self) -> Sequence[str]:
        """Return the names of all committed checkpoints, in any order.

        Raises:
            OSError: If the storage refuses.
        """

    @abstractmethod
    async def delete(self, name: str) -> None:
        """Remove a checkpoint, its manifest first, so that nobody finds half of it. One that is not there is no error.

        Raises:
            OSError: If the storage refuses. What is left can no longer be found, and is debris.
        """

    async def trim(self, name: str, keep: Collection[str]) -> None:
        """Remove files of a checkpoint that nobody needs any more; its manifest and the files that are named stay.

        Asked for when a checkpoint was removed to some of whose files others refer. The only method that a storage may
        do without: this one removes nothing, so that all files stay until the checkpoint is deleted.

        Args:
            name: Of the checkpoint. One that is not there is no error.
            keep: Names of the files that stay.

        Raises:
            OSError: If the storage refuses.

        When cancelled, some of the others may be gone.
        """
        return

    @abstractmethod
    async def sweep(self) -> None:
        """Remove what writers that died have left behind, and nothing that a living one is at work on.

        Raises:
            OSError: If the storage refuses.
        """


class SharedStorage(Storage):
    """A storage in which several processes may write one checkpoint. This is all that it has to have besides."""

    @abstractmethod
    async def open(self, name: str, *, overwrite: bool = False) -> SharedDraft:
        """Begin a checkpoint; see :meth:`Storage.open`."""

    @abstractmethod
    async def join(self, name: str, ticket: str) -> Draft:
        """Join a checkpoint that another process has begun.

        Args:
            name: Under which that has opened it.
            ticket: From its :meth:`SharedDraft.ticket`.

        Returns:
            A draft of which only ``write`` may be called. Its files are committed or removed with the others by
            whoever has opened the checkpoint, which has to outlive the writing.

        Raises:
            OSError: If the storage refuses.
        """


class Draft(ABC):
    """A checkpoint that is being written. These methods are all that a draft has to have.

    Its files may be written at once from several tasks. It ends with :meth:`commit` or :meth:`abort`.
    """

    @property
    @abstractmethod
    def location(self) -> str:
        """Where the checkpoint is going to be, as a person would write it: an absolute path, a URL without secrets."""

    @abstractmethod
    async def write(self, name: str, nbytes: int, parts: AsyncIterable[Buffer]) -> None:
        """Write one file.

        Args:
            name: Of the file, a plain name without ``/``.
            nbytes: How long it will be.
            parts: Its contents in order. All but the last are of one size, a multiple of 4096 bytes. The next part is
                asked for as soon as there is room for it, so that several may be on their way at once, and each is let
                go of once it has been stored.

        Raises:
            OSError: If the storage refuses.

        When cancelled, or when ``parts`` raises, the file is given up and nothing refers to its parts any more.
        """

    @abstractmethod
    async def commit(self, manifest: Buffer) -> None:
        """Write the manifest and make the checkpoint appear, in one step. Once this returns it outlasts a crash.

        Raises:
            CheckpointExistsError: If another writer has been faster and must not be replaced.
            OSError: If the storage refuses.

        When cancelled, either it has been committed or :meth:`abort` still removes everything.
        """

    @abstractmethod
    async def abort(self) -> None:
        """Remove everything written, unless it was committed. May be called more than once; bears no cancellation."""


class SharedDraft(Draft):
    """A draft that other processes may join. This is all that it has to have besides."""

    @abstractmethod
    async def ticket(self) -> str:
        """Return what other processes need for :meth:`SharedStorage.join`.

        Raises:
            OSError: If the storage refuses.
        """


class Reader(ABC):
    """A committed checkpoint that is being read. Its abstract methods are all that a reader has to have.

    It goes on to be the same checkpoint if that is replaced or deleted meanwhile, or raises
    :class:`~aiostage.CheckpointNotFoundError`.
    """

    @property
    @abstractmethod
    def location(self) -> str:
        """Where the checkpoint is, as a person would write it. Errors begin with it."""

    @property
    def reads_at_once(self) -> int:
        """How many calls of :meth:`read` should be under way at once; 4 unless the reader knows better.

        More where each of them waits for long. The memory that reading takes grows with it, up to 128 MiB.
        """
        return 4

    @abstractmethod
    async def manifest(self) -> Buffer:
        """Return the contents of the manifest."""

    @abstractmethod
    async def size(self, name: str) -> int:
        """Return how long a file is, in bytes.

        Raises:
            CheckpointCorruptError: If there is no such file.
            OSError: If the storage refuses.
        """

    @abstractmethod
    async def read(self, name: str, offset: int, into: Buffer) -> None:
        """Fill a writable buffer with a range of a file.

        Args:
            name: Of the file.
            offset: Of the first byte.
            into: As long as the range. Its contents are undefined if this raises or is cancelled.

        Raises:
            CheckpointCorruptError: If there is no such file, or it ends before the buffer is full.
            OSError: If the storage refuses.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Let go of it. May be called more than once."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Span:
    """Something that takes time, as an observer sees it.

    Attributes:
        name: What is done; one of a small number of names.
        parent: The span inside which it began, if there is one.
        attributes: What else is known, as numbers and strings.
        begin: When it began, in seconds of ``time.perf_counter()``.
        thread: Name of the thread in which it began.
        end: When it ended; None until then.
    """

    name: str
    parent: Span | None
    attributes: dict[str, object]
    begin: float
    thread: str
    end: float | None = None


class Observer(ABC):
    """Is told of what aiostage does. These methods are all that an observer has to have.

    They are called on event loops and in worker threads, from several at once, in the context of the work, and must
    neither block nor take long. What they raise is logged and changes nothing. Every span that was started is told of
    once more, when it has ended, unless its coroutine was dropped without being closed.
    """

    @abstractmethod
    def started(self, span: Span) -> None:
        """Something has begun."""

    @abstractmethod
    def complete(self, span: Span) -> None:
        """Something has been done."""

    @abstractmethod
    def failed(self, span: Span, error: BaseException) -> None:
        """Something has ended with an error, or was cancelled."""
