"""The backend on torch.accelerator, as far as a machine without an accelerator lets it be tried."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from aiostage import StagingError
from aiostage._device import CallerStreams, CopyStreams, CudaBackend, TorchBackend, default_backend
from aiostage.testing.clock import VirtualClock
from tests.device.accelerators import Accelerator, simulator_only
from tests.patience import seconds


def test_host_tensors_are_on_no_device() -> None:
    assert TorchBackend().device_of(torch.ones(2)) is None


def test_other_tensors_are_on_theirs() -> None:
    assert TorchBackend().device_of(torch.ones(2, device="meta")) == torch.device("meta")


@pytest.mark.parametrize("backend", [TorchBackend, CudaBackend])
def test_without_an_accelerator_it_says_why(backend: type[TorchBackend]) -> None:
    if torch.accelerator.is_available():
        return
    made = backend()
    assert made.unavailable_reason
    assert made.pinned_memory_reason
    assert list(made.active_devices()) == []
    assert CallerStreams.record(made).events == {}
    assert "without an accelerator" in repr(made) or "cuda" in repr(made)


def test_memory_of_an_unknown_kind_of_device_cannot_be_registered() -> None:
    with pytest.raises(OSError, match=r"cannot page-lock|knows no accelerator|finds no"):
        TorchBackend().register(0, 4096, torch.device("cpu"))
    with pytest.raises(OSError, match=r"cannot page-lock|knows no accelerator|finds no"):
        TorchBackend().unregister(0, torch.device("cpu"))


def test_making_one_touches_no_device() -> None:
    program = (
        "from aiostage._device import default_backend\n"
        "import torch\n"
        "default_backend().unavailable_reason\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=seconds(60))


def test_the_default_is_the_one_of_the_build() -> None:
    accelerator = torch.accelerator.current_accelerator()
    expected = CudaBackend if accelerator is not None and accelerator.type == "cuda" else TorchBackend
    assert type(default_backend()) is expected


class TestCopyStreams:
    @simulator_only
    def test_there_is_one_for_each_device_until_it_is_forgotten(self):
        with Accelerator(2, clock=VirtualClock()) as accelerator:
            streams = CopyStreams(accelerator)
            first, second = accelerator.devices
            assert streams.of(first) is streams.of(first)
            assert streams.of(first) is not streams.of(second)
            assert streams.of(first).stream.low_priority
            before = streams.of(first)
            streams.forget(streams.of(second), ValueError())
            assert streams.of(first) is before
            streams.forget(before, ValueError())
            assert streams.of(first) is not before
            assert isinstance(before.failure, ValueError)
            assert not CopyStreams(accelerator, low_priority=False).of(first).stream.low_priority


class TestCallerStreams:
    @simulator_only
    def test_a_device_that_comes_into_use_later_is_refused_until_it_is_recorded(self):
        with Accelerator(clock=VirtualClock()) as accelerator:
            caller = CallerStreams.record(accelerator)
            assert caller.events == {}
            device = accelerator.devices[0]
            tensor = accelerator.to_device(torch.zeros(3))
            accelerator.launch(lambda t: t.fill_(7), tensor, seconds=1.0)
            stream = accelerator.side_stream(device)
            with pytest.raises(StagingError, match="not known to be in use"):
                caller.order_before(stream, device)
            caller.renew()
            caller.order_before(stream, device)
            copy = torch.empty(3)
            accelerator.copy([copy], [tensor], stream)
            accelerator.synchronize()
            assert copy.tolist() == [7, 7, 7]
