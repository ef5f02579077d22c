"""What only the code of objects leads to is the same object, and lies in the same memory, as what the tree leads to."""

from __future__ import annotations

import asyncio
import copy
import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import aiostage


class Copied:
    """Copies itself by what it holds."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Copied:
        return type(self)(copy.deepcopy(self.value, memo))


class Text(str):
    """Text with something in an attribute."""

    value: Any


class Computed:
    """Shows what it holds through its own reduction only."""

    def __init__(self, value: Any) -> None:
        self.get = {"value": value}.__getitem__

    def __reduce__(self) -> Any:
        return Computed, (self.get("value"),)


def text(value: Any) -> Text:
    made = Text("text")
    made.value = value
    return made


def array(value: Any) -> np.ndarray[Any, Any]:
    made = np.empty(1, dtype=object)
    made[0] = value
    return made


def stage(tree: Any) -> Any:
    async def run() -> Any:
        async with aiostage.AsyncStager() as stager:
            first, second = await stager.stage(tree), await stager.stage(tree)
            for one, other in zip(tensors_of(first), tensors_of(second), strict=True):
                assert one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()
            return second

    return asyncio.run(run())


def tensors_of(tree: dict[str, Any]) -> list[torch.Tensor]:
    return [value for value in tree.values() if isinstance(value, torch.Tensor)]


def distance(one: Any, other: Any) -> int:
    """Return how many bytes lie between two addresses in one storage."""
    assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    return int(one.data_ptr() - other.data_ptr())


HIDDEN = {
    "slice": (lambda value: slice(0, value), lambda made: made.stop),
    "iterator": (lambda value: iter([value]), lambda made: next(copy.copy(made))),
    "reversed": (lambda value: reversed([value]), lambda made: next(copy.copy(made))),
    "partial": (lambda value: partial(max, value), lambda made: made.args[0]),
    "error": (lambda value: ValueError(value), lambda made: made.args[0]),
    "text": (text, lambda made: made.value),
    "code of its own": (Computed, lambda made: made.get("value")),
}
"""What holds a value without a container, attribute or slot, and how to get at it."""


@pytest.mark.parametrize("holder", [Copied, array])
@pytest.mark.parametrize("name", HIDDEN)
def test_memory_is_shared_with_what_objects_hide(name: str, holder: Any) -> None:
    hide, show = HIDDEN[name]
    base = torch.arange(8.0)
    tree = {"before": base[1:5], "object": holder(hide(base[2:6])), "after": base, "twin": holder(hide(base[3:4]))}
    staged = stage(tree)

    def hidden(item: Any) -> Any:
        return show(item.value if holder is Copied else item[0])

    assert hidden(staged["object"]).tolist() == [2, 3, 4, 5]
    assert distance(hidden(staged["object"]), staged["before"]) == 4
    assert distance(hidden(staged["twin"]), staged["after"]) == 12
    assert distance(staged["before"], staged["after"]) == 4
    base.fill_(-1)
    assert staged["after"].tolist() == list(range(8))


@pytest.mark.parametrize("name", HIDDEN)
def test_a_tensor_that_objects_hide_is_the_one_that_the_tree_has(name: str) -> None:
    hide, show = HIDDEN[name]
    tensor = torch.ones(2)
    staged = stage({"first": Copied(hide(tensor)), "tensor": tensor, "second": Copied(hide(tensor))})
    assert show(staged["first"].value) is staged["tensor"]
    assert show(staged["second"].value) is staged["tensor"]


@pytest.mark.parametrize("first", [True, False])
def test_a_storage_stays_that_of_the_tensors_over_it(first: bool) -> None:
    tensor = torch.arange(6.0)
    storage = {"storage": tensor.untyped_storage()}
    tensors = {"tensor": tensor, "view": tensor[2:4]}
    staged = stage(storage | tensors if first else tensors | storage)
    assert staged["storage"].data_ptr() == staged["tensor"].data_ptr() != tensor.data_ptr()
    assert distance(staged["view"], staged["tensor"]) == 8
    staged["storage"].fill_(0)
    assert staged["tensor"].tolist() == [0] * 6
    assert tensor.tolist() == list(range(6))


def test_a_typed_storage_stays_that_of_the_tensors_over_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tensor = torch.arange(6.0)
        staged = stage({"storage": tensor.storage(), "tensor": tensor})
        assert staged["storage"].data_ptr() == staged["tensor"].data_ptr() != tensor.data_ptr()


def test_an_iterator_in_a_circle_has_its_position() -> None:
    tree: dict[str, Any] = {}
    tensor = torch.zeros(2)
    tensor.owner = tree  # type: ignore[attr-defined]
    items = [torch.ones(2), tensor]
    tree |= {"plain": reversed(items), "hidden": array(reversed(items))}
    assert copy.deepcopy(tree)["plain"].__reduce__()[2] == 1
    staged = stage(tree)
    assert staged["plain"].__reduce__()[2] == staged["hidden"][0].__reduce__()[2] == 1
    assert next(staged["plain"]).owner is staged


@pytest.mark.asyncio
async def test_tensors_that_are_met_twice_are_one_after_a_part_of_their_tree_was_staged() -> None:
    tensors = [torch.full((2,), float(number)) for number in range(512)]
    async with aiostage.AsyncStager() as stager:
        for tree in ([*tensors, *tensors[:256]], tensors, [*tensors, *tensors[:256]]):
            staged = await stager.stage(tree)
    assert all(one is other for one, other in zip(staged, staged[512:], strict=False))
