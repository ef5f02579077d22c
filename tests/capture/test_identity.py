"""Objects that are made for the walk and die with it: their identities come back as those of others."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch

from aiostage import AsyncStager, UnsupportedLeafError

COUNT = 200


class Fresh:
    """Makes a new state for each copy."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return Fresh, (self.number,), {"tensor": torch.full((2,), float(self.number)), "more": [self.number]}


def naive(tree: Any, memo: dict[int, Any]) -> Any:
    """Copy with a memo that does not keep alive what it knows by identity."""
    if id(tree) not in memo:
        if isinstance(tree, torch.Tensor):
            made: Any = tree.clone()
        elif isinstance(tree, list):
            made = [naive(item, memo) for item in tree]
        elif isinstance(tree, Fresh):
            make, arguments, state = tree.__reduce__()
            made = make(*arguments)
            for name, value in state.items():
                setattr(made, name, naive(value, memo))
        else:
            return tree
        memo[id(tree)] = made
    return memo[id(tree)]


def wrong(copies: list[Any]) -> int:
    """Count the copies that have the state of another."""
    return sum(made.tensor.tolist() != [number] * 2 or made.more != [number] for number, made in enumerate(copies))


def test_the_naive_way_mixes_them_up() -> None:
    assert wrong(naive([Fresh(number) for number in range(COUNT)], {})) > 0


@pytest.mark.asyncio
async def test_each_keeps_its_own_state() -> None:
    source = [Fresh(number) for number in range(COUNT)]
    async with AsyncStager() as stager:
        for _ in range(3):
            staged = await stager.stage(source)
            assert wrong(staged) == 0
            assert len({tensor.data_ptr() for tensor in (it.tensor for it in staged)}) == COUNT  # type: ignore[attr-defined]


class CopiesOne:
    """Copies one of many partials, and keeps the others."""

    def __init__(self, partials: list[Any]) -> None:
        self.partials = partials

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiesOne:
        return CopiesOne([*self.partials[:-1], copy.deepcopy(self.partials[-1], memo)])


@pytest.mark.asyncio
async def test_tensors_are_found_in_all_of_many_partials() -> None:
    source = CopiesOne([partial(max, torch.ones(2)) for _ in range(8)])
    async with AsyncStager() as stager:
        with pytest.raises(UnsupportedLeafError, match="not a copy in host memory"):
            await stager.stage([source])


class Looked:
    """Counts how often its attributes are asked for."""

    times = 0

    def __getattribute__(self, name: str) -> Any:
        if name == "__dict__":
            Looked.times += 1
        return super().__getattribute__(name)


class Holding:
    """Copies itself and what it holds."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Holding:
        return Holding(copy.deepcopy(self.value, memo))


@pytest.mark.asyncio
async def test_what_many_objects_lead_to_is_looked_at_once() -> None:
    counts = []
    async with AsyncStager() as stager:
        for number in (2, 50):
            source, Looked.times = [[Looked()]], 0
            staged = await stager.stage([Holding(source) for _ in range(number)])
            assert all(item.value is staged[0].value for item in staged)
            counts.append(Looked.times)
    assert counts[0] == counts[1]
