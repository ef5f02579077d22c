"""An event that can be set again and again, for tasks that wait for any change."""

from __future__ import annotations

import anyio

__all__ = ["Signal"]


class Signal:
    """An event that is replaced by a new one when it is set.

    Take :attr:`event`, check the condition, then wait for that event. A change after the check sets it, so none is
    missed.

    Attributes:
        event: The event that the next :meth:`set` sets.
    """

    def __init__(self) -> None:
        self.event = anyio.Event()

    def set(self) -> None:
        """Wake all that wait now."""
        self.event.set()
        self.event = anyio.Event()
