"""What code of objects puts into memo is the copy for all that comes after it, as under copy.deepcopy, or refused."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from aiostage import AsyncStager, UnsupportedLeafError

pytestmark = pytest.mark.asyncio


class Announcing:
    """Puts a copy of what it holds into memo that it makes by itself."""

    def __init__(self, value: Any, make: Callable[[], Any] | None) -> None:
        self.value = value
        self.make = make

    def __deepcopy__(self, memo: dict[int, Any]) -> Announcing:
        assert self.make is not None
        memo[id(self.value)] = self.make()
        return Announcing(copy.deepcopy(self.value, memo), None)


class Summing:
    """Looks at copies when it is copied."""

    def __init__(self, items: list[torch.Tensor]) -> None:
        self.items = items

    def __deepcopy__(self, memo: dict[int, Any]) -> Summing:
        return Summing(copy.deepcopy(self.items, memo))


def shown(tree: Any) -> Any:
    if isinstance(tree, (torch.Tensor, np.ndarray)):
        return tree.tolist()
    if isinstance(tree, (list, tuple)):
        return [shown(item) for item in tree]
    if isinstance(tree, Announcing):
        return ["announcing", shown(tree.value)]
    return ["summing", shown(tree.items)] if isinstance(tree, Summing) else tree


def places(make: Callable[[], Any], announced: Callable[[], Any]) -> dict[str, list[Any]]:
    """Return trees in which something comes before and after code that announces another copy of it."""
    found: dict[str, list[Any]] = {}
    for name in ("after", "before", "deeper after", "deeper before", "alone"):
        value = make()
        announcing = Announcing(value, announced)
        found[name] = {
            "after": [announcing, value, value],
            "before": [value, announcing],
            "deeper after": [announcing, [[value], (value, 1)]],
            "deeper before": [[[value]], [announcing]],
            "alone": [[announcing], 1],
        }[name]
    return found


async def staged(tree: Any) -> Any:
    async with AsyncStager() as stager:
        await stager.stage(tree)
        return await stager.stage(tree)


KINDS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "tensor": (lambda: torch.zeros(2), lambda: torch.full((2,), 7.0)),
    "Parameter": (lambda: torch.nn.Parameter(torch.zeros(2)), lambda: torch.full((3,), 7.0)),
    "list": (lambda: [0], lambda: [7]),
    "array": (lambda: np.zeros(2), lambda: np.ones(2)),
    "what copies itself": (lambda: Summing([torch.zeros(2)]), lambda: "another"),
}


@pytest.mark.parametrize("place", ["after", "before", "deeper after", "deeper before", "alone"])
@pytest.mark.parametrize("kind", KINDS)
async def test_what_comes_after_has_the_announced_copy(kind: str, place: str) -> None:
    tree = places(*KINDS[kind])[place]
    expected = copy.deepcopy(tree)
    found = await staged(tree)
    assert shown(found) == shown(expected)
    if place == "after":
        assert found[1] is found[2]
        assert found[0].value is found[1]


async def test_a_tensor_has_its_own_copy_before_and_the_announced_one_after() -> None:
    tensor = torch.zeros(2)
    tree = [tensor, Announcing(tensor, lambda: torch.ones(3)), tensor, [tensor]]
    first, announcing, second, (third,) = await staged(tree)
    assert first.tolist() == [0, 0]
    assert second is third is announcing.value
    assert second.tolist() == [1, 1, 1]


async def test_an_iterator_after_it_is_over_the_announced_copy() -> None:
    tensor = torch.zeros(2)
    tree = [Announcing(tensor, lambda: torch.ones(3)), iter([tensor])]
    found = await staged(tree)
    assert next(found[1]) is found[0].value


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda value: [value, Announcing(value, lambda: [7]), value], r"state_dict\[2\]"),
        (lambda value: [[value], Announcing(value, lambda: [7]), [value]], r"state_dict\[2\]\[0\]"),
    ],
)
async def test_two_copies_of_one_container_are_refused(make: Callable[[Any], Any], path: str) -> None:
    with pytest.raises(UnsupportedLeafError, match=f"{path}.*another copy of this list into memo"):
        await staged(make([0]))


async def test_what_takes_the_place_of_a_tensor_is_a_plain_tensor_or_refused() -> None:
    tensor = torch.zeros(2)
    with pytest.raises(UnsupportedLeafError, match=r"state_dict\[1\]: .* another copy of this Tensor into memo"):
        await staged([Announcing(tensor, lambda: "text"), tensor])
    tensor.grad = torch.ones(2)
    with pytest.raises(UnsupportedLeafError, match=r"state_dict\[1\]"):
        await staged([Announcing(tensor, lambda: torch.ones(2)), tensor])


async def test_code_that_would_see_the_announced_copy_in_what_came_before_is_refused() -> None:
    tensor = torch.zeros(2)
    items = [tensor]
    with pytest.raises(UnsupportedLeafError, match=r"state_dict\[0\]\[0\]"):
        await staged([items, Announcing(tensor, lambda: torch.ones(2)), Summing(items)])


async def test_memory_of_the_source_is_refused() -> None:
    tensor = torch.zeros(2)
    with pytest.raises(UnsupportedLeafError, match="not a copy in host memory"):
        await staged([Announcing(tensor, lambda: tensor), tensor])


@pytest.mark.parametrize("kind", ["dict", "OrderedDict", "OrderedDict with attributes", "defaultdict"])
async def test_objects_copy_themselves_in_the_order_of_deepcopy(kind: str) -> None:
    order: list[str] = []

    class Logging:
        def __init__(self, name: str) -> None:
            self.name = name

        def __deepcopy__(self, memo: dict[int, Any]) -> Logging:
            order.append(self.name)
            return Logging(self.name)

    def attributed(pairs: Any) -> Any:
        made = OrderedDict(pairs)
        made._metadata = Logging("attribute")  # type: ignore[attr-defined]
        return made

    makers: dict[str, Callable[[Any], Any]] = {
        "dict": dict,
        "OrderedDict": OrderedDict,
        "OrderedDict with attributes": attributed,
        "defaultdict": lambda pairs: defaultdict(list, pairs),
    }
    make = makers[kind]
    tree = make(
        [
            ("a", [[Logging("deep")]]),
            ("b", Logging("flat")),
            (Logging("key"), Logging("value")),
            ((Logging("in a key"),), 1),
            ("c", (Logging("last"),)),
        ]
    )
    copy.deepcopy(tree)
    expected, order = order, []
    async with AsyncStager() as stager:
        await stager.stage(tree)
    assert order == expected
    assert sorted(order) == sorted(set(order))
    assert set(order) >= {"deep", "flat", "key", "value", "in a key", "last"}
