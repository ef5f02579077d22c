"""The accelerator of the tests in this folder: the simulator, or PyTorch's simulated device in a process that has it.

Both have the same methods. The simulator chooses orders by a seed and executes an operation at a time; the device runs
in real time, as late as the seed says. A test that steps, reads the simulator's clock or its counts, or registers
memory, is marked with :data:`simulator_only`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch

from aiostage._device import TorchBackend
from aiostage.abc import SupportsQuery
from aiostage.testing.clock import VirtualClock
from aiostage.testing.simulator import SimulatedAccelerator, SimulatedDeviceError, SimulatedHazardError

__all__ = [
    "FAILURE",
    "ON_A_DEVICE",
    "Accelerator",
    "CopyCounter",
    "DeviceAccelerator",
    "DeviceError",
    "default_stager_stages_again",
    "is_completed",
    "seeds",
    "simulator_only",
]

_found = torch.accelerator.current_accelerator()
ON_A_DEVICE = _found is not None and _found.type == "simgpu"

_DELAYS_MICROSECONDS = {"copy_delay": 400, "kernel_delay": 100}
"""The longest that a copy and a kernel take, where the test leaves that to the seed."""

_FAILURE_MICROSECONDS = 300
"""How long it takes until a kernel that fails is noticed."""


def default_stager_stages_again() -> bool:
    """Return whether PyTorch's own stager stages a second time. That of 2.11 raises KeyError."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    stager = DefaultStager(StagingOptions(False, False, True, False))
    try:
        for _ in range(2):
            stager.stage({}).result()  # type: ignore[union-attr]
    except KeyError:
        return False
    finally:
        stager.close()
    return True


@dataclass(frozen=True)
class DeviceStatistics:
    """What the device tells of what the simulator does."""

    kernels: int
    copies: int
    queries: int
    registered_bytes: int = 0


class DeviceAccelerator(TorchBackend):
    """PyTorch's simulated device with the methods of :class:`~aiostage.testing.SimulatedAccelerator`.

    Args:
        devices: How many the test looks at; there are two.
        clock: If there is one, nothing that follows an event of the test's is done before :meth:`synchronize`. It is
            not read.
        seed: Chooses how late copies and kernels are.
        spontaneous: Copies and kernels take a random time.
        late: What comes so late that a stager which does not wait for it is certain to go wrong: kernels, and what they
            fail of, do nothing before :meth:`release`; copies of a stager wait for the next kernel.
        others: For the simulator.
    """

    def __init__(
        self,
        devices: int = 1,
        *,
        clock: VirtualClock | None = None,
        seed: int | None = None,
        spontaneous: bool = False,
        late: Literal["kernels", "copies"] | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        self._late = late
        self._device: Any = torch.simgpu  # type: ignore[attr-defined]
        self._device.init()
        self.devices = tuple(torch.device("simgpu", index) for index in range(min(devices, 2)))
        self._is_held = clock is not None
        self._gates: list[Any] = []
        # Sources of uploads that may be under way.
        self._uploads: list[torch.Tensor] = []
        self._before = self._violations()
        if seed is not None:
            self._device.seed(seed)
        for name, longest in _DELAYS_MICROSECONDS.items():
            getattr(self._device, name)(0, longest if spontaneous else 0)
        self._thread = threading.get_ident()

    def __enter__(self) -> DeviceAccelerator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        self._is_held = False
        self.synchronize()
        self.recover()
        for name in _DELAYS_MICROSECONDS:
            getattr(self._device, name)(0, 0)
        found = {name: count - self._before[name] for name, count in self._violations().items()}
        if error is None and any(found.values()):
            raise SimulatedHazardError(f"memory that is gone was read or written to: {found}")

    def _violations(self) -> dict[str, int]:
        statistics = self._device.stats()
        return {name: statistics[name] for name in ("freed_source", "expired_host")}

    def active_devices(self) -> Sequence[torch.device]:
        """Return the devices that the test looks at."""
        return [device for device in super().active_devices() if device in self.devices]

    def record(self, stream: Any) -> SupportsQuery:
        """Return an event; on a held device none of the test's own is done before :meth:`synchronize`."""
        if self._is_held and not self._gates and threading.get_ident() == self._thread:
            self._gates = [self._device.Gate(index) for index in range(2)]
        return super().record(stream)

    def copy(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], stream: Any) -> int:
        """Enqueue copies of a stager."""
        if self._late == "copies":
            self._hold(stream)
        return super().copy(destinations, sources, stream)

    def _hold(self, stream: Any) -> None:
        with self.on(stream):
            self._gates.append(self._device.Gate(stream.device.index))

    def release(self) -> None:
        """Let what is late be done."""
        while self._gates:
            self._gates.pop().release()

    def synchronize(self) -> None:
        """Let everything be done, and wait for it. A device that has failed works again."""
        self.release()
        while True:
            try:
                self._device.drain()
            except RuntimeError:
                self._device.fail_device(False)
            else:
                break
        self._uploads.clear()

    def statistics(self) -> DeviceStatistics:
        """Return what the device counts."""
        found = self._device.stats()
        return DeviceStatistics(found["kernels"], found["h2d"] + found["d2h"], found["query"])

    def empty(self, *size: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> torch.Tensor:
        """Allocate a tensor for the current stream."""
        return torch.empty(size, dtype=dtype, device=device or self.devices[0])

    def to_device(self, tensor: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
        """Copy a host tensor to a device, on the current stream; the host tensor may change at once."""
        value = tensor.detach().clone()
        copied = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device or self.devices[0])
        copied.copy_(value, non_blocking=True)
        self._uploads.append(value)
        return copied

    def launch(
        self,
        kernel: Callable[..., object],
        *writes: torch.Tensor,
        reads: Sequence[torch.Tensor] = (),
        seconds: float = 0.0,
        stream: Any = None,
    ) -> None:
        """Enqueue a kernel. What it raises fails the device."""
        device = (*writes, *reads)[0].device if writes or reads else self.devices[0]
        stream = stream if stream is not None else self.current_stream(device)
        if self._late == "kernels":
            if not self._gates:
                # An upload that is late too would leave what the memory had before: what the kernel writes, perhaps.
                stream.synchronize()
            self._hold(stream)
        with self.on(stream), torch.no_grad():
            self._device.sleep(int(seconds * 1e6), device.index)
            try:
                # Writes through what is only read count no version.
                kernel(*writes, *(tensor.data for tensor in reads))
            except Exception:
                self._device.fail_later(_FAILURE_MICROSECONDS, device.index)
        if self._late == "copies":
            stream.synchronize()
            self.release()

    def fail_next(self, kind: str) -> None:
        """Let the copies that follow fail, or the first device be full, until :meth:`recover`."""
        if kind == "copy":
            self._device.fail_later(_FAILURE_MICROSECONDS, 0)
        elif kind == "allocation":
            self._device.memory_limit(0, self._device.in_use(0))
        else:
            raise ValueError(f"the device cannot fail at a {kind}")

    def fail_device(self) -> None:
        """Let both devices fail."""
        self._device.fail_device(True)

    def recover(self) -> None:
        """Undo failures."""
        self._device.fail_device(False)
        self._device.memory_limit(0, -1)


Accelerator: Any = DeviceAccelerator if ON_A_DEVICE else SimulatedAccelerator
"""Which of the two tests are run on in this process."""


class CopyCounter:
    """Counts the copies to and from an accelerator that were launched since this was made."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._before = accelerator.statistics().copies

    @property
    def count(self) -> int:
        """How many, whether or not they are done."""
        return int(self._accelerator.statistics().copies) - self._before


DeviceError: type[Exception] = RuntimeError if ON_A_DEVICE else SimulatedDeviceError
"""What a device that has failed raises."""

FAILURE = "unspecified launch failure" if ON_A_DEVICE else "the test wanted it"
"""In words."""

simulator_only = pytest.mark.skipif(ON_A_DEVICE, reason="needs control over the order of the simulator, or its counts")


def is_completed(event: Any) -> bool:
    """Return whether an event is done, without letting the simulator do more."""
    return bool(event.query() if ON_A_DEVICE else event.completed)


def seeds(count: int) -> range:
    """Return the seeds of so many orders. On the device each takes milliseconds, so there are fewer."""
    return range(max(count // 10, 3) if ON_A_DEVICE else count)
