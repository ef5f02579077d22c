"""What a forked child begins anew: it has its parent's objects, but none of its parent's threads.

A lock that one of those threads held is held for ever, and a thread that is waited for never comes. PyTorch's
``DataLoader`` and ``multiprocessing`` fork in the middle of whatever runs, so nothing can be put in order before.
"""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet

__all__ = ["Forked", "tell_of_forks"]


class Forked(Protocol):
    """Something with threads, locks or memory that a child must not take over."""

    def forked(self) -> object:
        """Begin anew; called in the child, in its only thread.

        Returns:
            What is left behind. It is dropped when all have been told, since finalizers may need the locks of others.
        """


_told: WeakSet[Forked] = WeakSet()


def tell_of_forks(owner: Forked) -> None:
    """Have :meth:`Forked.forked` called in every child that is forked while ``owner`` lives, before it goes on."""
    _told.add(owner)


def _tell() -> None:
    left_behind = [owner.forked() for owner in list(_told)]
    del left_behind


os.register_at_fork(after_in_child=_tell)
