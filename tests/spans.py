"""An observer for tests."""

from __future__ import annotations

from collections import Counter

from aiostage.abc import Observer, Span

__all__ = ["Recorder"]


class Recorder(Observer):
    """Remembers what it was told, in order."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Span]] = []
        self.errors: dict[str, BaseException] = {}

    def started(self, span: Span) -> None:
        assert span.end is None
        self.heard.append(("started", span))

    def complete(self, span: Span) -> None:
        assert span.end is not None
        self.heard.append(("complete", span))

    def failed(self, span: Span, error: BaseException) -> None:
        assert span.end is not None
        self.heard.append(("failed", span))
        self.errors[span.name] = error

    def spans(self, name: str) -> list[Span]:
        return [found for what, found in self.heard if what == "started" and found.name == name]

    @property
    def names(self) -> list[str]:
        return [found.name for what, found in self.heard if what == "started"]

    @property
    def story(self) -> list[str]:
        return [f"{what} {found.name}" for what, found in self.heard]

    @property
    def unfinished(self) -> Counter[Span]:
        count: Counter[Span] = Counter()
        for what, found in self.heard:
            count[found] += 1 if what == "started" else -1
        return +count
