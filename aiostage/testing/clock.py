"""A clock that stands still until a test moves it."""

from __future__ import annotations

import math
from typing import Protocol

from aiostage.errors import shown

__all__ = ["Timeline", "VirtualClock"]


class Timeline(Protocol):
    """Something that happens at known times of a clock. It needs these two methods only."""

    def due(self) -> float | None:
        """Return the time of what happens next, in seconds, or None if nothing will."""

    def happen(self) -> None:
        """Do what is due next."""


class VirtualClock:
    """Time that passes only when a test moves it. Several timelines may share it.

    Not thread-safe: one thread moves it.

    Args:
        start: The first time, in seconds.
    """

    def __init__(self, start: float = 0.0) -> None:
        self._now = start
        self._timelines: list[Timeline] = []

    def __repr__(self) -> str:
        return f"<VirtualClock {self._now:.9g} s>"

    def time(self) -> float:
        """Return the time now, in seconds."""
        return self._now

    def attach(self, timeline: Timeline) -> None:
        """Add a timeline, which :meth:`advance` then moves."""
        self._timelines.append(timeline)

    def detach(self, timeline: Timeline) -> None:
        """Undo :meth:`attach`. Does nothing if that is done already."""
        if timeline in self._timelines:
            self._timelines.remove(timeline)

    def move_to(self, when: float) -> None:
        """Set the time, unless it is later already. Nothing happens by this, also not what is due until then."""
        self._now = max(self._now, when)

    def advance(self, seconds: float) -> None:
        """Let time pass. Everything that becomes due happens in the order of its times.

        Args:
            seconds: How long. ``math.inf`` lets everything happen, and stops at the last time.

        Raises:
            ValueError: If ``seconds`` is below 0.
        """
        if not seconds >= 0:
            raise ValueError(f"a clock advances by 0 seconds or more, not {shown(seconds)}")
        end = self._now + seconds
        while (following := self._following()) is not None and following[0] <= end:
            when, timeline = following
            self.move_to(when)
            timeline.happen()
        # At infinity, nothing could ever be due again.
        if end < math.inf:
            self.move_to(end)

    def _following(self) -> tuple[float, Timeline] | None:
        """Return which timeline is next, and when; the one attached first if several are."""
        dues = [(when, timeline) for timeline in self._timelines if (when := timeline.due()) is not None]
        return min(dues, key=lambda due: due[0], default=None)
