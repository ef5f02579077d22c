"""A save refuses what a load would refuse to hash, and says where it is; what it takes comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import aiostage
from aiostage import Checkpointer, UnsupportedLeafError
from aiostage.format.values import MAX_HASHED_DEPTH, MAX_HASHED_SIZE
from tests.checkpoint.comparing import assert_same

PRIME = (1 << 61) - 1
"""What CPython's hashes of numbers are reduced by."""


def nested(depth: int) -> tuple[Any, ...]:
    made: tuple[Any, ...] = ()
    for _ in range(depth - 1):
        made = (made,)
    return made


def doubled(depth: int) -> tuple[Any, ...]:
    made: tuple[Any, ...] = (0,)
    for _ in range(depth):
        made = (made, made)
    return made


TOO_MUCH = {
    "deep": nested(MAX_HASHED_DEPTH + 1),
    "large": tuple(range(MAX_HASHED_SIZE + 1)),
    "doubled": doubled(14),
    "frozen": frozenset(range(MAX_HASHED_SIZE + 1)),
}
HOLDERS = {
    "key": lambda key: {key: 1},
    "element": lambda key: {key},
    "frozenset": lambda key: frozenset((key,)),
    "inner": lambda key: {"beside": [torch.ones(2), {("a", key): 1}]},
}


@pytest.mark.asyncio
@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("key", TOO_MUCH)
async def test_too_much_to_hash_is_refused_with_its_path(key: str, holder: str, tmp_path: Path) -> None:
    tree = {"model": torch.ones(3), "odd": HOLDERS[holder](TOO_MUCH[key])}
    with pytest.raises(UnsupportedLeafError, match="no load would hash") as caught:
        await aiostage.save(tree, tmp_path / "a")
    assert caught.value.path == "state_dict['odd']" + ("['beside'][1]" if holder == "inner" else "")
    assert len(str(caught.value)) < 600
    assert list(tmp_path.iterdir()) == []


@pytest.mark.asyncio
async def test_a_checkpointer_refuses_it_before_save_returns(tmp_path: Path) -> None:
    async with Checkpointer(tmp_path) as checkpoints:
        for step in range(10):
            with pytest.raises(UnsupportedLeafError, match="no load would hash"):
                await checkpoints.save(step, {"odd": {TOO_MUCH["large"]: torch.ones(3)}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.asyncio
@pytest.mark.parametrize("make", [set, dict.fromkeys, frozenset], ids=["set", "dict", "frozenset"])
async def test_too_many_of_one_hash_are_refused(make: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedLeafError, match="the same hash") as caught:
        await aiostage.save({"odd": make(number * PRIME for number in range(65))}, tmp_path / "a")
    assert caught.value.path == "state_dict['odd']"
    tree = {"even": make(number * PRIME for number in range(64))}
    await aiostage.save(tree, tmp_path / "a")
    assert_same(tree, await aiostage.load(tmp_path / "a"))


@pytest.mark.asyncio
async def test_as_much_as_a_load_hashes_comes_back(tmp_path: Path) -> None:
    # A tuple is counted with what is in it, and tuples in tuples twice.
    fitting = [nested(MAX_HASHED_DEPTH), tuple(range(MAX_HASHED_SIZE - 1)), doubled(10), frozenset(range(9000))]
    tree = {"keys": {key: index for index, key in enumerate(fitting)}, "elements": set(fitting)}
    await aiostage.save(tree, tmp_path / "a")
    assert await aiostage.load(tmp_path / "a") == tree


@pytest.mark.asyncio
async def test_what_is_not_hashed_may_be_of_any_size(tmp_path: Path) -> None:
    tree = {"values": list(TOO_MUCH.values()), "key": {("a", 1): TOO_MUCH["deep"]}}
    await aiostage.save(tree, tmp_path / "a")
    assert await aiostage.load(tmp_path / "a") == tree
