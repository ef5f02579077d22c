"""Objects that copy themselves and lead back to what they lie in."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from typing import Any

import pytest
import torch

import aiostage
from aiostage._capture.nodes import ListNode, Node
from aiostage._capture.protocol import circles_of, depth_first
from tests.fuzz.classes import NewArguments

pytestmark = pytest.mark.asyncio


class Summing:
    """Computes over the copies that it gets."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items
        self.total = sum(float(item.detach().sum()) for item in items if isinstance(item, torch.Tensor))

    def __deepcopy__(self, memo: dict[int, Any]) -> Summing:
        return Summing(copy.deepcopy(self.items, memo))


class Holder:
    def __init__(self, value: Any) -> None:
        self.value = value


class Drifting(Holder):
    """Has a state that is made when it is asked for."""

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


async def test_circles_are_found_with_what_leads_to_them() -> None:
    nodes = [ListNode(None, None, 0) for _ in range(8)]
    edges = {0: [1, 4], 1: [2], 2: [3], 3: [1], 4: [5, 6], 5: [4], 6: [7], 7: []}

    def leads(node: Node) -> list[Node]:
        return [nodes[number] for number in edges[nodes.index(node)]]  # type: ignore[arg-type]

    def circles(*numbers: int) -> set[frozenset[int]]:
        found = circles_of([nodes[number] for number in numbers], leads)
        return {
            frozenset(index for index, node in enumerate(nodes) if found.get(id(node)) == number)
            for number in found.values()
        }

    assert circles(3, 5) == {frozenset((1, 2, 3)), frozenset((4, 5))}
    assert circles(2) == {frozenset((1, 2, 3))}
    assert circles(0) == {frozenset((1, 2, 3)), frozenset((4, 5))}
    assert circles(6) == set()
    assert [nodes.index(node) for node in depth_first(nodes[0], leads)] == [0, 1, 2, 3, 4, 5, 6, 7]  # type: ignore[arg-type]


class Measuring(Holder):
    """Notes how long the copy of its value is, and may note its own copy first, as a __deepcopy__ should."""

    noted = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Measuring:
        made = type(self)(None)
        if self.noted:
            memo[id(self)] = made
        made.value = copy.deepcopy(self.value, memo)
        made.length = len(made.value)  # type: ignore[attr-defined]
        return made


class Noting(Measuring):
    noted = True


class Restored(Holder):
    """Notes in its __setstate__ how much of its value there is."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.length = len(self.value)


def iterator_in_a_circle(order: str) -> dict[str, Any]:
    items: list[Any] = [0]
    around: dict[str, Any] = {}
    items += [Holder(around), 2]
    around["iterator"] = iter(reversed(items))
    parts = {"around": around, "measuring": Measuring(items), "inside": [Measuring([around])], "nested": [[items]]}
    return {name: parts[name] for name in order.split()}


@pytest.mark.parametrize(
    "order",
    [
        "around measuring",
        "measuring around",
        "inside around measuring",
        "around inside measuring",
        "nested measuring around",
        "measuring inside nested around",
    ],
)
async def test_an_iterator_in_a_circle_has_the_state_that_deepcopy_gives_it(order: str) -> None:
    expected = copy.deepcopy(iterator_in_a_circle(order))
    async with aiostage.AsyncStager() as stager:
        staged = await stager.stage(iterator_in_a_circle(order))
    assert list(map(type, staged["around"]["iterator"])) == list(map(type, expected["around"]["iterator"]))


async def test_an_iterator_that_only_a_tensor_leads_to_has_its_state() -> None:
    tensor = torch.zeros(1)
    items = [0, tensor, torch.ones(1)]
    around = {"iterator": iter(reversed(items))}
    tensor.owner = around  # type: ignore[attr-defined]
    async with aiostage.AsyncStager() as stager:
        staged = await stager.stage({"around": around, "summing": Summing(items)})
    assert staged["summing"].total == 1.0
    assert list(staged["around"]["iterator"]) == staged["summing"].items[::-1]


async def test_an_object_that_notes_its_copy_first_gets_all_of_what_leads_back_to_it() -> None:
    around: list[Any] = [0]
    around += [Noting(around), 2]
    source = around[1]
    async with aiostage.AsyncStager() as stager:
        staged = await stager.stage([source, around])
    assert staged[0].length == copy.deepcopy([source, around])[0].length == 3
    assert staged[0].value is staged[1]
    assert staged[1][1] is staged[0]


class Listing(Holder):
    """Copies itself without a note in the memo."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Listing:
        return Listing(copy.deepcopy(self.value, memo))


class Slotted:
    __slots__ = ("value",)


class Setting(Holder):
    """Takes its state out of the dict that it gets."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


@pytest.mark.parametrize("kind", [Holder, Slotted, Setting, OrderedDict])
async def test_what_leads_back_to_an_object_that_copies_itself_has_all_of_its_attributes(kind: Any) -> None:
    back = kind.__new__(kind)
    listing = Listing([back])
    back.value = listing
    tensor = torch.ones(1)
    tensor.note = [back]  # type: ignore[attr-defined]
    async with aiostage.AsyncStager() as stager:
        for tree in ([listing, back], [Listing([tensor]), listing]):
            staged = await stager.stage(tree)
            (copied,) = staged[0].value if tree[1] is back else staged[1].value
            assert type(copied.value) is Listing
            assert copied.value.value[0] is copied


def grown(numbers: random.Random) -> list[Any]:
    """Make a tree of containers that lead to each other, iterators over them, and objects whose code looks at them."""
    containers: list[Any] = [[] if numbers.random() < 0.6 else {} for _ in range(numbers.randint(2, 5))]
    lists = [container for container in containers if isinstance(container, list)] or [[1]]
    reversing: list[tuple[Any, int, list[Any]]] = []

    def child(container: Any, slot: int) -> Any:
        kind = numbers.choice(("container", "iterator", "iterator", "object", "object", "list"))
        if kind == "iterator":
            reversing.append((container, slot, numbers.choice(lists)))
        elif kind == "object":
            return numbers.choice((Holder, Drifting, Restored))(numbers.choice(containers))
        elif kind == "list":
            return [numbers.choice(containers)]
        return numbers.choice(containers)

    for container in containers:
        for slot in range(numbers.randint(3, 4)):
            item = child(container, slot) if numbers.random() < 0.6 else slot
            if isinstance(container, list):
                container.append(item)
            else:
                container[slot] = item
    root: list[Any] = []
    for slot in range(numbers.randint(3, 6)):
        opaque = numbers.choice((Measuring, Noting))(numbers.choice(containers))
        root.append(opaque if numbers.random() < 0.15 * slot else child(root, slot))
    for container, slot, items in reversing:
        container[slot] = reversed(items)
    return root


def facts(item: Any, met: dict[int, tuple[int, Any]]) -> Any:
    """Return what there is to see of a tree, with a number for each object."""
    if isinstance(item, int):
        return item
    if id(item) in met:
        return f"object {met[id(item)][0]}"
    met[id(item)] = len(met), item
    held = vars(item) if isinstance(item, Holder) else item
    if hasattr(item, "__next__"):
        held = list(item.__reduce__()[1:])
    elif isinstance(held, dict):
        held = list(held.values())
    return type(item).__name__, [facts(part, met) for part in held]


async def test_random_circles_are_copied_in_the_order_of_deepcopy() -> None:
    compared = 0
    async with aiostage.AsyncStager() as stager:
        for seed in range(300):
            tree, source, copied = grown(random.Random(seed)), {}, {}
            facts(tree, source)
            expected = facts(copy.deepcopy(tree), copied)
            staged = await stager.stage(tree)
            # What an object is made of leads back to it: copy.deepcopy makes two of it.
            if len(copied) == len(source):
                assert facts(staged, {}) == expected, seed
                compared += 1
    assert compared > 100


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


@pytest.mark.parametrize("first", ["object", "dict"])
async def test_an_object_in_a_circle_through_its_constructor_is_one(first: str) -> None:
    held: dict[str, Any] = {"t": torch.ones(2)}
    held["made"] = made = NewArguments(held)
    tree = [made, held] if first == "object" else [held, made]
    async with aiostage.AsyncStager() as stager:
        staged = await stager.stage(tree)
    copied, other = staged if first == "object" else reversed(staged)
    assert copied is not made
    assert copied.value is other
    assert other["made"] is copied
    assert torch.equal(other["t"], held["t"])
    # As in the source. PyTorch's users may know two copies of it from here.
    deep = copy.deepcopy(tree)
    assert (deep[0].value["made"] is deep[0] if first == "object" else deep[0]["made"] is deep[1]) is (first == "dict")
