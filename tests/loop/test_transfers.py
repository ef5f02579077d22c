"""Forecasts of transfers: how often they make somebody look, and what they learn."""

from __future__ import annotations

import math

import pytest

from aiostage._loop import transfers
from aiostage._loop.transfers import BandwidthEstimator, time_to_next_look

GIB = 1 << 30


class Clock:
    """The time that transfers see."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(transfers, "monotonic", clock)
    return clock


def looks(duration: float, forecast: float | None, uncertainty: float = 0.0) -> tuple[int, float]:
    """Return how many looks it takes to see something, and how late the last one is."""
    now, count = 0.0, 1
    while now < duration:
        remaining = None if forecast is None else forecast - now
        now += time_to_next_look(now, remaining, uncertainty)
        count += 1
    return count, now - duration


class TestLooking:
    @pytest.mark.parametrize("error", [-1e-3, -1e-4, 0.0, 1e-4, 1e-3])
    def test_a_forecast_of_a_second(self, error: float):
        count, late = looks(1 + error, 1.0, 5e-4)
        assert count <= 64
        assert late <= 1e-4

    @pytest.mark.parametrize("uncertainty", [0.0, 1e-6, 1e-4, 3e-3, 0.1, 2.0])
    def test_is_bounded_for_any_forecast(self, uncertainty: float):
        assert looks(1.0, 1.0, uncertainty)[0] <= 64

    @pytest.mark.parametrize("forecast", [1e-6, 0.01, 0.1, 0.5, 2.0, 10.0])
    def test_a_wrong_forecast_is_never_worse_than_late_by_a_share(self, forecast: float):
        count, late = looks(1.0, forecast, 1e-3)
        assert count <= 250
        assert late <= max(abs(1 - forecast), 0.01)

    def test_without_a_forecast_it_backs_off(self):
        for duration in (1e-3, 0.1, 1.0, 10.0):
            count, late = looks(duration, None)
            assert late <= max(duration / 32, 5e-5) + 1e-12
            assert late <= 0.01 + 1e-12
            assert count <= 32 * (2 + max(0.0, math.log(duration * 1000))) + 100 * duration

    def test_is_never_finer_than_its_grain(self):
        for remaining in (None, 1e-9, 0.0, -1e-9):
            assert time_to_next_look(0.0, remaining) == 50e-6


class TestLearning:
    def test_nothing_is_known_at_first(self, clock: Clock):
        assert BandwidthEstimator().announce("device", GIB).expected() is None

    def test_the_next_is_judged_by_the_last(self, clock: Clock):
        bandwidth = BandwidthEstimator()
        first = bandwidth.announce("device", GIB)
        clock.now += 2
        first.arrived(clock.now, clock.now)
        second = bandwidth.announce("device", GIB // 2)
        expected = second.expected()
        assert expected is not None
        assert expected.when == pytest.approx(clock.now + 1)

    def test_devices_differ(self, clock: Clock):
        bandwidth = BandwidthEstimator()
        first = bandwidth.announce("device", GIB)
        clock.now += 2
        first.arrived(clock.now, clock.now)
        assert bandwidth.announce("another", GIB).expected() is None

    def test_transfers_of_a_device_follow_one_another(self, clock: Clock):
        bandwidth = BandwidthEstimator()
        first = bandwidth.announce("device", GIB)
        clock.now += 1
        first.arrived(clock.now, clock.now)
        queue = [bandwidth.announce("device", GIB) for _ in range(3)]
        ends = [expected.when - clock.now for transfer in queue if (expected := transfer.expected())]
        assert ends == pytest.approx([1, 2, 3])

    def test_lateness_is_inherited(self, clock: Clock):
        bandwidth = BandwidthEstimator()
        first = bandwidth.announce("device", GIB)
        clock.now += 1
        first.arrived(clock.now, clock.now)
        second, third = (bandwidth.announce("device", GIB) for _ in range(2))
        clock.now += 5
        second.arrived(clock.now, clock.now)
        expected = third.expected()
        assert expected is not None
        assert expected.when == pytest.approx(clock.now + 1)

    def test_after_a_pause_lateness_is_forgotten(self, clock: Clock):
        bandwidth = BandwidthEstimator()
        first = bandwidth.announce("device", GIB)
        clock.now += 1
        first.arrived(clock.now, clock.now)
        clock.now += 100
        expected = bandwidth.announce("device", GIB).expected()
        assert expected is not None
        assert expected.when == pytest.approx(clock.now + 1)

    def test_what_was_seen_long_after_teaches_nothing(self, clock: Clock):
        bandwidth = BandwidthEstimator()
        first = bandwidth.announce("device", GIB)
        clock.now += 10
        first.arrived(clock.now, clock.now - 9)
        assert bandwidth.announce("device", GIB).expected() is None

    def test_a_faster_one_is_believed_although_seen_late(self, clock: Clock):
        bandwidth = BandwidthEstimator()
        first = bandwidth.announce("device", GIB)
        clock.now += 10
        first.arrived(clock.now, clock.now)
        for _ in range(30):
            transfer = bandwidth.announce("device", GIB)
            clock.now += 1
            transfer.arrived(clock.now, clock.now - 0.9)
        expected = bandwidth.announce("device", GIB).expected()
        assert expected is not None
        assert clock.now + 0.5 < expected.when < clock.now + 1.1

    def test_uncertainty_follows_what_was_seen(self, clock: Clock):
        bandwidth = BandwidthEstimator()
        uncertainties = []
        for duration in (1.0, *[1.0] * 20, *[1.2, 0.8] * 20):
            transfer = bandwidth.announce("device", GIB)
            if (expected := transfer.expected()) is not None:
                uncertainties.append(expected.uncertainty)
            clock.now += duration
            transfer.arrived(clock.now, clock.now)
        assert uncertainties[19] < 1e-4
        assert 0.1 < uncertainties[-1] < 0.4

    def test_small_ones_are_left_out(self, clock: Clock):
        bandwidth = BandwidthEstimator()
        first = bandwidth.announce("device", 1000)
        clock.now += 1
        first.arrived(clock.now, clock.now)
        assert bandwidth.announce("device", GIB).expected() is None
