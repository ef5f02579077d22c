"""The simulated accelerator's time: a clock that a test moves, or the real one."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

from aiostage.testing import SimulatedAccelerator, VirtualClock

MIB = 1 << 20


class Bell:
    """A timeline that rings at given times."""

    def __init__(self, clock: VirtualClock, *times: float) -> None:
        self.clock = clock
        self.times = list(times)
        self.rung: list[float] = []

    def due(self) -> float | None:
        return self.times[0] if self.times else None

    def happen(self) -> None:
        self.times.pop(0)
        self.rung.append(self.clock.time())


class TestVirtualClock:
    def test_stands_still(self):
        clock = VirtualClock(5.0)
        assert clock.time() == 5.0
        clock.advance(0.5)
        assert clock.time() == 5.5

    def test_what_is_due_happens_in_order(self):
        clock = VirtualClock()
        bells = [Bell(clock, 1.0, 3.0), Bell(clock, 2.0, 9.0)]
        for bell in bells:
            clock.attach(bell)
        clock.advance(5.0)
        assert [bell.rung for bell in bells] == [[1.0, 3.0], [2.0]]
        assert clock.time() == 5.0

    def test_to_the_end_of_time(self):
        clock = VirtualClock()
        bell = Bell(clock, 1.0, 100.0)
        clock.attach(bell)
        clock.advance(float("inf"))
        assert bell.rung == [1.0, 100.0]
        assert clock.time() == 100.0

    def test_detached_is_left_alone(self):
        clock = VirtualClock()
        bell = Bell(clock, 1.0)
        clock.attach(bell)
        clock.detach(bell)
        clock.advance(2.0)
        assert bell.rung == []

    def test_does_not_run_backwards(self):
        with pytest.raises(ValueError, match="0 seconds or more"):
            VirtualClock().advance(-1)


class TestVirtualTime:
    def test_copies_take_latency_and_bandwidth(self):
        clock = VirtualClock()
        accelerator = SimulatedAccelerator(clock=clock, bandwidth=1e9, latency=1e-3)
        tensor = accelerator.empty(250_000)
        side = accelerator.side_stream(accelerator.devices[0])
        host = torch.empty(250_000)
        begin = accelerator.record(side)
        accelerator.copy([host], [tensor], side)
        end = accelerator.record(side)
        clock.advance(0.0015)
        assert not end.query()
        clock.advance(0.0005)
        assert end.query()
        assert end.completed_at - begin.completed_at == pytest.approx(0.002)

    def test_streams_overlap_and_a_direction_has_one_engine(self):
        clock = VirtualClock()
        accelerator = SimulatedAccelerator(clock=clock, bandwidth=1e9, latency=0.0)
        device = accelerator.devices[0]
        tensors, hosts = [accelerator.empty(250_000) for _ in range(3)], [torch.empty(250_000) for _ in range(3)]
        for tensor, host, up in zip(tensors, hosts, (False, False, True), strict=True):
            stream = accelerator.side_stream(device)
            accelerator.copy([tensor] if up else [host], [host] if up else [tensor], stream)
        accelerator.launch(lambda: None, seconds=0.0015, stream=accelerator.side_stream(device))
        accelerator.synchronize()
        assert clock.time() == pytest.approx(0.002)

    def test_a_later_wait_begins_later(self):
        clock = VirtualClock()
        accelerator = SimulatedAccelerator(clock=clock)
        device = accelerator.devices[0]
        first, second = accelerator.side_stream(device), accelerator.side_stream(device)
        accelerator.launch(lambda: None, seconds=1.0, stream=first)
        second.wait_stream(first)
        accelerator.launch(lambda: None, seconds=0.5, stream=second)
        accelerator.synchronize()
        assert clock.time() == pytest.approx(1.5)

    def test_two_accelerators_on_one_clock(self):
        clock = VirtualClock()
        done: list[str] = []
        with SimulatedAccelerator(clock=clock) as first, SimulatedAccelerator(clock=clock) as second:
            second.launch(lambda: done.append("second"), seconds=1.0)
            first.launch(lambda: done.append("first"), seconds=2.0)
            clock.advance(3.0)
        assert done == ["second", "first"]

    def test_a_closed_one_leaves_the_clock(self):
        clock = VirtualClock()
        accelerator = SimulatedAccelerator(clock=clock)
        accelerator.launch(lambda: None)
        accelerator.close()
        accelerator.close()
        gone = weakref.ref(accelerator)
        del accelerator
        gc.collect()
        assert gone() is None

    def test_a_closed_one_refuses(self):
        accelerator = SimulatedAccelerator(clock=VirtualClock())
        accelerator.close()
        with pytest.raises(RuntimeError, match="closed"):
            accelerator.launch(lambda: None)


class TestSpontaneous:
    def test_queries_make_it_go_on(self):
        for seed in range(50):
            accelerator = SimulatedAccelerator(seed=seed, spontaneous=True)
            tensor = accelerator.to_device(torch.ones(4))
            event = accelerator.record(accelerator.current_stream(accelerator.devices[0]))
            for _ in range(1000):
                if event.query():
                    break
            assert event.query()
            assert torch.equal(tensor, torch.ones(4))


class TestRealTime:
    def test_goes_on_by_itself(self):
        with SimulatedAccelerator() as accelerator:
            device = accelerator.devices[0]
            tensor = accelerator.to_device(torch.ones(4))
            side = accelerator.side_stream(device)
            side.wait_stream(accelerator.current_stream(device))
            host = torch.zeros(4)
            accelerator.copy([host], [tensor], side)
            side.synchronize()
            assert torch.equal(host, torch.ones(4))
            assert side.query()

    def test_cannot_be_stepped(self):
        with SimulatedAccelerator() as accelerator:
            with pytest.raises(RuntimeError, match="real time"):
                accelerator.step()
            with pytest.raises(RuntimeError, match="real time"):
                _ = accelerator.clock

    def test_takes_its_time(self):
        with SimulatedAccelerator() as accelerator:
            stream = accelerator.side_stream(accelerator.devices[0])
            begin = accelerator.record(stream)
            accelerator.launch(lambda: None, seconds=0.01, stream=stream)
            end = accelerator.record(stream)
            end.synchronize()
            assert end.completed_at - begin.completed_at >= 0.01

    def test_closing_ends_the_thread(self):
        accelerator = SimulatedAccelerator()
        accelerator.launch(lambda: None, seconds=3600)
        assert any(thread.name == "simulated-accelerator" for thread in threading.enumerate())
        accelerator.close()
        assert not any(thread.name == "simulated-accelerator" for thread in threading.enumerate())

    def test_many_threads_enqueue(self):
        with SimulatedAccelerator(latency=0.0) as accelerator:
            device = accelerator.devices[0]
            failures: list[BaseException] = []

            def work(value: float) -> None:
                try:
                    stream = accelerator.side_stream(device)
                    for _ in range(20):
                        with stream:
                            tensor = accelerator.to_device(torch.full((16,), value))
                            host = torch.zeros(16)
                            accelerator.copy([host], [tensor], stream)
                        stream.synchronize()
                        assert torch.equal(host, torch.full((16,), value))
                except BaseException as error:
                    failures.append(error)

            threads = [threading.Thread(target=work, args=(float(value),)) for value in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert failures == []
