"""Kinds of objects that a manifest can carry: a name, how to take one apart, how to put it together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["KINDS_VERSION", "Kind", "NotCarried", "Parts", "table_of"]

KINDS_VERSION = 1
"""Raised with every new kind, so that a reader which lacks one can say what it needs."""


class NotCarried(Exception):
    """An object cannot be carried, with the reason and the way out."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Parts:
    """What an object is made of.

    Attributes:
        form: What describes it, as JSON.
        children: By name, what it contains; any objects that can be carried themselves.
        attributes: By name, what is set on it when it has been made; it may lead back to the object.
    """

    form: Mapping[str, Any] = field(default_factory=dict)
    children: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of object. Its name and the spelling of its form are part of the file format: they must not change.

    Attributes:
        name: In the manifest.
        classes: Exact classes of the objects.
        take_apart: Returns the parts of an object; raises :class:`NotCarried` for one that cannot be carried.
        rebuild: Makes the object from its form and its children in order. It must not trust either: for what does
            not fit it raises an error, and it runs nothing that a file names.
    """

    name: str
    classes: tuple[type, ...]
    take_apart: Callable[[Any], Parts]
    rebuild: Callable[[Mapping[str, Any], Sequence[Any]], Any]


def table_of(kinds: Iterable[Kind]) -> tuple[dict[type, Kind], dict[str, Kind]]:
    """Return kinds by class and by name."""
    by_class: dict[type, Kind] = {}
    by_name: dict[str, Kind] = {}
    for kind in kinds:
        if kind.name in by_name or not by_class.keys().isdisjoint(kind.classes):
            raise ValueError(f"there are two kinds {kind.name!r}")
        by_name[kind.name] = kind
        by_class |= dict.fromkeys(kind.classes, kind)
    return by_class, by_name
