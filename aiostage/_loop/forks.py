"""Objects that are reset in forked children.

A child has its parent's objects, but none of its parent's threads: a lock that one of those held stays locked, and a
wait for such a thread never ends. PyTorch's DataLoader and multiprocessing fork at any time, so the parent cannot
prepare for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol
from weakref import WeakSet

__all__ = ["ForkHandler", "register_after_fork"]


class ForkHandler(Protocol):
    """Something with threads, locks or memory that a child must not take over."""

    def after_fork_in_child(self) -> object:
        """Reset the object. Called in the child, in its only thread.

        Returns:
            Objects that the child must drop. They are dropped after all handlers have run, because a finalizer may need
            a lock that a later handler makes again.
        """


_handlers: WeakSet[ForkHandler] = WeakSet()

register_after_fork: Callable[[ForkHandler], None] = _handlers.add
"""Call :meth:`ForkHandler.after_fork_in_child` in every child that is forked while an object is alive."""


def _after_fork_in_child() -> None:
    to_drop = [owner.after_fork_in_child() for owner in list(_handlers)]
    del to_drop


os.register_at_fork(after_in_child=_after_fork_in_child)
