"""The spans of aiostage as those of OpenTelemetry."""

from __future__ import annotations

import time
from threading import RLock
from weakref import WeakKeyDictionary

from aiostage._extras import needed_for
from aiostage._loop.forks import register_after_fork
from aiostage.abc import Observer, Span

with needed_for("OpenTelemetryObserver"):
    from opentelemetry import trace

__all__ = ["OpenTelemetryObserver"]

_PREFIX = "aiostage."


class OpenTelemetryObserver(Observer):
    """Hands spans to OpenTelemetry as they begin and end; one costs about 10 microseconds.

    A span without a parent of aiostage's becomes a child of the OpenTelemetry span that is current where it begins.

    Args:
        tracer: Takes the spans; None is one of the global provider.
    """

    def __init__(self, tracer: trace.Tracer | None = None) -> None:
        self._tracer = tracer if tracer is not None else trace.get_tracer("aiostage")
        # Weak, because a span that is still open when its process forks may not be reported again in the child.
        self._spans: WeakKeyDictionary[Span, trace.Span] = WeakKeyDictionary()
        # Reentrant, because the collector may close a coroutine, and with it a span, while this thread has the lock.
        self._lock = RLock()
        # Computed once: if the wall clock is set later, spans still lie inside their parents.
        self._epoch = time.time_ns() - time.perf_counter_ns()
        register_after_fork(self)

    def after_fork_in_child(self) -> None:
        """Replace the lock, which another thread of the parent may have held."""
        self._lock = RLock()

    def started(self, span: Span) -> None:
        """Start an OpenTelemetry span."""
        with self._lock:
            parent = self._spans.get(span.parent) if span.parent is not None else None
        context = trace.set_span_in_context(parent) if parent is not None else None
        mine = self._tracer.start_span(_PREFIX + span.name, context=context, start_time=self._wall(span.begin))
        with self._lock:
            self._spans[span] = mine

    def complete(self, span: Span) -> None:
        """End it."""
        self._end(span, None)

    def failed(self, span: Span, error: BaseException) -> None:
        """End it with the error."""
        self._end(span, error)

    def _end(self, span: Span, error: BaseException | None) -> None:
        with self._lock:
            mine = self._spans.pop(span)
        for name, value in span.attributes.items():
            mine.set_attribute(_PREFIX + name, value if isinstance(value, (bool, int, float, str)) else str(value))
        if error is not None:
            mine.record_exception(error)
            mine.set_status(trace.Status(trace.StatusCode.ERROR, f"{type(error).__name__}: {error}"))
        mine.end(self._wall(span.end) if span.end is not None else None)

    def _wall(self, moment: float) -> int:
        """Return the nanoseconds since 1970 at a moment of the performance counter."""
        return self._epoch + round(moment * 1e9)
