"""The second look at containers: what changed since the walk is found, by place, and nothing else is."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Generator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiostage._capture import versions
from aiostage._capture.versions import ContainerChanges
from aiostage.leaf import Attribute, Path


class At:
    """Where a container is."""

    def path(self, slot: int) -> Path:
        return ("at", slot)


AT = At()


def changed(changes: ContainerChanges, between: Callable[[int], object] = lambda step: None) -> list[Path]:
    """Look again, doing something between the steps."""
    work: Generator[None, None, list[Path]] = changes.changed()
    step = 0
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        between(step)
        step += 1


class Slotted:
    __slots__ = ("left", "right")


class TestMappings:
    def note(self, source: dict[Any, Any]) -> ContainerChanges:
        changes = ContainerChanges()
        changes.add_mapping(source, list(source), list(source.values()), AT, 0)
        return changes

    @pytest.mark.parametrize(
        ("change", "paths"),
        [
            (lambda d: None, []),
            (lambda d: d.__setitem__("b", object()), [("at", 0, "b")]),
            (lambda d: d.update(a=object(), c=object()), [("at", 0, "a"), ("at", 0, "c")]),
            (lambda d: d.__setitem__("new", 1), [("at", 0)]),
            (lambda d: d.pop("a"), [("at", 0)]),
            (lambda d: d.clear(), [("at", 0)]),
            (lambda d: d.__setitem__("a", d.pop("a")), [("at", 0)]),
        ],
        ids=["nothing", "a value", "two values", "added", "removed", "cleared", "moved"],
    )
    @pytest.mark.parametrize("make", [dict, OrderedDict])
    def test_changes(self, make: Any, change: Any, paths: list[Path]) -> None:
        source = make(a=object(), b=object(), c=object())
        changes = self.note(source)
        change(source)
        assert changed(changes) == paths

    def test_an_equal_value_is_another_value(self) -> None:
        source = {"a": 1000}
        changes = self.note(source)
        source["a"] = int("1000")
        assert changed(changes) == [("at", 0, "a")]

    def test_a_change_and_back_is_no_change(self) -> None:
        source: dict[str, object] = {"a": 1}
        changes = self.note(source)
        source["a"] = 2
        source["a"] = 1
        assert changed(changes) == []

    def test_growing_between_two_steps_of_the_comparison(self) -> None:
        source = {number: object() for number in range(3 * versions._CHILDREN_PER_STEP)}
        changes = self.note(source)
        assert changed(changes, lambda step: source.setdefault(-1, object())) == [("at", 0)]


class TestSequences:
    @pytest.mark.parametrize(
        ("change", "paths"),
        [
            (lambda s: None, []),
            (lambda s: s.__setitem__(1, object()), [("at", 2, 1)]),
            (lambda s: s.append(object()), [("at", 2)]),
            (lambda s: s.pop(), [("at", 2)]),
            (lambda s: s.reverse(), [("at", 2, 0), ("at", 2, 2)]),
        ],
        ids=["nothing", "an item", "longer", "shorter", "reversed"],
    )
    @pytest.mark.parametrize("make", [list, deque])
    def test_changes(self, make: Any, change: Any, paths: list[Path]) -> None:
        source = make([object(), object(), object()])
        changes = ContainerChanges()
        changes.add_sequence(source, list(source), AT, 2)
        change(source)
        assert changed(changes) == paths

    @given(st.lists(st.integers(0, 2), max_size=8), st.integers(0, 7), st.integers(0, 2))
    def test_exactly_what_differs_is_found(self, numbers: list[int], position: int, value: int) -> None:
        objects = [object() for _ in range(3)]
        source = [objects[number] for number in numbers]
        before = list(source)
        changes = ContainerChanges()
        changes.add_sequence(source, list(source), AT, 0)
        if source:
            source[position % len(source)] = objects[value]
        differing = [index for index, (now, then) in enumerate(zip(source, before, strict=True)) if now is not then]
        assert changed(changes) == [("at", 0, index) for index in differing]


def test_sets() -> None:
    source = {"a", "b"}
    changes = ContainerChanges()
    changes.add_set(source, list(source), AT, 1)
    assert changed(changes) == []
    source.remove("a")
    source.add("c")
    assert changed(changes) == [("at", 1)]


def test_attributes() -> None:
    class Thing:
        pass

    thing = Thing()
    thing.value, thing.other = object(), object()  # type: ignore[attr-defined]
    changes = ContainerChanges()
    changes.add_attributes(vars(thing), list(vars(thing)), list(vars(thing).values()), AT, 0)
    assert changed(changes) == []
    thing.value = object()  # type: ignore[attr-defined]
    (path,) = changed(changes)
    assert path == ("at", 0, "value")
    assert isinstance(path[-1], Attribute)


def test_slots() -> None:
    thing = Slotted()
    thing.left = thing.right = object()
    changes = ContainerChanges()
    changes.add_slots(thing, {"left": thing.left, "right": thing.right}, AT, 0)
    assert changed(changes) == []
    del thing.left
    assert changed(changes) == [("at", 0, "left")]


def test_large_containers_are_compared_in_steps() -> None:
    source = [object() for _ in range(10 * versions._CHILDREN_PER_STEP)]
    changes = ContainerChanges()
    changes.add_sequence(source, list(source), AT, 0)
    assert sum(1 for _ in changes.changed()) >= 10


class TestLargeSets:
    def note(self, source: set[Any]) -> ContainerChanges:
        changes = ContainerChanges()
        changes.add_set(source, list(source), AT, 1)
        return changes

    def test_taken_out_and_put_back(self) -> None:
        source = {object() for _ in range(10_000)}
        changes = self.note(source)
        kept = sorted(source, key=id)
        source.clear()
        source.update(reversed(kept))
        assert changed(changes) == []

    def test_another_member_between_two_steps(self) -> None:
        source: set[Any] = {object() for _ in range(10_000)}
        changes = self.note(source)
        assert changed(changes, lambda step: source.add(object()) if step == 1 else None) == [("at", 1)]

    def test_one_for_another(self) -> None:
        source: set[Any] = {object() for _ in range(10_000)}
        changes = self.note(source)
        source.pop()
        source.add(object())
        assert changed(changes) == [("at", 1)]

    @pytest.mark.parametrize("size", [0, 1, 3, 2048, 2049])
    def test_one_more(self, size: int) -> None:
        source: set[Any] = set(range(size))
        changes = self.note(source)
        assert changed(changes) == []
        source.add(size)
        assert changed(changes) == [("at", 1)]

    @pytest.mark.parametrize("size", [1, 3, 2048, 2049])
    def test_one_fewer(self, size: int) -> None:
        source: set[Any] = set(range(size))
        changes = self.note(source)
        source.remove(size - 1)
        assert changed(changes) == [("at", 1)]
