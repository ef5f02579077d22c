"""Tuples with tensors in a live tree: their tensors stay the same, and other values in them are the loaded ones."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import aiostage
from aiostage import CheckpointMismatchError
from aiostage._loop.coroutines import exhausted
from aiostage.checkpoint.into import compare
from tests.capture.test_steps import calls

pytestmark = pytest.mark.asyncio

Ema = collections.namedtuple("Ema", ["average", "step"])


class Typed(NamedTuple):
    average: torch.Tensor
    step: int


class WithAttributes(Ema):
    """Has a dictionary, which a new one would lack."""


@dataclasses.dataclass
class Average:
    values: torch.Tensor
    step: int


def tensor(value: float) -> torch.Tensor:
    return torch.full((3,), value)


async def loaded(saved: Any, live: Any, tmp_path: Path, **options: Any) -> Any:
    await aiostage.save(saved, tmp_path / "checkpoint", overwrite=True)
    classes = [Ema, Typed, WithAttributes, Average]
    return await aiostage.load(tmp_path / "checkpoint", into=live, classes=classes, **options)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("make", [lambda *items: items, Ema, Typed], ids=["tuple", "namedtuple", "NamedTuple"])
@pytest.mark.parametrize(
    ("old", "new"), [(1, 2), (1, 1.0), (True, 1), (0.0, None), (None, "text"), ((1, 2), (1, 2, 3))]
)
async def test_a_value_beside_a_tensor(make: Any, old: Any, new: Any, in_place: bool, tmp_path: Path) -> None:
    average = tensor(0.0)
    live = {"ema": make(average, old), "list": [make(tensor(0.0), old)]}
    await loaded({"ema": make(tensor(1.0), new), "list": [make(tensor(2.0), new)]}, live, tmp_path, in_place=in_place)
    for found, value in ((live["ema"], 1.0), (live["list"][0], 2.0)):
        assert type(found) is type(make(average, old))
        assert found[0].tolist() == [value] * 3
        assert found[1] == new
        assert type(found[1]) is type(new)
    assert live["ema"][0] is average


async def test_nothing_is_made_anew_without_need(tmp_path: Path) -> None:
    live = {"a": (tensor(0.0), 1, float("nan"), (2, "b")), "b": [(tensor(0.0), [1])]}
    before = live["a"], live["b"][0]
    await loaded({"a": (tensor(1.0), 1, float("nan"), (2, "b")), "b": [(tensor(1.0), [5])]}, live, tmp_path)
    assert live["a"] is before[0]
    assert live["b"][0] is before[1]
    assert before[1][1] == [5]


async def test_containers_and_tensors_in_it_stay_the_same_objects(tmp_path: Path) -> None:
    inner: dict[str, Any] = {"step": 1}
    average, shared = tensor(0.0), [1]
    live = {"a": (average, inner, shared, 1), "shared": shared}
    both = [9]
    await loaded({"a": (tensor(1.0), {"step": 2}, both, 2), "shared": both}, live, tmp_path)
    assert live["a"][0] is average
    assert live["a"][1] is inner
    assert live["a"][2] is live["shared"] is shared
    assert (inner, shared, live["a"][3]) == ({"step": 2}, [9], 2)


async def test_tuples_in_tuples(tmp_path: Path) -> None:
    average = tensor(0.0)
    live = {"a": (((average, 1), [0]), "x"), "b": 0}
    await loaded({"a": (((tensor(1.0), 2), [7]), "x"), "b": 1}, live, tmp_path)
    assert live["a"][0][0][0] is average
    assert (average.tolist(), live["a"][0][0][1], live["a"][0][1], live["a"][1]) == ([1.0] * 3, 2, [7], "x")


async def test_one_tuple_in_several_places_stays_one(tmp_path: Path) -> None:
    def tree(value: float, step: int) -> dict[str, Any]:
        one = (tensor(value), step)
        # Met in an outer tuple first, and in another one after that.
        return {"outer": ((one, 0), one), "again": one, "last": [(one, step)]}

    live = tree(0.0, 1)
    average = live["again"][0]
    await loaded(tree(1.0, 2), live, tmp_path)
    one = live["again"]
    assert one[0] is average
    assert one[1] == 2
    assert live["outer"][1] is live["outer"][0][0] is live["last"][0][0] is one
    assert live["last"][0][1] == 2


async def test_a_tuple_in_a_list_that_it_holds(tmp_path: Path) -> None:
    def tree(value: float, step: int) -> list[Any]:
        holder: list[Any] = []
        one = (tensor(value), step, holder)
        holder.append(one)
        return [one]

    live = tree(0.0, 1)
    holder = live[0][2]
    await loaded(tree(1.0, 2), live, tmp_path)
    assert live[0] is live[0][2][0]
    assert live[0][2] is holder
    assert (live[0][0].tolist(), live[0][1]) == ([1.0] * 3, 2)


@pytest.mark.parametrize("second", [5, 6, 7])
@pytest.mark.parametrize("around", ["the tuple", "its dict"])
async def test_one_tuple_that_is_two_in_the_checkpoint(second: int, around: str, tmp_path: Path) -> None:
    def holder(step: int) -> Any:
        return ([1], step) if around == "the tuple" else {"t": ([1], step)}

    one = holder(5)
    live = {"a": one, "b": one}
    if second == 5:
        await loaded({"a": holder(5), "b": holder(5)}, live, tmp_path)
    else:
        for saved in ({"a": holder(5), "b": holder(second)}, {"a": holder(second), "b": holder(5)}):
            with pytest.raises(CheckpointMismatchError, match="instead of 5 in what cannot be changed"):
                await loaded(saved, live, tmp_path)
    assert live["a"] is live["b"] is one
    assert one == holder(5)


def with_attributes(value: float, step: int) -> Any:
    made = WithAttributes(tensor(value), step)
    made.note = step  # type: ignore[attr-defined]
    return made


FIXED: dict[str, tuple[Callable[[float, int], Any], str]] = {
    "at the root": (lambda value, step: (tensor(value), step), r"state_dict\[1\]"),
    "in a tuple at the root": (lambda value, step: ((tensor(value), (0, step)), 5), r"state_dict\[0\]\[1\]"),
    "at the root and elsewhere": (
        lambda value, step: (one := (tensor(value), step), [one]),
        r"state_dict\[[01]\](\[0\])?\[1\]",
    ),
    "with attributes": (lambda value, step: {"a": with_attributes(value, step)}, r"\['a'\]\[1\]"),
}


@pytest.mark.parametrize("kind", FIXED)
async def test_what_cannot_be_made_anew_is_refused(kind: str, tmp_path: Path) -> None:
    make, path = FIXED[kind]
    live = make(0.0, 1)
    with pytest.raises(CheckpointMismatchError, match=path + r" \(.* instead of .* in what cannot be changed\)"):
        await loaded(make(1.0, 2), live, tmp_path)
    while not isinstance(live, torch.Tensor):
        live = next(iter(live.values())) if isinstance(live, dict) else live[0]
    assert live.tolist() == [0.0] * 3


async def test_another_tuple_that_is_put_there_during_the_load(tmp_path: Path) -> None:
    live: dict[str, Any] = {"a": (tensor(0.0), 1)}
    other = (tensor(7.0), 7)
    with pytest.raises(CheckpointMismatchError, match=r"\['a'\] \(another tuple was put there during the load"):
        await loaded({"a": (tensor(1.0), 2)}, live, tmp_path, progress=lambda _: live.update(a=other))
    assert live["a"] is other
    assert other[0].tolist() == [7.0] * 3


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("around", ["dict", "tuple", "deque"])
async def test_an_object_with_tensors_in_a_tuple(around: str, in_place: bool, tmp_path: Path) -> None:
    def tree(value: float, step: int) -> Any:
        held: Any = Average(tensor(value), step)
        if around == "deque":
            held = collections.deque([held])
        return {"a": (tensor(value), (held, step)) if around == "tuple" else (held, step)}

    live = tree(0.0, 1)
    held = live["a"][1][0] if around == "tuple" else live["a"][0]
    average = held[0] if around == "deque" else held
    values = average.values
    await loaded(tree(1.0, 2), live, tmp_path, in_place=in_place)
    now = live["a"][1] if around == "tuple" else live["a"]
    assert now[0] is held
    assert now[1] == average.step == 2
    assert average.values is values
    assert values.tolist() == [1.0] * 3


async def test_deep_tuples_are_looked_at_once() -> None:
    def deep(levels: int, value: float) -> list[Any]:
        made: Any = (tensor(value), 0)
        for level in range(levels):
            made = (made, level)
        return [made]

    counts = []
    for levels in (200, 400):
        comparison = compare(deep(levels, 0.0), deep(levels, 1.0))
        counts.append(calls(partial(exhausted, comparison)))
    assert counts[1] < 2.5 * counts[0]


class Row(tuple[Any, ...]):
    """May be made otherwise than of its items."""


async def test_an_error_names_what_cannot_be_changed_in_the_order_of_the_tree() -> None:
    def tree(value: int) -> dict[str, Any]:
        # Two in each that could be changed elsewhere, and two values beside them.
        return {
            str(key): Row((tensor(0.0), value, (tensor(0.0), value), (tensor(0.0), value, value), value))
            for key in range(3)
        }

    with pytest.raises(CheckpointMismatchError) as raised:
        exhausted(compare(tree(1), tree(2)))
    places = [text.partition(" ")[0] for text in raised.value.mismatched]
    inside = ["[1]", "[4]", "[2][1]", "[3][1]", "[3][2]"]
    assert places == [f"state_dict['{key}']{place}" for key in range(3) for place in inside]
