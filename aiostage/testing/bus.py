"""The bus of a simulated device: operations that move bytes at the same time slow each other down."""

from __future__ import annotations

import math
from collections.abc import Sequence

from aiostage.testing.streams import Operation, SimulatedStream

__all__ = ["Bus"]


class Bus:
    """Divides its bandwidth among the operations that run at one time.

    An operation gets the rate that it could use alone, or its share if the bus has less. Streams of low priority get
    what the others leave.

    Args:
        bandwidth: Bytes a second.
    """

    def __init__(self, bandwidth: float) -> None:
        self._bandwidth = bandwidth
        self._time = 0.0

    def finishes(self, streams: Sequence[SimulatedStream]) -> dict[SimulatedStream, float]:
        """Return when the operations at the heads of some queues would be done, if nothing came after them."""
        return self._run(streams, math.inf)[1]

    def pass_time(self, streams: Sequence[SimulatedStream], until: float) -> None:
        """Record how far the operations at the heads of some queues are done at a time."""
        for stream, done in self._run(streams, until)[0].items():
            stream.queue[0].done = done
        self._time = max(self._time, until)

    def _run(
        self, streams: Sequence[SimulatedStream], until: float
    ) -> tuple[dict[SimulatedStream, float], dict[SimulatedStream, float]]:
        """Simulate up to a time, or to the end of all operations.

        It goes from one start or end of an operation to the next. Between two of these, no rate changes.

        Returns:
            Which part of each operation is done, and when each ends.
        """
        now = self._time
        starts = {stream: max(stream.time, stream.queue[0].enqueued_at) for stream in streams}
        done = {stream: stream.queue[0].done for stream in streams}
        finishes: dict[SimulatedStream, float] = {}
        while len(finishes) < len(streams) and now <= until:
            going = [stream for stream in streams if stream not in finishes and starts[stream] <= now]
            speeds = self._speeds(going)
            ends = {stream: now + max(1 - done[stream], 0.0) / speeds[stream] for stream in going if speeds[stream]}
            coming = (when for when in starts.values() if when > now)
            following = min([until, *ends.values(), *coming])
            for stream in going:
                if ends.get(stream, math.inf) <= following:
                    done[stream], finishes[stream] = 1.0, following
                else:
                    done[stream] += speeds[stream] * (following - now)
            if following == until:
                break
            now = following
        return done, finishes

    def _speeds(self, streams: Sequence[SimulatedStream]) -> dict[SimulatedStream, float]:
        """Return which part of the operation at the head of each queue is done in a second now."""
        left = self._bandwidth
        speeds: dict[SimulatedStream, float] = {}
        # The smallest demand first: what these leave of their shares is divided among the others.
        order = sorted(streams, key=lambda stream: (stream.low_priority, _demand(stream.queue[0])))
        for place, stream in enumerate(order):
            operation = stream.queue[0]
            sharers = sum(other.low_priority is stream.low_priority for other in order[place:])
            rate = min(_demand(operation), left / sharers)
            left = max(left - rate, 0.0)
            if operation.moved_bytes:
                speeds[stream] = rate / operation.moved_bytes
            else:
                speeds[stream] = 1 / operation.seconds if operation.seconds else math.inf
        return speeds


def _demand(operation: Operation) -> float:
    """Return how many bytes a second an operation would move if it were alone."""
    if not operation.moved_bytes:
        return 0.0
    return operation.moved_bytes / operation.seconds if operation.seconds else math.inf
