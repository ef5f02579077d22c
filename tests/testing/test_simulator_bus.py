"""What shares the bus of a simulated device takes as long as all the bytes ahead of it do."""

from __future__ import annotations

import pytest
import torch

from aiostage.testing import SimulatedAccelerator, SimulatedEvent, SimulatedStream, VirtualClock
from benchmarks.interference import LIMITS, STEPS, measure

BUS = 1e9


def accelerator(**options: float) -> SimulatedAccelerator:
    return SimulatedAccelerator(clock=VirtualClock(), bus_bandwidth=BUS, **options)  # type: ignore[arg-type]


def moving(of: SimulatedAccelerator, seconds: float, *, low_priority: bool = False, **options: float) -> SimulatedEvent:
    """Enqueue what would take the whole bus for some time, on a stream of its own."""
    stream = of.side_stream(of.devices[0], low_priority=low_priority)
    of.launch(lambda: None, seconds=seconds, moved_bytes=int(seconds * BUS), stream=stream)
    return stream.record_event()


def completed(of: SimulatedAccelerator, *events: SimulatedEvent) -> list[float]:
    of.synchronize()
    times = [event.completed_at for event in events]
    assert None not in times
    return [round(time, 9) for time in times if time is not None]


class TestSharing:
    def test_alone_it_takes_its_time(self):
        with accelerator() as it:
            assert completed(it, moving(it, 2.0)) == [2]

    def test_two_take_twice_as_long_until_one_is_done(self):
        with accelerator() as it:
            assert completed(it, moving(it, 1.0), moving(it, 3.0)) == [2, 4]

    def test_a_later_waiter_shares_from_then_on(self):
        with accelerator() as it:
            first = moving(it, 2.0)
            it.clock.advance(1)
            assert completed(it, first, moving(it, 2.0)) == [3, 4]

    def test_the_modest_leave_the_rest_to_others(self):
        with accelerator() as it:
            modest = it.side_stream(it.devices[0])
            it.launch(lambda: None, seconds=4.0, moved_bytes=int(BUS), stream=modest)
            assert completed(it, modest.record_event(), moving(it, 3.0, low_priority=True)) == [4, 4]

    def test_what_moves_nothing_is_not_slowed(self):
        with accelerator() as it:
            stream: SimulatedStream = it.side_stream(it.devices[0])
            it.launch(lambda: None, seconds=3.0, stream=stream)
            assert completed(it, stream.record_event(), moving(it, 1.0), moving(it, 1.0)) == [3, 2, 2]

    def test_low_priority_gets_what_is_left(self):
        with accelerator() as it:
            low = moving(it, 1.0, low_priority=True)
            it.clock.advance(0.5)
            assert completed(it, low, moving(it, 2.0)) == [3, 2.5]

    def test_copies_of_both_directions_share_it(self):
        with accelerator(bandwidth=BUS, latency=0.0) as it:
            size, device = 1_000_000, it.devices[0]
            tensors = [it.empty(size, dtype=torch.uint8) for _ in range(2)]
            host = [torch.zeros(size, dtype=torch.uint8) for _ in range(2)]
            it.synchronize()
            began, events = it.clock.time(), []
            for destination, source in ((host[0], tensors[0]), (tensors[1], host[1])):
                stream = it.side_stream(device, low_priority=False)
                it.copy([destination], [source], stream)
                events.append(stream.record_event())
            assert completed(it, *events) == [round(began + 0.002, 9)] * 2

    def test_devices_have_one_each(self):
        with SimulatedAccelerator(2, clock=VirtualClock(), bus_bandwidth=BUS) as it:
            events = []
            for device in it.devices:
                stream = it.side_stream(device)
                it.launch(lambda: None, seconds=1.0, moved_bytes=int(BUS), stream=stream)
                events.append(stream.record_event())
            assert completed(it, *events) == [1, 1]

    def test_in_real_time_too(self):
        with SimulatedAccelerator(bus_bandwidth=BUS) as it:
            events = [moving(it, 0.1), moving(it, 0.1)]
            it.synchronize()
            began, ended = (event.completed_at for event in events)
            assert began is not None
            assert ended is not None
            assert abs(ended - began) < 0.08, "side by side, and not one after the other"

    def test_without_bandwidth_there_is_an_error(self):
        with pytest.raises(ValueError, match="bus_bandwidth is above 0"):
            SimulatedAccelerator(bus_bandwidth=0.0)


def test_the_table_of_interference_says_what_the_documentation_says() -> None:
    tables = measure()
    assert list(tables) == list(STEPS)
    for rows in tables.values():
        alone = rows["no staging"].step
        for limit in LIMITS:
            low, same = rows[f"{limit}, low priority"], rows[f"{limit}, same priority"]
            assert alone <= low.step <= same.step
            assert same.staged <= low.staged
            assert low.step == pytest.approx(rows["no limit, low priority"].step, rel=0.01)
    half = tables["half of the bus"]
    assert half["no limit, low priority"].step == pytest.approx(half["no staging"].step)
    assert half["no limit, same priority"].step > 1.1 * half["no staging"].step
