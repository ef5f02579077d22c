"""Where the time of a staging goes."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from types import TracebackType

from aiostage.observe import OpenSpan

__all__ = ["Phase", "Timings"]


@dataclass(kw_only=True)
class Timings:
    """Where the time of one staging went, in seconds. Phases that overlap count for themselves.

    Attributes:
        walk: Copying containers and finding the leaves.
        inspect: Looking at the leaves.
        plan: Laying out the arena, or recognizing the layout.
        memory: Waiting for an arena.
        build: Making the staged leaves, while the copies already run.
        launch: Telling devices what to copy.
        copy: Waiting for the copies after everything was built.
        check: Looking for changes of the source.
        rebuild: Making the staged tree.
        yields: How often the event loop got its turn.
    """

    walk: float = 0.0
    inspect: float = 0.0
    plan: float = 0.0
    memory: float = 0.0
    build: float = 0.0
    launch: float = 0.0
    copy: float = 0.0
    check: float = 0.0
    rebuild: float = 0.0
    yields: int = 0

    def __post_init__(self) -> None:
        """Start without a span; the caller sets one. It is no field, because it is no figure."""
        self.span: OpenSpan | None = None


class Phase:
    """Adds the time that a section takes to a field of the timings, and tells observers of it.

    A section may be cut into slices and go on in another task, so its span is not the current one of any context.
    """

    __slots__ = ("_name", "_span", "_start", "_timings")

    def __init__(self, timings: Timings, name: str) -> None:
        self._timings = timings
        self._name = name

    def __enter__(self) -> None:
        within = self._timings.span
        self._span = within.child(self._name) if within is not None else None
        self._start = perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        spent = getattr(self._timings, self._name) + perf_counter() - self._start
        setattr(self._timings, self._name, spent)
        if self._span is not None:
            self._span.end(error)
