"""The caller's streams, as they were at the call, and streams for copies that follow them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from aiostage.abc import Backend, SupportsQuery
from aiostage.errors import StagingError

__all__ = ["CallerStreams", "CopyStream", "CopyStreams", "device_errors"]

_LOOKED_AT = 1000
"""Objects that are looked at for a tensor on a device, when the backend knows of no device that is in use."""


class CallerStreams:
    """The caller's current streams and device, with an event on each stream for what was enqueued until the call.

    Current streams belong to a thread and change with ``with stream:``. Work that is done for the caller in another
    thread, or in a later step of the event loop, therefore takes this object along. Made by :meth:`record` in a plain
    function, in the caller's thread; used from any thread.

    Attributes:
        inference: Whether the caller was in inference mode, which belongs to a thread like its streams.
        grad: Whether operations of the caller were recorded for gradients, which belongs to a thread too.
    """

    __slots__ = ("_backend", "_current", "_failure", "_recorded", "grad", "inference")

    def __init__(self, backend: Backend | None) -> None:
        self._backend = backend
        # For each device the streams that were current at the call or at a later record, each with the event that was
        # recorded on it last.
        self._recorded: dict[torch.device, list[tuple[Any, SupportsQuery]]] = {}
        self._current: torch.device | None = None
        self._failure: StagingError | None = None
        self.inference = torch.is_inference_mode_enabled()
        self.grad = torch.is_grad_enabled()

    @classmethod
    def record(cls, backend: Backend | None, tree: Any = None) -> CallerStreams:
        """Record the calling thread's streams. Costs some microseconds a device, and nothing before one is used.

        Args:
            backend: How to reach devices; None, or one without an accelerator, records nothing.
            tree: What the call is about. A tensor on a device in it proves that the device is in use where the backend
                does not know that.

        What a failed device says is raised by the methods that need the record, and not here.
        """
        caller = cls(backend if backend is None or backend.unavailable_reason is None else None)
        if caller._backend is not None:
            try:
                # A process may have tensors on a device that its module does not call initialized; without a look at
                # the tree their stream would be recorded too late.
                if not caller._backend.active_devices():
                    _notice_device(tree, caller._backend)
                caller._record()
                if caller._recorded:
                    caller._current = caller._backend.current_device()
            except Exception as error:
                # Kept for those who need the record. A tree without tensors on a device is staged although the device
                # has failed.
                caller._failure = _device_error(error)
        return caller

    def include(self) -> None:
        """Record the streams of devices that came to be known during the call, still in the caller's thread."""
        if self._backend is not None and not self._recorded and self._failure is None:
            try:
                self._record()
            except Exception as error:
                self._failure = _device_error(error)

    def record_again(self) -> None:
        """As :meth:`renew`, but leave a failure to :meth:`check`: it matters only if something is on a device."""
        if self._failure is None:
            try:
                self._record()
            except Exception as error:
                self._failure = _device_error(error)

    def renew(self) -> None:
        """Record what was enqueued until now: on the streams recorded before, and on those that are current now.

        Raises:
            StagingError: If the device has failed.
        """
        self.check()
        with device_errors():
            self._record()

    def _record(self) -> None:
        if self._backend is None:
            return
        devices = self._backend.active_devices()
        if devices:
            self._refuse_capture(self._backend)
        for device in devices:
            # The streams of earlier steps stay in the record: work on them may still be queued. Their events are
            # recorded again, because the caller may have enqueued more since.
            streams = [stream for stream, _ in self._recorded.get(device, ())]
            current = self._backend.current_stream(device)
            if current not in streams:
                streams.append(current)
            self._recorded[device] = [(stream, self._backend.record(stream)) for stream in streams]

    def _refuse_capture(self, backend: Backend) -> None:
        if backend.is_capturing():
            raise StagingError(
                "the current stream is being captured into a graph, and copies must not become part of that graph.",
                remedy="Stage, save, load or restore before the capture begins, and await it before that too.",
            )

    @property
    def events(self) -> Mapping[torch.device, Sequence[SupportsQuery]]:
        """The events of each device.

        Raises:
            StagingError: If the device had failed.
        """
        self.check()
        return {device: [event for _, event in recorded] for device, recorded in self._recorded.items()}

    def stream(self, device: torch.device) -> Any:
        """Return the stream of a device that was current at the call, or is in this thread if none was in use then.

        Raises:
            StagingError: If the device had failed.
        """
        self.check()
        assert self._backend is not None  # noqa: S101 - a caller that asks for a stream has a device
        recorded = self._recorded.get(device)
        with device_errors():
            # The first is the one that was current at the call; later records only add to the list.
            return recorded[0][0] if recorded else self._backend.current_stream(device)

    def order_before(self, stream: Any, device: torch.device) -> None:
        """Make later work of a stream wait, on the device, for what the caller had enqueued on that device.

        Args:
            stream: A stream of the device.
            device: Which one. PyTorch orders copies between devices on the current streams of both, so that the
                events of other devices say nothing about tensors on this one.

        Raises:
            StagingError: If the device has failed, or was not known to be in use at the call.
        """
        events = self.events.get(device)
        if events is None or self._backend is None:
            raise StagingError(
                f"{device} was not known to be in use when the call was made, so what it was doing was not recorded.",
                remedy="Its is_initialized() said so. Use the device once before, or report it to its PyTorch module.",
            )
        with device_errors():
            # On the device: the calling thread does not wait.
            for event in events:
                self._backend.wait(stream, event)

    def order_after(self, event: Any, device: torch.device) -> None:
        """Make later work of the caller's streams, and of the calling thread's current one, wait for an event.

        Args:
            event: On any stream.
            device: Whose streams wait.
        """
        if self._backend is None:
            return
        with device_errors():
            streams = [stream for stream, _ in self._recorded.get(device, ())]
            current = self._backend.current_stream(device)
            # The current stream too, because this may run in a later step, in which the caller works on another one.
            for stream in streams if current in streams else [*streams, current]:
                self._backend.wait(stream, event)

    def order_current_stream_after(self) -> None:
        """Make later work of the calling thread's current streams wait for what the caller's have been given so far."""
        if self._backend is None:
            return
        with device_errors():
            for device, recorded in self._recorded.items():
                current = self._backend.current_stream(device)
                for stream, _ in recorded:
                    # A stream runs in order, and needs no event to follow itself.
                    if stream != current:
                        self._backend.wait(current, self._backend.record(stream))

    def order_code(self) -> StagingError | None:
        """Make the calling thread's current streams wait for the caller's, for code that reads tensors in this step.

        Returns:
            What the device says, now or at the call. It matters only if there is something on a device.
        """
        if self._failure is None and self._backend is not None and self._recorded:
            try:
                self._refuse_capture(self._backend)
                self.order_current_stream_after()
            except Exception as error:
                return _device_error(error)
        return self._failure

    @contextmanager
    def modes(self) -> Iterator[None]:
        """Put the calling thread in inference mode and have it record gradients, or not, as the caller's was."""
        with torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad):
            yield

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Make the caller's device and streams current in the calling thread.

        Raises:
            StagingError: If the device had failed.
        """
        self.check()
        with ExitStack() as stack:
            if self._backend is not None:
                with device_errors():
                    # Leaving a stream may make its device current, so the device is entered last.
                    for recorded in self._recorded.values():
                        stack.enter_context(self._backend.on(recorded[0][0]))
                    if self._current is not None:
                        stack.enter_context(self._backend.guard(self._current))
            yield

    @property
    def failed(self) -> bool:
        """Whether the device had failed at the call."""
        return self._failure is not None

    def check(self) -> None:
        """Raise what the device said at the call.

        Raises:
            StagingError: If the device had failed.
        """
        if self._failure is not None:
            raise self._failure


@dataclass(eq=False, slots=True)
class CopyStream:
    """A stream for copies.

    Attributes:
        device: Whose.
        stream: The backend's.
        failure: The error of the first copy on it that failed. Copies that were enqueued after that one are unreliable.
    """

    device: torch.device
    stream: Any
    failure: BaseException | None = None


class CopyStreams:
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
        self._streams: dict[torch.device, CopyStream] = {}

    def of(self, device: torch.device) -> CopyStream:
        """Return the copy stream of a device."""
        stream = self._streams.get(device)
        if stream is None:
            # Should two threads meet here, both get the stream of the first; an unused stream costs nothing.
            made = CopyStream(device, self._backend.side_stream(device, low_priority=self._low_priority))
            stream = self._streams.setdefault(device, made)
        return stream

    def forget(self, failed: CopyStream, failure: BaseException | None) -> None:
        """Note that something on a stream has failed, and make a new one for its device next time."""
        # First the mark, then the removal: stagings that hold the stream check the mark after each wait.
        failed.failure = failure
        if self._streams.get(failed.device) is failed:
            self._streams.pop(failed.device, None)


@contextmanager
def device_errors() -> Iterator[None]:
    """Raise what a device says as a StagingError. Out of memory can be named no better than PyTorch does."""
    try:
        yield
    except (StagingError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _device_error(error) from error


def _device_error(error: Exception) -> StagingError:
    if isinstance(error, StagingError):
        return error
    wrapped = StagingError(
        f"the device did not accept the copy: {type(error).__name__}: {error}",
        remedy="A failed kernel may show only here. What was enqueued on the device cannot be relied on.",
    )
    wrapped.__cause__ = error
    return wrapped


def _notice_device(tree: Any, backend: Backend) -> None:
    """Show the backend the tensors on devices among the first objects in dicts, lists and tuples."""
    pending, count = [tree], 0
    while pending and count < _LOOKED_AT:
        item, count = pending.pop(), count + 1
        if isinstance(item, torch.Tensor):
            if not item.is_cpu:
                backend.device_of(item)
        elif isinstance(item, dict):
            # Of the plain class: a subclass may run code of its own.
            pending += islice(dict.values(item), _LOOKED_AT)
        elif isinstance(item, list):
            pending += islice(list.__iter__(item), _LOOKED_AT)
        elif isinstance(item, tuple):
            pending += islice(tuple.__iter__(item), _LOOKED_AT)
