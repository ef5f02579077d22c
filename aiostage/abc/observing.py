"""Observers: they receive the spans of what aiostage does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

__all__ = ["Observer", "Span"]


@dataclass(slots=True, eq=False, weakref_slot=True)
class Span:
    """Something that takes time, as an observer sees it.

    Attributes:
        name: What is done; one of a small number of names.
        parent: The span inside which it began, if there is one.
        attributes: What else is known, as numbers and strings.
        begin: When it began, in seconds of ``time.perf_counter()``.
        thread: Name of the thread in which it began.
        end: When it ended; None until then.
    """

    name: str
    parent: Span | None
    attributes: dict[str, object]
    begin: float
    thread: str
    end: float | None = None


class Observer(ABC):
    """Receives the spans of what aiostage does. An observer has to have these methods only.

    They are called on event loops and in worker threads, from several at once, in the context of the work, and must
    neither block nor take long. What they raise is logged and changes nothing. Every span that was started is
    reported once more, when it has ended. One whose coroutine is dropped has failed; the collector may report that in
    any thread and at any moment, so a lock that an observer takes has to be reentrant.
    """

    @abstractmethod
    def started(self, span: Span) -> None:
        """Something has begun."""

    @abstractmethod
    def complete(self, span: Span) -> None:
        """Something has been done."""

    @abstractmethod
    def failed(self, span: Span, error: BaseException) -> None:
        """Something has ended with an error, or was cancelled."""
