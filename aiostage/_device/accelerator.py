"""Staging's way to any accelerator that PyTorch has: ``torch.accelerator``, ``torch.Stream`` and ``torch.Event``."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from aiostage import _private
from aiostage._device.bits import plain_alias, without_bits, writing_to
from aiostage.abc import Backend, SupportsQuery

__all__ = ["HIGH_PRIORITY", "TorchBackend"]

_GATHERED_AT_ONCE = 128
"""How many tensors one kernel of ``torch.cat`` takes on CUDA and ROCm. It only serves to count launches."""

_seen: set[str] = set()
"""The kinds of devices on which a tensor was seen, which proves that they are in use, whatever their module says."""
# A child cannot use what its parent has used.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_seen.clear)

HIGH_PRIORITY = -1
"""Lower numbers go first; 0, the default, is the lowest priority that every device has."""


class TorchBackend(Backend):
    """The accelerator that this build of PyTorch was made for. Making one touches no device."""

    def __init__(self) -> None:
        # Known since the build; unlike asking whether there is a device, it does not load the driver.
        self._accelerator = torch.accelerator.current_accelerator()
        self._records_streams = self._accelerator is not None and _has_record_stream(self._accelerator)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._accelerator or 'without an accelerator'}>"

    @property
    def unavailable_reason(self) -> str | None:
        """Why there is no accelerator to use, or None if there is one."""
        if self._accelerator is None:
            return "this build of PyTorch knows no accelerator"
        # Not is_available(): on CUDA that starts the driver, after which forked children cannot use it.
        if torch.accelerator.device_count() == 0:
            return f"PyTorch finds no {self._accelerator.type} device"
        return None

    @property
    def pinned_memory_reason(self) -> str | None:
        """Why host memory cannot be page-locked, or None if it can."""
        return self.unavailable_reason or f"PyTorch cannot page-lock memory that it has not allocated for {self._kind}"

    def active_devices(self) -> Sequence[torch.device]:
        """Return every device once the process uses one.

        PyTorch does not tell in general which of several devices are in use. Nor does MPS tell whether it is: there an
        event is recorded even if nothing was done on the device, which does no harm on the one device that it has.
        """
        if self._accelerator is None or not (self._is_initialized() or self._accelerator.type in _seen):
            return ()
        count = torch.get_device_module(self._accelerator).device_count()
        return [torch.device(self._kind, index) for index in range(count)]

    def device_of(self, tensor: torch.Tensor) -> torch.device | None:
        """Return the device that a tensor's storage is on, or None for host memory."""
        if tensor.is_cpu:
            return None
        device = tensor.device
        _seen.add(device.type)
        return device

    def current_device(self) -> torch.device:
        """Return the calling thread's current device. A process that has set one has initialized it."""
        index = torch.accelerator.current_device_index() if self._is_initialized() else 0
        return torch.device(self._kind, index)

    def allocate(self, nbytes: int, device: torch.device, stream: Any | None) -> torch.Tensor:
        """Return new memory of a device, from PyTorch's caching allocator."""
        with self.on(stream) if stream is not None else nullcontext():
            return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def current_stream(self, device: torch.device) -> Any:
        """Return the calling thread's current stream of a device."""
        return torch.accelerator.current_stream(device)

    def side_stream(self, device: torch.device, *, low_priority: bool = True) -> Any:
        """Return a stream of a device; PyTorch takes it from a pool of some 32, which users' streams share."""
        with self.guard(device):
            return torch.Stream(device) if low_priority else torch.Stream(device, priority=HIGH_PRIORITY)

    def record(self, stream: Any) -> SupportsQuery:
        """Return an event that completes when all that is enqueued on the stream now has completed."""
        event = torch.Event(stream.device)
        with self.guard(stream.device):
            event.record(stream)
        return event

    def wait(self, stream: Any, event: Any) -> None:
        """Make later work of a stream wait, on the device, for an event."""
        with self.guard(stream.device):
            event.wait(stream)

    def copy(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], stream: Any) -> int:
        """Enqueue copies; each cast, conjugation and negation is a kernel of its own before its copy."""
        if not destinations:
            return 0
        launches = len(destinations)
        with self.on(stream), writing_to(destinations):
            pairs = list(map(without_bits, destinations, sources))
            for (destination, value), source in zip(pairs, sources, strict=True):
                launches += (value is not source) + (destination.dtype is not source.dtype)
            plain, values = map(list, zip(*pairs, strict=True))
            # What was made here in host memory ends here too, so the copies have to have ended before.
            made = any(value is not source and value.is_cpu for value, source in zip(values, sources, strict=True))
            _private.foreach_copy(plain, values, non_blocking=not made)
        return launches

    def pack(self, sources: Sequence[torch.Tensor], stream: Any) -> tuple[torch.Tensor, int]:
        """Enqueue the gathering of tensors into a flat one, which belongs to the stream."""
        with self.on(stream), torch.no_grad():
            # Allocated while the stream is current, so that the allocator gives its memory to later work of that stream
            # only.
            flat = torch.cat(list(sources))
        return flat, math.ceil(len(sources) / _GATHERED_AT_ONCE)

    def keep(self, tensor: torch.Tensor, stream: Any) -> None:
        """Tell the allocator that a stream uses a tensor, where the device has streams that could outrun it."""
        if self._records_streams:
            plain_alias(tensor).record_stream(stream)

    def register(self, address: int, nbytes: int, device: torch.device) -> None:
        """Refuse, since PyTorch has no way to do it.

        Raises:
            OSError: Always.
        """
        raise OSError(self.pinned_memory_reason)

    def unregister(self, address: int, device: torch.device) -> None:
        """Refuse, since nothing can have been registered.

        Raises:
            OSError: Always.
        """
        raise OSError(self.pinned_memory_reason)

    def guard(self, device: torch.device) -> AbstractContextManager[object]:
        """Return a context manager that makes a device current, and leaves no context behind on the one before."""
        return torch.accelerator.device_index(device.index)

    def _is_initialized(self) -> bool:
        """Return whether the process has begun to use the accelerator, where PyTorch can tell."""
        if self._accelerator is None:
            return False
        is_initialized = getattr(torch.get_device_module(self._accelerator), "is_initialized", None)
        return is_initialized is None or bool(is_initialized())

    @property
    def _kind(self) -> str:
        return self._accelerator.type if self._accelerator is not None else "this build"

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        """Make a stream and its device current in the calling thread.

        Entering the stream itself would do in one thread only: it keeps what was current before in the stream object,
        where a second thread that enters the same stream finds it. And leaving it would switch the device back in the
        way that makes a context of half a gigabyte on a device that the process does not use.
        """
        device = stream.device
        with self.guard(device):
            before = torch.accelerator.current_stream(device)
            torch.accelerator.set_stream(stream)
            try:
                yield
            finally:
                torch.accelerator.set_stream(before)


def _has_record_stream(accelerator: torch.device) -> bool:
    """Return whether a device's allocator records streams; MPS has but one stream and no need."""
    if _private.privateuse1_name is None or _private.has_kernel is None:
        return accelerator.type != "mps"
    key = "PrivateUse1" if accelerator.type == _private.privateuse1_name() else accelerator.type.upper()
    return bool(_private.has_kernel("aten::record_stream", key))
