"""Recording where the time goes, as a file that Perfetto and Chrome show.

A trace hears spans from all tasks and threads. Spans of one thread may overlap, because many tasks take turns in it,
but a trace viewer wants what is on one line to be nested; so spans are laid out on as many lines as that takes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import RLock
from time import perf_counter

from aiostage._loop.forks import tell_of_forks
from aiostage._loop.slices import Slices
from aiostage._loop.workers import Workers
from aiostage.abc import Observer, Span
from aiostage.observe import observing

__all__ = ["Trace", "trace"]

_MAX_HOLD = 0.001
_AT_ONCE = 64
_CATEGORY = "aiostage"


class Trace(Observer):
    """Records the spans that it receives, in memory: about half a kilobyte for each."""

    def __init__(self) -> None:
        self.begin: float = perf_counter()
        self._spans: list[Span] = []
        self._failures: dict[Span, str] = {}
        # Reentrant, because the collector may close a coroutine, and with it a span, while this thread has the lock.
        self._lock = RLock()
        tell_of_forks(self)

    def forked(self) -> None:
        """Let a child go on with a copy of what was recorded."""
        self._lock = RLock()

    @property
    def spans(self) -> Sequence[Span]:
        """What has begun so far, in order; a span whose ``end`` is None is still open."""
        with self._lock:
            return tuple(self._spans)

    def failure(self, span: Span) -> str | None:
        """Return what a span has failed with, as the class and the text of the error; None if it has not."""
        return self._failures.get(span)

    def started(self, span: Span) -> None:
        """Record a span."""
        with self._lock:
            self._spans.append(span)

    def complete(self, span: Span) -> None:
        """Do nothing: the span has its end."""

    def failed(self, span: Span, error: BaseException) -> None:
        """Record the text of an error, and not the error, which would keep alive what its traceback refers to."""
        with self._lock:
            self._failures[span] = f"{type(error).__name__}: {error}"

    async def write(self, path: str | os.PathLike[str]) -> None:
        """Write what was recorded so far, for https://ui.perfetto.dev or chrome://tracing.

        Args:
            path: Of the file; one that is there is replaced.

        Raises:
            OSError: If the file system refuses.
            TypeError: If it is no path.

        When cancelled, the file may be incomplete.
        """
        path = os.fspath(path)  # open() would take a number for a descriptor, and close it.
        events = await Slices(_MAX_HOLD).run(self._events())
        workers = Workers(1, "aiostage-trace")
        try:
            await workers.run(partial(_write, path, events))
        finally:
            workers.stop()

    def chrome(self) -> dict[str, object]:
        """Return what was recorded so far as an object of the Trace Event Format, which ``json`` can write.

        Takes some 20 microseconds a span; :meth:`write` gives the event loop its turns.
        """
        work = self._events()
        while True:
            try:
                next(work)
            except StopIteration as stop:
                document: dict[str, object] = json.loads(_document(stop.value))
                return document

    def _events(self) -> Generator[None, None, list[str]]:
        """Spell the events of the document, yielding now and then."""
        spans = self.spans
        now = perf_counter()
        lines = yield from _lines_of(spans, now)
        names: dict[int, str] = {}
        events = []
        for index, span in enumerate(spans):
            number, name = lines[span]
            names[number] = name
            events.append(json.dumps(self._event(span, number, now)))
            if index % _AT_ONCE == 0:
                yield
        for number, name in names.items():
            about = {"ph": "M", "name": "thread_name", "pid": os.getpid(), "tid": number, "args": {"name": name}}
            events.append(json.dumps(about))
        return events

    def _event(self, span: Span, line: int, now: float) -> dict[str, object]:
        arguments = {name: _plain(value) for name, value in span.attributes.items()}
        failure = self._failures.get(span)
        if failure is not None:
            arguments["error"] = failure
        if span.end is None:
            arguments["unfinished"] = True
        return {
            "ph": "X",
            "cat": _CATEGORY,
            "name": span.name,
            "pid": os.getpid(),
            "tid": line,
            "ts": round((span.begin - self.begin) * 1e6, 3),
            "dur": round(((span.end or now) - span.begin) * 1e6, 3),
            "args": arguments,
        }


@contextmanager
def trace() -> Iterator[Trace]:
    """Record what is begun inside a block, and in the tasks and threads that it starts.

    Returns:
        The trace, to be looked at or written at any time.
    """
    recorded = Trace()
    with observing(recorded):
        yield recorded


class _Line:
    """One line of a trace viewer, on which every span lies inside another or behind it."""

    def __init__(self, number: int, name: str) -> None:
        self.number = number
        self.name = name
        self._open: list[Span] = []

    def takes(self, span: Span, end: float, now: float) -> bool:
        """Add a span that begins behind all others, if it fits."""
        while self._open and (self._open[-1].end or now) <= span.begin:
            self._open.pop()
        if self._open and (self._open[-1].end or now) < end:
            return False
        self._open.append(span)
        return True


def _lines_of(spans: Sequence[Span], now: float) -> Generator[None, None, dict[Span, tuple[int, str]]]:
    """Return for each span the number and the name of its line: its parent's, if it fits there, or another."""
    by_thread: dict[str, list[_Line]] = {}
    lines: dict[Span, _Line] = {}
    # Recorded nearly in order already. Of two that begin at once the first is never inside the other.
    order = [(span.begin, index) for index, span in enumerate(spans)]
    order.sort()
    yield
    count = 0
    for _, index in order:
        span = spans[index]
        end = span.end or now
        candidates = by_thread.setdefault(span.thread, [])
        parents = lines.get(span.parent) if span.parent is not None else None
        if parents is not None and parents in candidates and parents.takes(span, end, now):
            lines[span] = parents
            continue
        line = next((line for line in candidates if line.takes(span, end, now)), None)
        if line is None:
            count += 1
            line = _Line(count, span.thread if not candidates else f"{span.thread} ({len(candidates) + 1})")
            line.takes(span, end, now)
            candidates.append(line)
        lines[span] = line
        if index % _AT_ONCE == 0:
            yield
    return {span: (line.number, line.name) for span, line in lines.items()}


def _plain(value: object) -> object:
    """Return a value that JSON can spell."""
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def _document(events: Sequence[str]) -> str:
    joined = ",\n".join(events)
    return f'{{"displayTimeUnit":"ms","traceEvents":[\n{joined}\n]}}\n'


def _write(path: str | os.PathLike[str], events: Sequence[str]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(_document(events))
