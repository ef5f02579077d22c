"""Objects that copy themselves and lead back to what they lie in."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import aiostage
from aiostage._capture.nodes import ListNode, Node
from aiostage._capture.protocol import entries_of_circles

pytestmark = pytest.mark.asyncio


class Summing:
    """Computes over the copies that it gets."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items
        self.total = sum(float(item.detach().sum()) for item in items if isinstance(item, torch.Tensor))

    def __deepcopy__(self, memo: dict[int, Any]) -> Summing:
        return Summing(copy.deepcopy(self.items, memo))


class Drifting:
    """Has a state that is made when it is asked for."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))


class Counting:
    """Notes how much of the container around it there is when it is copied."""

    def __init__(self, around: Any) -> None:
        self.around = around
        self.seen = -1

    def __deepcopy__(self, memo: dict[int, Any]) -> Counting:
        made = Counting(copy.deepcopy(self.around, memo))
        made.seen = len(made.around)
        return made


async def test_an_object_that_is_led_back_to_has_its_state() -> None:
    tree: dict[str, Any] = {}
    tensor = torch.ones(2)
    tensor.owner = tree  # type: ignore[attr-defined]
    tree["drifting"] = Drifting(Summing([tensor]))
    async with aiostage.AsyncStager() as stager:
        staged = await stager.stage(tree)
    assert staged["drifting"].value.total == 2.0
    assert staged["drifting"].value.items[0].owner is staged


async def test_an_object_sees_as_much_of_what_it_lies_in_as_under_deepcopy() -> None:
    tree: dict[str, Any] = {"before": torch.ones(2), "list": [1, 2]}
    tree["object"] = Counting(tree)
    tree["after"] = torch.zeros(2)
    expected = copy.deepcopy(tree)
    async with aiostage.AsyncStager() as stager:
        staged = await stager.stage(tree)
    assert expected["object"].seen == staged["object"].seen == 2
    assert staged["object"].around is staged
    assert list(staged) == list(tree)
    assert torch.equal(staged["before"], tree["before"])


async def test_where_copying_enters_a_circle_is_found_for_each_apart() -> None:
    nodes = [ListNode(None, None, 0) for _ in range(7)]
    edges = {0: [1, 4], 1: [2], 2: [3], 3: [1], 4: [5, 6], 5: [4], 6: []}

    def leads(node: Node) -> list[Node]:
        return [nodes[number] for number in edges[nodes.index(node)]]  # type: ignore[arg-type]

    assert entries_of_circles(nodes[0], [nodes[3], nodes[5]], leads) == [nodes[1], nodes[4]]
    assert entries_of_circles(nodes[0], [nodes[2], nodes[3]], leads) == [nodes[1]]
    assert entries_of_circles(nodes[0], [nodes[6]], leads) == []


async def test_an_exception_without_attributes_gets_none_by_being_looked_at() -> None:
    class Holding:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def __deepcopy__(self, memo: dict[int, Any]) -> Holding:
            return Holding(copy.deepcopy(self.error, memo))

    source = Holding(ValueError("text", 1))
    async with aiostage.AsyncStager() as stager:
        staged = await stager.stage([source])
    assert len(staged[0].error.__reduce_ex__(4)) == 2
    assert len(source.error.__reduce_ex__(4)) == 2
