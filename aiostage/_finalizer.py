"""Calling a function when an object dies, in whichever thread that is.

``weakref.finalize`` does so too, but at the end of the interpreter it goes through a dict of all that wait, in Python.
If an object dies in another thread meanwhile, that ends in "dictionary changed size during iteration", and no finalizer
is called any more, of other packages neither. Much of aiostage dies in daemon threads, which run until the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar
from weakref import ref

__all__ = ["Finalizer"]


class Finalizer:
    """Calls a function once: when an object dies, or before that when it is called itself. Not at exit.

    Args:
        owner: The object, which is not kept alive.
        function: What is called. It must not lead to the owner.
        arguments: Its arguments; nor must these.
    """

    __slots__ = ()

    # Changed by single operations of a dict, and gone through by nothing.
    _waiting: ClassVar[dict[Finalizer, tuple[ref[Any], Callable[..., object], tuple[object, ...]]]] = {}

    def __init__(self, owner: object, function: Callable[..., object], *arguments: object) -> None:
        self._waiting[self] = ref(owner, self), function, arguments

    def __call__(self, _reference: object = None) -> None:
        """Call the function, unless it has been called or the owner was detached."""
        waiting = self._waiting.pop(self, None)
        if waiting is not None:
            _, function, arguments = waiting
            function(*arguments)

    @property
    def alive(self) -> bool:
        """Whether the function is still to be called."""
        return self in self._waiting

    def detach(self) -> bool:
        """Let the function not be called, and return whether it was still to be."""
        return self._waiting.pop(self, None) is not None
