"""When bytes that are on their way will have arrived, judged by those that came before."""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import NamedTuple
from weakref import WeakKeyDictionary

__all__ = ["BandwidthEstimator", "Expectation", "Transfer", "time_to_next_look"]

_FINEST_SECONDS = 50e-6
"""Between two looks when something is about to happen. A look costs the loop some 20 to 40 us, so this is as often as
looking can be without being all that the loop does."""

_FINEST_BEFORE_ARRIVAL_SECONDS = 25e-6
"""The same where it is about to happen by a forecast: the loop is given its turns and not slept on there, so that
looking is all that it does anyway."""

_COARSEST_SECONDS = 0.01
"""Between two looks at what gives no sign of when it will happen."""

_SMALLEST_BYTES = 1 << 20
"""Smaller transfers are over before anything could be learnt from them."""

_GAIN_FASTER, _GAIN_SLOWER = 0.25, 0.125
"""How much of what a transfer shows is believed. A copy that was slower than usual has most often waited for something
else, and a faster one cannot have cheated."""

_GAIN_DEVIATION = 0.25
_FIRST_DEVIATION = 0.002
"""How far forecasts are off, as a share of the duration, before it has been seen. Guessed."""


class Expectation(NamedTuple):
    """When something should happen.

    Attributes:
        when: A time of :func:`time.monotonic`.
        uncertainty: By how many seconds such a forecast has been wrong, on average.
    """

    when: float
    uncertainty: float


def time_to_next_look(elapsed: float, remaining: float | None, uncertainty: float = 0.0) -> float:
    """Return how long to sleep before asking again whether something has happened.

    Without a forecast, a fixed fraction of the time that it has taken already. With one, half of what is left, again
    and again, then finely for as long as the forecast may be off, then a fraction of what it is overdue. A transfer of
    a second that was forecast to the millisecond takes some fifty looks.

    Args:
        elapsed: Seconds since it began.
        remaining: Seconds until it is expected, negative when overdue, or None if nothing is known.
        uncertainty: By how many seconds that may well be wrong.
    """
    finest = _FINEST_SECONDS
    if remaining is None:
        interval = min(elapsed / 32, _COARSEST_SECONDS)
    elif remaining > 2 * uncertainty:
        interval = (remaining - uncertainty) / 2
    elif remaining > -2 * uncertainty:
        interval = uncertainty / (16 if abs(remaining) < uncertainty else 8)
        finest = _FINEST_BEFORE_ARRIVAL_SECONDS
    else:
        interval = min(-remaining / 8, _COARSEST_SECONDS)
    return max(interval, finest)


@dataclass(eq=False, slots=True)
class _Rate:
    """What is known of the transfers of one device, which follow one another.

    Attributes:
        seconds_per_byte: Learnt, or None before the first.
        deviation: By which share of their duration the forecasts have been wrong, on average.
        variance: How little is known of the speed, for want of looks: the square of a share of it.
        end: When the last one announced should end, had nothing been late so far.
        delay: By how much what arrived last was late. The rest of a queue inherits it.
    """

    seconds_per_byte: float | None = None
    deviation: float = _FIRST_DEVIATION
    variance: float = 0.0
    end: float = 0.0
    delay: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Transfer:
    """Bytes that a device has been told to move.

    Made by :meth:`BandwidthEstimator.announce`; handed to :func:`aiostage._loop.polling.wait_transfer`.
    """

    __slots__ = ("_begin", "_end", "_failures", "_nbytes", "_rate", "began", "stream")

    def __init__(
        self, rate: _Rate, nbytes: int, stream: object, failures: WeakKeyDictionary[object, Exception]
    ) -> None:
        self.began = monotonic()
        self.stream = stream
        self._failures = failures
        self._rate = rate
        self._nbytes = nbytes
        with rate.lock:
            self._begin = max(self.began - rate.delay, rate.end)
            self._end = rate.end = self._begin + nbytes * (rate.seconds_per_byte or 0.0)

    def expected(self) -> Expectation | None:
        """Return when it should have arrived, or None if that is unknown."""
        rate = self._rate
        if rate.seconds_per_byte is None or self._nbytes < _SMALLEST_BYTES:
            return None
        return Expectation(
            self._end + rate.delay, (self._end - self._begin) * (rate.deviation + math.sqrt(rate.variance))
        )

    def arrived(self, when: float, since: float) -> None:
        """Learn from its arrival.

        Args:
            when: When it was seen to have arrived.
            since: When it was last seen not to have.
        """
        with self._rate.lock:
            rate = self._rate
            gap = when - since
            when -= gap / 2
            duration = when - (self._begin + rate.delay)
            if self._nbytes < _SMALLEST_BYTES or duration <= 0:
                return
            seen = duration / self._nbytes
            known = rate.seconds_per_byte
            variance = (gap / duration / 2) ** 2
            faster = known is not None and seen < known
            if gap > duration / 4 and not faster:
                # It may have arrived long before anyone looked.
                return
            rate.delay = when - self._end
            if known is None:
                rate.seconds_per_byte, rate.variance = seen, variance
            else:
                wrong = abs(seen - known) / known
                # Not what was only due to having looked too seldom before.
                surprise = min(max(wrong - math.sqrt(rate.variance), 0.0), 1.0)
                rate.deviation += (surprise - rate.deviation) * _GAIN_DEVIATION
                sharper = rate.variance / (rate.variance + variance) if rate.variance else 0.0
                rate.variance *= 1 - sharper
                rate.seconds_per_byte = known + (seen - known) * max(sharper, _GAIN_FASTER if faster else _GAIN_SLOWER)

    def failed(self, error: Exception) -> None:
        """Note that it has failed, and with it whatever is on its stream."""
        if self.stream is not None:
            with suppress(TypeError):  # A stream that cannot be referred to weakly is not remembered.
                self._failures[self.stream] = error

    @property
    def failure(self) -> Exception | None:
        """What has failed on its stream so far."""
        return self._failures.get(self.stream) if self.stream is not None and len(self._failures) else None


class BandwidthEstimator:
    """The transfers of one owner of copies, device by device."""

    def __init__(self) -> None:
        self._rates: dict[Hashable, _Rate] = {}
        self._failures: WeakKeyDictionary[object, Exception] = WeakKeyDictionary()

    def announce(self, device: Hashable, nbytes: int, stream: object = None) -> Transfer:
        """Note that a device has just been told to move bytes, behind all announced before. From any thread.

        Args:
            device: Whose transfers follow one another.
            nbytes: How many bytes.
            stream: The stream that it is on. Once something on it is seen to have failed, so has all behind it.
        """
        return Transfer(self._rates.setdefault(device, _Rate()), nbytes, stream, self._failures)
