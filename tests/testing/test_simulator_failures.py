"""Failures of a simulated accelerator: where they are asked for, and how far they reach."""

from __future__ import annotations

import pytest
import torch

from aiostage.testing import SimulatedAccelerator, SimulatedDeviceError, VirtualClock


@pytest.fixture
def accelerator() -> SimulatedAccelerator:
    return SimulatedAccelerator(2, clock=VirtualClock())


class TestCopies:
    def test_fails_its_stream_and_no_other(self, accelerator: SimulatedAccelerator):
        device = accelerator.devices[0]
        tensor = accelerator.to_device(torch.ones(4))
        accelerator.synchronize()
        bad, good = accelerator.side_stream(device), accelerator.side_stream(device)
        hosts = [torch.zeros(4) for _ in range(3)]
        accelerator.fail_next("copy")
        accelerator.copy(hosts[:2], [tensor, tensor], bad)
        event = accelerator.record(bad)
        accelerator.step(bad)
        accelerator.copy(hosts[2:], [tensor], good)
        accelerator.synchronize()
        for asked in (event, bad):
            with pytest.raises(SimulatedDeviceError, match="the test wanted it") as caught:
                asked.query()
            assert isinstance(caught.value.__cause__, OSError)
        assert good.query()
        # Nothing behind the failed one is executed.
        assert [host.sum().item() for host in hosts] == [0, 0, 4]

    def test_after_some_others(self, accelerator: SimulatedAccelerator):
        tensor = accelerator.to_device(torch.ones(4))
        accelerator.synchronize()
        hosts = [torch.zeros(4) for _ in range(3)]
        accelerator.fail_next("copy", after=2)
        accelerator.copy(hosts, [tensor] * 3, accelerator.current_stream(accelerator.devices[0]))
        accelerator.synchronize()
        assert [host.sum().item() for host in hosts] == [4, 4, 0]

    def test_reaches_streams_that_wait(self, accelerator: SimulatedAccelerator):
        first, second = (accelerator.side_stream(device) for device in accelerator.devices)
        accelerator.launch(lambda: 1 / 0, stream=first)
        second.wait_stream(first)
        done: list[int] = []
        accelerator.launch(lambda: done.append(1), stream=second)
        accelerator.synchronize()
        assert done == []
        with pytest.raises(SimulatedDeviceError, match="division by zero"):
            second.query()

    def test_each_time_with_a_traceback_of_its_own(self, accelerator: SimulatedAccelerator):
        stream = accelerator.side_stream(accelerator.devices[0])
        accelerator.launch(lambda: 1 / 0, stream=stream)
        event = accelerator.record(stream)
        accelerator.synchronize()
        errors = []
        for _ in range(2):
            with pytest.raises(SimulatedDeviceError) as caught:
                event.query()
            errors.append(caught.value)
        assert errors[0] is not errors[1]

    def test_recovery(self, accelerator: SimulatedAccelerator):
        stream = accelerator.side_stream(accelerator.devices[0])
        accelerator.launch(lambda: 1 / 0, stream=stream)
        accelerator.synchronize()
        accelerator.recover()
        done: list[int] = []
        accelerator.launch(lambda: done.append(1), stream=stream)
        accelerator.synchronize()
        assert done == [1]

    def test_a_wait_for_what_failed_is_over_too(self, accelerator: SimulatedAccelerator):
        first, second = (accelerator.side_stream(device) for device in accelerator.devices)
        accelerator.launch(lambda: 1 / 0, stream=first)
        event = accelerator.record(first)
        second.wait_event(event)
        while not event.completed:
            accelerator.step(first)
        accelerator.recover()
        done: list[int] = []
        accelerator.launch(lambda: done.append(1), stream=second)
        accelerator.synchronize()
        assert done == [1]
        assert second.query()
        with pytest.raises(SimulatedDeviceError, match="division by zero"):
            event.query()


class TestEvents:
    def test_fails_alone(self, accelerator: SimulatedAccelerator):
        stream, other = accelerator.side_stream(accelerator.devices[0]), accelerator.side_stream(accelerator.devices[0])
        accelerator.fail_next("event")
        bad, good = accelerator.record(stream), accelerator.record(stream)
        accelerator.wait(other, bad)
        done: list[int] = []
        accelerator.launch(lambda: done.append(1), stream=other)
        accelerator.synchronize()
        with pytest.raises(SimulatedDeviceError, match="the test wanted"):
            bad.query()
        assert good.query()
        assert stream.query()
        assert other.query()
        assert done == [1]

    def test_not_before_it_completes(self, accelerator: SimulatedAccelerator):
        accelerator.fail_next("event")
        event = accelerator.record(accelerator.side_stream(accelerator.devices[0]))
        assert not event.query()


class TestMemory:
    def test_registration(self, accelerator: SimulatedAccelerator):
        accelerator.fail_next("registration")
        with pytest.raises(OSError, match="refuses"):
            accelerator.register(0x1000, 4096, accelerator.devices[0])
        accelerator.register(0x1000, 4096, accelerator.devices[0])

    def test_allocation(self, accelerator: SimulatedAccelerator):
        accelerator.fail_next("allocation", after=1)
        accelerator.empty(4)
        with pytest.raises(torch.OutOfMemoryError):
            accelerator.empty(4)
        accelerator.empty(4)


class TestDevice:
    def test_everything_on_it_raises(self, accelerator: SimulatedAccelerator):
        device = accelerator.devices[0]
        stream = accelerator.side_stream(device)
        tensor = accelerator.to_device(torch.ones(4))
        event = accelerator.record(stream)
        accelerator.fail_device()
        host = torch.zeros(4)
        for call in (
            event.query,
            stream.query,
            lambda: accelerator.record(stream),
            lambda: accelerator.wait(stream, event),
            lambda: accelerator.copy([host], [tensor], stream),
            lambda: accelerator.launch(lambda: None, stream=stream),
            lambda: accelerator.empty(4),
            lambda: accelerator.pack([tensor], stream),
            lambda: accelerator.register(0x1000, 4096, device),
        ):
            with pytest.raises(SimulatedDeviceError, match="has failed"):
                call()

    def test_the_others_work_on(self, accelerator: SimulatedAccelerator):
        accelerator.fail_device(accelerator.devices[0])
        tensor = accelerator.to_device(torch.ones(4), accelerator.devices[1])
        accelerator.synchronize()
        assert torch.equal(tensor, torch.ones(4))

    def test_what_was_enqueued_is_not_executed(self, accelerator: SimulatedAccelerator):
        done: list[int] = []
        accelerator.launch(lambda: done.append(1))
        accelerator.fail_device()
        accelerator.synchronize()
        accelerator.recover()
        accelerator.synchronize()
        assert done == []

    def test_in_real_time_it_wakes_blocked_threads(self):
        with SimulatedAccelerator() as accelerator:
            stream = accelerator.side_stream(accelerator.devices[0])
            accelerator.launch(lambda: 1 / 0, stream=stream, seconds=0.001)
            with pytest.raises(SimulatedDeviceError, match="division by zero"):
                stream.synchronize()
