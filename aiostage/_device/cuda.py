"""What CUDA (and ROCm, which goes by its name) can do beyond any accelerator, and what it needs more care for."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, cast

import torch

from aiostage import _private
from aiostage._device.accelerator import HIGH_PRIORITY, TorchBackend
from aiostage.abc import SupportsQuery

__all__ = ["CudaBackend"]

_cuda: Any = torch.cuda
"""As Any, because most of it has no types."""

_PORTABLE = 1
"""``cudaHostRegisterPortable``: the memory counts as page-locked for every device, also for those used later."""

_OUT_OF_MEMORY = 2
"""``cudaErrorMemoryAllocation``, which is also what a limit on locked memory gives."""


class CudaBackend(TorchBackend):
    """CUDA with registered host memory, and with no context on a device that the process does not use.

    The events and streams are ``torch.cuda``'s own. The generic ones set the thread's device and set it back, also
    when an event dies, and on CUDA 12 setting a device makes a context there: in a thread that never chose a device
    that would be device 0, in every process of a node.
    """

    @property
    def pinned_memory_reason(self) -> str | None:
        """Why host memory cannot be page-locked: only for want of a device."""
        return self.unavailable_reason

    def active_devices(self) -> Sequence[torch.device]:
        """Return the devices on which this process has a context."""
        # False as well in a forked child of a process that has used CUDA.
        if not _cuda.is_initialized() and not super().active_devices():
            return ()
        if torch.version.hip is not None:
            # ROCm makes no context by setting a device, and need not be asked which ones there are.
            return super().active_devices()
        has_context = _private.cuda_has_context or (lambda index: True)
        return [torch.device("cuda", index) for index in range(_cuda.device_count()) if has_context(index)]

    def is_capturing(self) -> bool:
        """Return whether the calling thread's current stream is being captured into a graph."""
        return bool(_cuda.is_current_stream_capturing())

    def current_stream(self, device: torch.device) -> Any:
        """Return the calling thread's current stream of a device."""
        return _cuda.current_stream(device)

    def side_stream(self, device: torch.device, *, low_priority: bool = True) -> Any:
        """Return a stream from PyTorch's pool. Priority 0, the default, is the lowest that CUDA has."""
        return _cuda.Stream(device, priority=0 if low_priority else HIGH_PRIORITY)

    def record(self, stream: Any) -> SupportsQuery:
        """Return an event that completes when all that is enqueued on the stream now has completed."""
        event = _cuda.Event()
        event.record(_native(stream))
        return cast(SupportsQuery, event)

    def wait(self, stream: Any, event: Any) -> None:
        """Make later work of a stream wait, on the device, for an event."""
        event.wait(_native(stream))

    def register(self, address: int, nbytes: int, device: torch.device) -> None:
        """Page-lock host memory for all devices, through a context that there is. Blocks, without the GIL.

        Raises:
            OSError: If the driver refuses, with the driver's reason.
        """

        def register() -> int:
            with self.guard(device):
                return int(_cuda.cudart().cudaHostRegister(address, nbytes, _PORTABLE))

        # CUDA remembers a failure as the thread's last error, which PyTorch takes for one of the next kernel that the
        # thread launches. A thread that ends takes it along.
        _check(_in_own_thread(register), "cudaHostRegister")

    def unregister(self, address: int, device: torch.device) -> None:
        """Undo :meth:`register`. Blocks, without the GIL; called by finalizers, so it starts no thread.

        Raises:
            OSError: If the driver refuses, with the driver's reason.
        """
        if not _cuda.is_initialized():
            return
        with self.guard(device):
            code = int(_cuda.cudart().cudaHostUnregister(address))
        _check(code, "cudaHostUnregister")


def _native(stream: torch.Stream) -> Any:
    """Return a stream as ``torch.cuda.Stream``, the only kind that every version of ``torch.cuda.Event`` takes."""
    if isinstance(stream, _cuda.Stream):
        return stream
    return _cuda.Stream(stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type)


def _check(code: int, call: str) -> None:
    if code != 0:
        cudart = _cuda.cudart()
        reason = cudart.cudaGetErrorString(cudart.cudaError(code))
        raise OSError(errno.ENOMEM if code == _OUT_OF_MEMORY else errno.EINVAL, f"{call}: {reason} ({code})")


def _in_own_thread(function: Callable[[], int]) -> int:
    """Run a function in a thread that ends with it."""
    outcome: Future[int] = Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="aiostage-register", daemon=True)
    thread.start()
    thread.join()
    return outcome.result()
