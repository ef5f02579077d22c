"""The simulated accelerator does what a device does: in order, late, and without mercy for who does not wait."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from aiostage.abc import Backend, SupportsQuery
from aiostage.testing import SimulatedAccelerator, SimulatedEvent, SimulatedHazardError, SimulatedStream, VirtualClock

SIZE = 8
MIB = 1 << 20


@pytest.fixture
def accelerator() -> SimulatedAccelerator:
    return SimulatedAccelerator(clock=VirtualClock())


def full(value: float) -> torch.Tensor:
    return torch.full((SIZE,), float(value))


def fill(value: float) -> Callable[[torch.Tensor], object]:
    return lambda tensor: tensor.fill_(value)


def bring(accelerator: SimulatedAccelerator, tensor: torch.Tensor, stream: SimulatedStream) -> torch.Tensor:
    host = torch.zeros(tensor.shape, dtype=tensor.dtype)
    accelerator.copy([host], [tensor], stream)
    return host


def test_is_a_backend(accelerator: SimulatedAccelerator) -> None:
    assert isinstance(accelerator, Backend)
    assert isinstance(accelerator.record(accelerator.current_stream(accelerator.devices[0])), SupportsQuery)
    assert accelerator.unavailable_reason is None
    assert accelerator.pinned_memory_reason is None


class TestDevices:
    def test_none_is_active_at_first(self):
        assert list(SimulatedAccelerator(2, clock=VirtualClock()).active_devices()) == []

    def test_what_is_used_is_active(self):
        accelerator = SimulatedAccelerator(2, clock=VirtualClock())
        accelerator.to_device(full(1), accelerator.devices[1])
        assert list(accelerator.active_devices()) == [accelerator.devices[1]]

    def test_tensors_are_distinguished_by_their_memory(self):
        accelerator = SimulatedAccelerator(2, clock=VirtualClock())
        for device in accelerator.devices:
            tensor = accelerator.to_device(full(1), device)
            assert accelerator.device_of(tensor) == device
            assert accelerator.device_of(tensor[2:4]) == device
        assert accelerator.device_of(full(1)) is None

    def test_guard(self):
        accelerator = SimulatedAccelerator(2, clock=VirtualClock())
        with accelerator.guard(accelerator.devices[1]):
            assert accelerator.device_of(accelerator.empty(3)) == accelerator.devices[1]
        assert accelerator.device_of(accelerator.empty(3)) == accelerator.devices[0]

    def test_refuses_what_cannot_be(self):
        with pytest.raises(ValueError, match="1 device or more"):
            SimulatedAccelerator(0)
        with pytest.raises(ValueError, match="seed"):
            SimulatedAccelerator(spontaneous=True)


class TestQueues:
    def test_nothing_happens_by_itself(self, accelerator: SimulatedAccelerator):
        tensor = accelerator.to_device(full(1))
        event = accelerator.record(accelerator.current_stream(accelerator.devices[0]))
        assert not event.query()
        assert not bool((tensor == 1).all())

    def test_a_stream_is_in_order(self, accelerator: SimulatedAccelerator):
        tensor = accelerator.to_device(full(0))
        for _ in range(5):
            accelerator.launch(lambda t: t.mul_(2).add_(1), tensor)
        accelerator.synchronize()
        assert torch.equal(tensor, full(31))

    @pytest.mark.parametrize("seed", range(20))
    def test_a_stream_is_in_order_for_any_seed(self, seed: int):
        accelerator = SimulatedAccelerator(seed=seed)
        device = accelerator.devices[0]
        done: list[tuple[int, int]] = []
        for number in range(3):
            with accelerator.side_stream(device):
                for step in range(4):
                    accelerator.launch(lambda number=number, step=step: done.append((number, step)))
        accelerator.synchronize()
        for number in range(3):
            assert [step for which, step in done if which == number] == [0, 1, 2, 3]

    def test_seeds_give_many_orders_and_each_the_same_again(self):
        def order(seed: int) -> tuple[int, ...]:
            accelerator = SimulatedAccelerator(seed=seed)
            done: list[int] = []
            for number in range(3):
                with accelerator.side_stream(accelerator.devices[0]):
                    for _ in range(2):
                        accelerator.launch(lambda number=number: done.append(number))
            accelerator.synchronize()
            return tuple(done)

        orders = [order(seed) for seed in range(200)]
        # Of the 90 orders that three streams of two operations have.
        assert len(set(orders)) > 70
        assert orders == [order(seed) for seed in range(200)]

    def test_the_test_may_choose(self, accelerator: SimulatedAccelerator):
        device = accelerator.devices[0]
        first, second = accelerator.side_stream(device), accelerator.side_stream(device)
        done: list[str] = []
        accelerator.launch(lambda: done.append("first"), stream=first)
        accelerator.launch(lambda: done.append("second"), stream=second)
        assert accelerator.ready() == [first, second]
        accelerator.step(second)
        accelerator.step(first)
        assert done == ["second", "first"]
        assert not accelerator.step()
        with pytest.raises(ValueError, match="nothing that can be executed"):
            accelerator.step(first)

    def test_streams_wait_for_events_on_the_device(self, accelerator: SimulatedAccelerator):
        device = accelerator.devices[0]
        first, second = accelerator.side_stream(device), accelerator.side_stream(device)
        done: list[str] = []
        accelerator.launch(lambda: done.append("first"), stream=first, seconds=1.0)
        accelerator.wait(second, accelerator.record(first))
        accelerator.launch(lambda: done.append("second"), stream=second)
        assert accelerator.ready() == [first]
        accelerator.synchronize()
        assert done == ["first", "second"]

    def test_an_event_is_about_what_was_enqueued_before_it(self, accelerator: SimulatedAccelerator):
        stream = accelerator.side_stream(accelerator.devices[0])
        accelerator.launch(lambda: None, stream=stream)
        event = stream.record_event()
        accelerator.launch(lambda: None, stream=stream)
        accelerator.step()
        accelerator.step()
        assert event.query()
        assert not stream.query()

    def test_current_streams_are_a_matter_of_with(self, accelerator: SimulatedAccelerator):
        device = accelerator.devices[0]
        default, side = accelerator.current_stream(device), accelerator.side_stream(device)
        with side:
            assert accelerator.current_stream(device) is side
        assert accelerator.current_stream(device) is default

    def test_waiting_for_what_never_comes_is_said(self, accelerator: SimulatedAccelerator):
        stream = accelerator.side_stream(accelerator.devices[0])
        other = accelerator.side_stream(accelerator.devices[0])
        stranger = SimulatedEvent(other, fails=False)
        stream.wait_event(stranger)
        with pytest.raises(RuntimeError, match="nothing is left"):
            stream.synchronize()

    def test_a_tensor_of_another_device_is_refused(self):
        accelerator = SimulatedAccelerator(2, clock=VirtualClock())
        tensor = accelerator.to_device(full(1), accelerator.devices[0])
        stream = accelerator.side_stream(accelerator.devices[1])
        with pytest.raises(ValueError, match="was given to"):
            bring(accelerator, tensor, stream)
        with pytest.raises(ValueError, match="was given to"):
            accelerator.launch(fill(1), tensor, stream=stream)


class TestCopies:
    @pytest.mark.parametrize("value", [torch.arange(6.0), torch.arange(6).reshape(2, 3).t(), torch.tensor(3.5)])
    def test_there_and_back(self, accelerator: SimulatedAccelerator, value: torch.Tensor):
        tensor = accelerator.to_device(value)
        assert tensor.stride() == value.stride()
        host = bring(accelerator, tensor, accelerator.current_stream(accelerator.devices[0]))
        accelerator.synchronize()
        assert torch.equal(host, value)

    def test_conjugate_and_negative_views_by_value(self, accelerator: SimulatedAccelerator):
        value = torch.tensor([1 + 2j, 3 - 1j])
        tensor = accelerator.to_device(value)
        stream = accelerator.current_stream(accelerator.devices[0])
        conjugate, negative = bring(accelerator, tensor.conj(), stream), torch.zeros(2)
        accelerator.copy([negative], [tensor.conj().imag], stream)
        accelerator.synchronize()
        assert torch.equal(conjugate, value.conj().resolve_conj())
        assert torch.equal(negative, -value.imag)

    def test_casts(self, accelerator: SimulatedAccelerator):
        host = torch.zeros(SIZE, dtype=torch.bfloat16)
        tensor = accelerator.to_device(full(3))
        accelerator.copy([host], [tensor], accelerator.current_stream(accelerator.devices[0]))
        accelerator.synchronize()
        assert torch.equal(host, full(3).bfloat16())

    def test_the_source_is_read_when_the_copy_is_made(self, accelerator: SimulatedAccelerator):
        tensor = accelerator.to_device(full(1))
        accelerator.synchronize()
        side = accelerator.side_stream(accelerator.devices[0])
        host = bring(accelerator, tensor, side)
        accelerator.launch(fill(2), tensor)
        accelerator.step(accelerator.current_stream(accelerator.devices[0]))
        accelerator.synchronize()
        assert torch.equal(host, full(2))

    @pytest.mark.parametrize("wait", [True, False])
    def test_a_removed_wait_gives_wrong_bytes(self, wait: bool):
        wrong = 0
        for seed in range(100):
            accelerator = SimulatedAccelerator(seed=seed)
            device = accelerator.devices[0]
            tensor = accelerator.to_device(full(1))
            side = accelerator.side_stream(device)
            if wait:
                accelerator.wait(side, accelerator.record(accelerator.current_stream(device)))
            host = bring(accelerator, tensor, side)
            accelerator.synchronize()
            wrong += not torch.equal(host, full(1))
        assert (wrong == 0) is wait

    def test_shapes_must_agree(self, accelerator: SimulatedAccelerator):
        tensor = accelerator.to_device(full(1))
        with pytest.raises(ValueError, match="shape"):
            accelerator.copy([torch.zeros(3)], [tensor], accelerator.side_stream(accelerator.devices[0]))

    def test_what_goes_up_is_read_late_too(self, accelerator: SimulatedAccelerator):
        tensor, host = accelerator.empty(SIZE), full(1)
        accelerator.copy([tensor], [host], accelerator.current_stream(accelerator.devices[0]))
        host.fill_(2)
        accelerator.synchronize()
        assert torch.equal(tensor, full(2))

    def test_pack(self, accelerator: SimulatedAccelerator):
        parts = [accelerator.to_device(torch.arange(float(n))) for n in (3, 0, 2)]
        flat, launches = accelerator.pack(parts, accelerator.current_stream(accelerator.devices[0]))
        accelerator.synchronize()
        assert launches == 1
        assert flat.tolist() == [0, 1, 2, 0, 1]

    def test_versions_go_up_when_a_kernel_is_launched(self, accelerator: SimulatedAccelerator):
        written, read = accelerator.to_device(full(1)), accelerator.to_device(full(2))
        versions = written._version, read._version
        accelerator.launch(lambda a, b: a.copy_(b), written, reads=[read])
        assert (written._version, read._version) == (versions[0] + 1, versions[1])
        accelerator.synchronize()
        assert torch.equal(written, full(2))
        assert (written._version, read._version) == (versions[0] + 1, versions[1])


class TestHostMemory:
    def test_that_is_gone_is_a_violation(self):
        def lose_it() -> None:
            with SimulatedAccelerator(clock=VirtualClock()) as accelerator:
                tensor = accelerator.to_device(full(1))
                accelerator.synchronize()
                bring(accelerator, tensor, accelerator.side_stream(accelerator.devices[0]))
                accelerator.synchronize()

        with pytest.raises(SimulatedHazardError, match="was gone"):
            lose_it()

    def test_nothing_enqueued_keeps_it_alive(self, accelerator: SimulatedAccelerator):
        tensor = accelerator.to_device(full(1))
        accelerator.synchronize()
        bring(accelerator, tensor, accelerator.side_stream(accelerator.devices[0]))
        accelerator.synchronize()
        assert len(accelerator.violations) == 1

    def test_registration(self, accelerator: SimulatedAccelerator):
        device = accelerator.devices[0]
        accelerator.register(0x1000, 4096, device)
        assert accelerator.statistics().registered_bytes == 4096
        with pytest.raises(OSError, match="already"):
            accelerator.register(0x1800, 4096, device)
        accelerator.unregister(0x1000, device)
        with pytest.raises(OSError, match="not registered"):
            accelerator.unregister(0x1000, device)
        assert accelerator.statistics().registered_bytes == 0

    def test_registration_has_a_limit(self):
        accelerator = SimulatedAccelerator(clock=VirtualClock(), max_registered_bytes=8192)
        device = accelerator.devices[0]
        accelerator.register(0x1000, 8192, device)
        with pytest.raises(OSError, match="refuses"):
            accelerator.register(0x8000, 1, device)
        accelerator.unregister(0x1000, device)
        accelerator.register(0x8000, 1, device)


class TestAllocator:
    def test_freed_memory_is_reused_at_once(self, accelerator: SimulatedAccelerator):
        first = accelerator.empty(SIZE)
        address = first.data_ptr()
        del first
        assert accelerator.empty(SIZE).data_ptr() == address

    def test_a_view_keeps_it(self, accelerator: SimulatedAccelerator):
        first = accelerator.empty(SIZE)
        view, address = first[2:], first.data_ptr()
        del first
        assert accelerator.empty(SIZE).data_ptr() != address
        del view
        assert accelerator.empty(SIZE).data_ptr() == address

    def test_by_the_stream_that_it_was_allocated_for(self, accelerator: SimulatedAccelerator):
        first = accelerator.empty(SIZE)
        address = first.data_ptr()
        del first
        with accelerator.side_stream(accelerator.devices[0]):
            assert accelerator.empty(SIZE).data_ptr() != address
        assert accelerator.empty(SIZE).data_ptr() == address

    def test_use_after_free_shows(self, accelerator: SimulatedAccelerator):
        tensor = accelerator.to_device(full(1))
        accelerator.synchronize()
        host = bring(accelerator, tensor, accelerator.side_stream(accelerator.devices[0]))
        del tensor
        other = accelerator.to_device(full(2))
        accelerator.current_stream(accelerator.devices[0]).synchronize()
        accelerator.synchronize()
        assert torch.equal(other, full(2))
        assert torch.equal(host, full(2))

    def test_freed_memory_is_poisoned(self, accelerator: SimulatedAccelerator):
        tensor = accelerator.to_device(full(1))
        accelerator.synchronize()
        side = accelerator.side_stream(accelerator.devices[0])
        host = bring(accelerator, tensor, side)
        del tensor
        accelerator.ready()
        accelerator.step(accelerator.current_stream(accelerator.devices[0]))
        accelerator.synchronize()
        assert bool(host.isnan().all())

    def test_record_stream_is_respected(self, accelerator: SimulatedAccelerator):
        tensor = accelerator.to_device(full(1))
        accelerator.synchronize()
        side = accelerator.side_stream(accelerator.devices[0])
        host = bring(accelerator, tensor, side)
        accelerator.keep(tensor, side)
        address = tensor.data_ptr()
        del tensor
        other = accelerator.to_device(full(2))
        assert other.data_ptr() != address
        accelerator.synchronize()
        assert torch.equal(host, full(1))
        assert accelerator.empty(SIZE).data_ptr() == address

    def test_is_of_finite_size(self):
        accelerator = SimulatedAccelerator(clock=VirtualClock(), memory_bytes=MIB)
        kept = accelerator.empty(MIB // 8)
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            accelerator.empty(MIB // 4)
        del kept
        assert accelerator.statistics().allocated_bytes == 0

    def test_counts(self, accelerator: SimulatedAccelerator):
        tensor = accelerator.empty(1024)
        assert accelerator.statistics().allocated_bytes == 4096
        del tensor
        statistics = accelerator.statistics()
        assert (statistics.allocated_bytes, statistics.cached_bytes) == (0, 4096)

    def test_tensors_outlive_the_accelerator(self):
        accelerator = SimulatedAccelerator(clock=VirtualClock())
        tensor = accelerator.to_device(full(1))
        accelerator.synchronize()
        accelerator.close()
        del accelerator
        assert torch.equal(tensor, full(1))
