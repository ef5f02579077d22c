"""Spans of what aiostage does, for observers: each has a beginning, an end and a parent.

A span is opened for a call, a stage of one, or a part of a file, never for a tensor. Without an observer, opening
one reads a list and a context variable, and makes nothing; a staging reads them itself, and calls nothing here.

Observers belong to a context, as in :func:`observing`, or to the process, as in :func:`add_observer`. Contexts reach
tasks by asyncio's own rules, and worker threads because their steps run in the context of their caller.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from time import perf_counter
from types import TracebackType
from typing import TypeAlias

from aiostage._loop.coroutines import Finalizer
from aiostage.abc import Observer, Span
from aiostage.errors import shown

__all__ = [
    "OpenSpan",
    "add_observer",
    "current",
    "observing",
    "remove_observer",
    "span",
    "start_span",
    "within",
]

_logger = logging.getLogger("aiostage")

everywhere: list[Observer] = []
"""The observers of the process; :func:`add_observer` and :func:`remove_observer` alone change it."""

here: ContextVar[tuple[Observer, ...]] = ContextVar("aiostage_observers", default=())
"""The observers of the context; :func:`observing` alone changes it."""

_current: ContextVar[Span | None] = ContextVar("aiostage_span", default=None)
_changing = threading.Lock()
_not_observed: AbstractContextManager[None] = nullcontext()


class OpenSpan:
    """A span that has begun. Ends with :meth:`end`, or with the block of ``with``, and then once and for all."""

    __slots__ = ("__weakref__", "_observers", "span")

    def __init__(self, observers: tuple[Observer, ...], span: Span) -> None:
        self._observers = observers
        self.span: Span = span
        for observer in observers:
            _notify(observer.started, span)

    def child(self, name: str, **attributes: object) -> OpenSpan:
        """Open a span inside this one, told to the same observers, whatever context the caller is in."""
        return OpenSpan(self._observers, _new(name, self.span, attributes))

    def end(self, error: BaseException | None = None) -> None:
        """End the span; with an error, it has failed. Later calls change nothing.

        Args:
            error: What ended it, a cancellation included.
        """
        _end(self._observers, self.span, error)

    def __enter__(self) -> OpenSpan:
        """Return self; the span is open already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the span."""
        self.end(error)


def _end(observers: tuple[Observer, ...], span: Span, error: BaseException | None) -> None:
    if span.end is not None:
        return
    span.end = perf_counter()
    for observer in observers:
        if error is None:
            _notify(observer.complete, span)
        else:
            _notify(observer.failed, span, error)


def _end_dropped(observers: tuple[Observer, ...], span: Span) -> None:
    # The error that a coroutine gets that is dropped after it has begun. One that was never awaited gets none, since
    # nothing of it runs.
    if span.end is None:
        _end(observers, span, GeneratorExit("it was dropped, such as a coroutine that is never awaited"))


class _CurrentSpan:
    """An open span that is the parent of those opened inside its block."""

    __slots__ = ("_before", "_open")

    def __init__(self, opened: OpenSpan) -> None:
        self._open = opened

    def __enter__(self) -> None:
        self._before = _current.get()
        _current.set(self._open.span)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A coroutine may be closed from another context, which has nothing of this to undo: hence no token.
        if _current.get() is self._open.span:
            _current.set(self._before)
        self._open.end(error)


def span(name: str, **attributes: object) -> AbstractContextManager[None]:
    """Open a span for a block, inside the one that is open around it. Not for generators: see :func:`start_span`.

    Args:
        name: What is done, one of a small number of names.
        **attributes: What else is known: numbers and strings.

    Returns:
        A context manager. The span has failed if the block raises.
    """
    observers = (*everywhere, *here.get())
    if not observers:
        return _not_observed
    return _CurrentSpan(OpenSpan(observers, _new(name, _current.get(), attributes)))


def start_span(name: str, **attributes: object) -> OpenSpan | None:
    """Open a span that is ended by hand, because it is not a block: it may end in another task or thread.

    Args:
        name: What is done, one of a small number of names.
        **attributes: What else is known: numbers and strings.

    Returns:
        The span, inside the one that is open around the call; None without an observer. It has failed if it is dropped
        before it is ended.
    """
    observers = (*everywhere, *here.get())
    if not observers:
        return None
    opened = OpenSpan(observers, _new(name, _current.get(), attributes))
    Finalizer(opened, _end_dropped, observers, opened.span)
    return opened


@contextmanager
def within(opened: OpenSpan | None) -> Iterator[None]:
    """Have spans that a block opens lie inside a span that was opened by hand, which it does not end.

    Args:
        opened: From :func:`start_span`; None without an observer.
    """
    if opened is None:
        yield
        return
    before = _current.get()
    _current.set(opened.span)
    try:
        yield
    finally:
        # As for _CurrentSpan.
        if _current.get() is opened.span:
            _current.set(before)


def current() -> Span | None:
    """Return the span that is open around the caller; None without an observer."""
    return _current.get()


@contextmanager
def observing(*observers: Observer) -> Iterator[None]:
    """Tell observers of what is begun inside a block, and in the tasks and threads that it starts.

    Args:
        *observers: In addition to those that are listening already.

    Returns:
        A context manager.

    Raises:
        TypeError: If one is no :class:`~aiostage.abc.Observer`.
    """
    _check(observers)
    before = here.get()
    here.set(before + observers)
    try:
        yield
    finally:
        here.set(before)


def add_observer(observer: Observer) -> None:
    """Tell an observer of everything that the process does from now on, in every task and thread.

    Args:
        observer: Once more for each time that it is added.

    Raises:
        TypeError: If it is no :class:`~aiostage.abc.Observer`.
    """
    _check((observer,))
    # The lock is for those who change it. Those who read it copy it in one operation, so each sees all of a change.
    with _changing:
        everywhere.append(observer)


def remove_observer(observer: Observer) -> None:
    """Undo :func:`add_observer`. The observer still hears the end of what it has heard the beginning of.

    Args:
        observer: One that was added.

    Raises:
        ValueError: If it was not added.
    """
    with _changing:
        if observer not in everywhere:
            raise ValueError(f"{shown(observer)} was not added with add_observer()")
        everywhere.remove(observer)


def _check(observers: Iterable[object]) -> None:
    for observer in observers:
        if not isinstance(observer, Observer):
            raise TypeError(f"an observer is an aiostage.abc.Observer, not {shown(observer)}")


def _new(name: str, parent: Span | None, attributes: dict[str, object]) -> Span:
    return Span(name, parent, attributes, perf_counter(), threading.current_thread().name)


_Tell: TypeAlias = Callable[..., object]


def _notify(tell: _Tell, *what: object) -> None:
    """Call an observer. Its error must not end a save, and in a worker thread no caller could get it."""
    try:
        tell(*what)
    except Exception:
        _logger.exception("an observer failed in %r", tell)
