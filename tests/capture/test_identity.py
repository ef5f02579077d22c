"""Objects that are made for the walk and die with it: their identities come back as those of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aiostage import AsyncStager

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
            copy: Any = tree.clone()
        elif isinstance(tree, list):
            copy = [naive(item, memo) for item in tree]
        elif isinstance(tree, Fresh):
            make, arguments, state = tree.__reduce__()
            copy = make(*arguments)
            for name, value in state.items():
                setattr(copy, name, naive(value, memo))
        else:
            return tree
        memo[id(tree)] = copy
    return memo[id(tree)]


def wrong(copies: list[Any]) -> int:
    """Count the copies that have the state of another."""
    return sum(copy.tensor.tolist() != [number] * 2 or copy.more != [number] for number, copy in enumerate(copies))


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
