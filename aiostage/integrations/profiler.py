"""The spans of aiostage in a profile of PyTorch, beside its operators and kernels."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch.profiler import record_function

from aiostage.abc import Observer, Span

__all__ = ["ProfilerObserver"]

_PREFIX = "aiostage."


class ProfilerObserver(Observer):
    """Hands spans to ``torch.profiler`` through ``record_function`` as they begin and end.

    The profiler has to run already when a span begins. By default it records the thread that started it; see
    ``profile_all_threads`` of ``torch.profiler`` for the worker threads.
    """

    def __init__(self) -> None:
        # Weak, because a span whose coroutine was dropped may never be reported again. No lock, because each method
        # does one operation on it, and neither another thread nor the collector sees that half done.
        self._ranges: WeakKeyDictionary[Span, record_function] = WeakKeyDictionary()

    def started(self, span: Span) -> None:
        """Open a range of the profiler."""
        opened = record_function(_PREFIX + span.name)
        opened.__enter__()  # type: ignore[no-untyped-call]
        self._ranges[span] = opened

    def complete(self, span: Span) -> None:
        """Close it. The thread may be another: a range is closed by its handle."""
        self._ranges.pop(span).__exit__(None, None, None)

    def failed(self, span: Span, error: BaseException) -> None:
        """Close it. A profile has no place for the error."""
        self.complete(span)
