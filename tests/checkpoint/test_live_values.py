"""What a load does with values of a live tree that are not tensors: it compares them whole, however they are nested."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import aiostage
from aiostage import CheckpointMismatchError

pytestmark = pytest.mark.asyncio


@dataclass(frozen=True)
class Limits:
    weight: torch.Tensor
    bounds: Any


def shared(levels: int) -> tuple[Any, ...]:
    """Return a tuple that contains the next one twice, and so on: few objects, 2 ** levels paths."""
    made: tuple[Any, ...] = ("end",)
    for _ in range(levels):
        made = (made, made)
    return made


def nested(levels: int, innermost: Any) -> Any:
    for _ in range(levels):
        innermost = (innermost,)
    return innermost


SAME = [
    (np.array([1, 2]), np.array([1, 2])),
    (np.array([1.0, np.nan]), np.array([1.0, np.nan])),
    (float("nan"), float("nan")),
    (np.float32("nan"), np.float32("nan")),
    ((1, ("a", b"b")), (1, ("a", b"b"))),
    (deque([np.array([1, 2])]), deque([np.array([1, 2])])),
    (np.ma.MaskedArray([1, 2], [False, True]), np.ma.MaskedArray([1, 2], [False, True])),
    (frozenset((1, 2)), frozenset((1, 2))),
    (shared(60), shared(60)),
    (nested(3000, "end"), nested(3000, "end")),
]

DIFFERENT = [
    (np.array([1, 2]), np.array([1, 3])),
    (np.array([1]), np.array([1, 1])),
    (np.array([1, 2]), np.array([1, 2, 3])),
    (np.array([1, 2]), np.array([1.0, 2.0])),
    (1, 1.0),
    (1, True),
    (0.0, -0.0),
    ((1, 2), (1, 3)),
    (deque([np.array([1, 2])]), deque([np.array([1, 3])])),
    (np.ma.MaskedArray([1, 2], [False, True]), np.ma.MaskedArray([1, 2, 3], [False, True, True])),
    (nested(20, "end"), nested(20, "another end")),
]


@pytest.mark.parametrize("number", range(len(SAME)))
@pytest.mark.parametrize("frozen", [False, True])
async def test_equal_values_where_nothing_can_be_put(tmp_path: Path, number: int, frozen: bool) -> None:
    live, saved = SAME[number]
    await aiostage.save(around(saved, 1.0, frozen), tmp_path / "a")
    into = around(live, 0.0, frozen)
    assert await aiostage.load(tmp_path / "a", into=into, classes=[Limits]) is into
    assert (into.weight if frozen else into[0]).item() == 1.0


@pytest.mark.parametrize("number", range(len(DIFFERENT)))
@pytest.mark.parametrize("frozen", [False, True])
async def test_other_values_where_nothing_can_be_put(tmp_path: Path, number: int, frozen: bool) -> None:
    live, saved = DIFFERENT[number]
    await aiostage.save(around(saved, 1.0, frozen), tmp_path / "a")
    into = around(live, 0.0, frozen)
    with pytest.raises(CheckpointMismatchError, match="what cannot be changed"):
        await aiostage.load(tmp_path / "a", into=into, classes=[Limits])
    assert (into.weight if frozen else into[0]).item() == 0.0


def around(value: Any, weight: float, frozen: bool) -> Any:
    """Return something that has a tensor and a value in it, and takes no other value."""
    return Limits(torch.tensor(weight), value) if frozen else (torch.tensor(weight), value)


@pytest.mark.parametrize("live", [0, "tuple"])
async def test_tuples_with_many_paths(tmp_path: Path, live: Any) -> None:
    await aiostage.save({"a": shared(60)}, tmp_path / "a")
    into = {"a": shared(60) if live == "tuple" else live}
    await aiostage.load(tmp_path / "a", into=into)
    made = into["a"]
    for _ in range(60):
        assert made[0] is made[1]
        made = made[0]
    assert made == ("end",)


async def test_deep_tuples(tmp_path: Path) -> None:
    await aiostage.save({"a": nested(5000, 2)}, tmp_path / "a")
    into = {"a": nested(5000, 1)}
    await aiostage.load(tmp_path / "a", into=into)
    assert innermost(into["a"]) == 2


async def test_part_of_deep_tuples(tmp_path: Path) -> None:
    def tree(number: int) -> dict[str, Any]:
        return {"a": nested(3000, (number, number))}

    await aiostage.save(tree(2), tmp_path / "a")
    into = tree(1)
    await aiostage.load(tmp_path / "a", into=into, only=lambda path: len(path) == 3002 and path[-1] == 1)
    made = into["a"]
    while len(made) == 1:
        (made,) = made
    assert made == (1, 2)


@pytest.mark.parametrize("live", [5, (5, 6, 7), ()])
async def test_part_of_a_tuple_where_there_is_none(tmp_path: Path, live: Any) -> None:
    await aiostage.save({"a": ((1, 2), 3)}, tmp_path / "a")
    into = {"a": (live, 4)}
    with pytest.raises(CheckpointMismatchError, match="left out"):
        await aiostage.load(tmp_path / "a", into=into, only="a.0.1")
    assert into == {"a": (live, 4)}


def innermost(value: Any) -> Any:
    while isinstance(value, tuple):
        (value,) = value
    return value
