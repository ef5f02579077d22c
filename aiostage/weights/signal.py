"""Something has changed: all who wait look again."""

from __future__ import annotations

import anyio

__all__ = ["Signal"]


class Signal:
    """An event that is new again as soon as it was set. Take :attr:`event`, look, then wait for it: nothing is missed.

    Attributes:
        event: What the next :meth:`set` sets.
    """

    def __init__(self) -> None:
        self.event = anyio.Event()

    def set(self) -> None:
        """Wake all that wait now."""
        self.event.set()
        self.event = anyio.Event()
