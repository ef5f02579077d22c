"""What code of objects puts into memo is the copy for all that comes after it, as under copy.deepcopy, or refused."""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from aiostage import AsyncStager, UnsupportedLeafError
from aiostage._capture import early as early_module
from aiostage._capture.nodes import Node

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
    "tuple": (lambda: (torch.zeros(2), 0), lambda: (7,)),
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
    if place == "before":
        assert found[0] is not found[1].value


async def test_a_tensor_has_its_own_copy_before_and_the_announced_one_after() -> None:
    tensor = torch.zeros(2)
    tree = [tensor, Announcing(tensor, lambda: torch.ones(3)), tensor, [tensor]]
    first, announcing, second, (third,) = await staged(tree)
    assert first.tolist() == [0, 0]
    assert second is third is announcing.value
    assert second.tolist() == [1, 1, 1]


class Reduced:
    """Shows what it holds through code of its own only."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __reduce__(self) -> Any:
        return Reduced, self.items


@pytest.mark.parametrize("hidden", [partial(partial, max), Reduced])
@pytest.mark.parametrize("where", ["nowhere else", "in a list", "in a list in another", "before"])
async def test_objects_that_only_other_objects_show_copy_themselves_in_their_turn(
    hidden: Callable[..., Any], where: str
) -> None:
    tensor = torch.zeros(2)
    announcing = Announcing(tensor, lambda: torch.ones(3))
    tree: list[Any] = [[hidden(announcing)], tensor, Summing([announcing])]
    if where == "in a list":
        tree.append([announcing])
    elif where == "in a list in another":
        tree[0] = [hidden([hidden(announcing)])]
    elif where == "before":
        tree.insert(0, Summing([announcing]))
    expected, found = copy.deepcopy(tree), await staged(tree)
    before = int(where == "before")
    assert found[1 + before].tolist() == expected[1 + before].tolist() == [1, 1, 1]
    assert found[1 + before] is found[2 + before].items[0].value


@pytest.mark.parametrize("shape", ["a chain", "a registry"])
async def test_what_many_objects_show_is_gone_through_once(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is one step: at a time for each of them, 1,000 held the event loop for a second."""
    gone_through = 0
    leads = early_module._leads_before

    def counting(node: Node) -> list[Node]:
        nonlocal gone_through
        gone_through += 1
        return leads(node)

    monkeypatch.setattr(early_module, "_leads_before", counting)
    registry = {number: [number] for number in range(200)}
    tree: list[Any] = [Reduced(registry)]
    for _ in range(200):
        tree.append(Reduced(tree[-1] if shape == "a chain" else registry))
    await staged([tree, Summing([])])
    assert 200 < gone_through < 2_000


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


class Scripted:
    """Does something with memo and other objects."""

    def __init__(self, act: Callable[[dict[int, Any]], Any] | None) -> None:
        self.act = act
        self.result: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Scripted:
        made = Scripted(None)
        assert self.act is not None
        made.result = self.act(memo)
        return made


def putting(value: Any, copy: Any) -> Scripted:
    return Scripted(lambda memo: memo.__setitem__(id(value), copy))


async def test_a_tuple_before_has_a_copy_of_its_own_and_one_after_the_announced_one() -> None:
    items = ([1], 2)
    assert (await staged([items, putting(items, "another")]))[0] == ([1], 2)
    assert (await staged([putting(items, "another"), items]))[1] == "another"
    with pytest.raises(UnsupportedLeafError, match=r"state_dict\[2\]: .*another copy of this tuple"):
        await staged([items, putting(items, "another"), items])


async def test_a_tuple_has_the_copy_that_code_inside_it_announces() -> None:
    inside = Scripted(lambda memo: memo.__setitem__(id(items), "another"))
    items = (inside, [1])
    assert copy.deepcopy([items, items]) == await staged([items, items]) == ["another", "another"]


async def test_code_inside_what_has_an_announced_copy_is_refused_if_it_announces_too() -> None:
    tensor = torch.zeros(2)
    items = [putting(tensor, torch.ones(2))]
    tree = [putting(items, [7]), items, tensor]
    assert copy.deepcopy(tree)[2].tolist() == [0, 0]
    with pytest.raises(UnsupportedLeafError, match=r"state_dict\[1\]\[0\]: .*puts copies of other objects into memo"):
        await staged(tree)


async def test_code_that_copies_what_came_before_with_the_announced_copy_in_it_is_refused() -> None:
    inner: list[Any] = []
    outer = [inner]

    def act(memo: dict[int, Any]) -> Any:
        memo[id(inner)] = [7]
        return copy.deepcopy(outer, memo)

    with pytest.raises(UnsupportedLeafError, match=r"state_dict\[0\]\[0\]: .*another copy of this list"):
        await staged([outer, Scripted(act)])
    found = await staged([Scripted(act), outer, inner])
    assert found[0].result is found[1]
    assert found[1][0] is found[2]
    assert found[2] == [7]


@pytest.mark.parametrize("merge", [dict.update, operator.ior], ids=["update", "|="])
async def test_copies_put_in_together_are_announced(merge: Callable[..., Any]) -> None:
    tensor, items = torch.zeros(2), ([1],)
    act = Scripted(lambda memo: type(memo).update(memo, {id(items): 1, id(tensor): torch.ones(2)}) and None)
    if merge is operator.ior:
        act = Scripted(lambda memo: operator.ior(memo, {id(items): 1, id(tensor): torch.ones(2)}) and None)
    tree = [tensor, items, act, tensor]
    found = await staged(tree)
    assert shown(found[:2]) == [[0, 0], [[1]]]
    assert found[3].tolist() == [1, 1]


@pytest.mark.parametrize("make", [lambda: torch.zeros(2), lambda: [0], lambda: Summing([torch.zeros(2)])])
async def test_a_default_is_the_copy_of_what_has_none_yet(make: Callable[[], Any]) -> None:
    value, default = make(), torch.ones(2)
    defaulting = Scripted(lambda memo: memo.setdefault(id(value), default))
    copying = Scripted(lambda memo: copy.deepcopy(value, memo))
    found = await staged([defaulting, value])
    assert found[0].result is found[1] is default
    found = await staged([copying, defaulting, value])
    assert found[0].result is found[1].result is found[2]
    assert found[2] is not default
    # What came before is copied only now, so that the code has got the default.
    if not isinstance(value, Summing):
        with pytest.raises(UnsupportedLeafError, match=r"state_dict\[1\]"):
            await staged([value, defaulting])


@pytest.mark.parametrize("take", [lambda memo, key: memo.pop(key, None), lambda memo, key: memo.__delitem__(key)])
async def test_no_code_takes_the_copy_of_another_object_out_of_memo(take: Callable[..., Any]) -> None:
    for value in (torch.zeros(2), [0], Summing([])):
        taking = Scripted(lambda memo, value=value: take(memo, id(value)))  # type: ignore[misc]
        with pytest.raises(UnsupportedLeafError, match=r"state_dict\[1\]: .*takes the copy of another object out"):
            await staged([value, taking, value])

    def own(memo: dict[int, Any]) -> str:
        memo[id(own)] = "kept"
        take(memo, id(own))
        return "fine"

    assert (await staged([Scripted(own)]))[0].result == "fine"


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


class Asking:
    """Asks whether another object was copied before it."""

    def __init__(self, other: Any) -> None:
        self.other = other
        self.found: bool | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Asking:
        copied = Asking(None)
        memo[id(self)] = copied
        copied.found = id(self.other) in memo
        copied.other = copy.deepcopy(self.other, memo)
        if id(self.other) not in memo:
            raise AssertionError("it was copied")
        return copied


class Plain:
    def __init__(self) -> None:
        self.items = [torch.ones(2)]


@pytest.mark.parametrize("make", [lambda: [1], lambda: {"a": torch.ones(1)}, Plain, lambda: ([1],), lambda: Asking([])])
@pytest.mark.parametrize(
    "arrange",
    [
        lambda asking, other: [asking, other],
        lambda asking, other: [other, asking],
        lambda asking, other: [[other], [[asking]]],
        lambda asking, other: [{"a": [asking]}, [other]],
        lambda asking, other: [asking],
        lambda asking, other: [(other, [asking], other)],
        lambda asking, other: [[1, asking, Asking(other)], Asking(other), other, Asking(other)],
    ],
)
async def test_what_is_not_copied_yet_is_not_found(make: Any, arrange: Any) -> None:
    def answers(tree: Any) -> list[Any]:
        if isinstance(tree, Asking):
            return [tree.found]
        items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
        return [answer for item in items for answer in answers(item)]

    other = make()
    tree = arrange(Asking(other), other)
    assert answers(await staged(tree)) == answers(copy.deepcopy(tree))


async def test_a_container_around_what_asks_is_found_and_a_tuple_is_not() -> None:
    asking, within = Asking(None), Asking(None)
    around: list[Any] = [within]
    around_too = (around, asking)
    asking.other, within.other = around_too, around
    for copied in (await staged([around_too]), copy.deepcopy([around_too])):
        assert (copied[0][1].found, copied[0][0][0].found) == (False, True)


class Telling:
    """Notes that its code runs, and asks for something first."""

    def __init__(self, name: str, log: list[Any], *asked: Any) -> None:
        self.name = name
        self.log = log
        # Not the objects themselves, which would put them inside this one.
        self.asked = list(map(id, asked))

    def __deepcopy__(self, memo: dict[int, Any]) -> Telling:
        found = [identity in memo for identity in self.asked]
        self.log.append((self.name, found))
        return Telling(self.name, self.log)


@pytest.mark.parametrize("make", [list, dict, OrderedDict, Plain])
async def test_a_question_copies_nothing(make: Callable[[], Any]) -> None:
    # The second comes after the first inside what the first asks for, and a tuple after the second.
    log: list[Any] = []
    around = make()
    later, last = [torch.ones(1)], (torch.ones(1),)
    parts = [[Telling("first", log, around, later, last)], later, Telling("second", log, around, later, last), last]
    if isinstance(around, list):
        around += parts
    elif isinstance(around, dict):
        around.update(enumerate(parts))
    else:
        around.items = parts
    await staged([around])
    by_staging = log.copy()
    log.clear()
    copy.deepcopy([around])
    assert log == [("first", [True, False, False]), ("second", [True, True, False])]
    # Staged twice.
    assert by_staging == log * 2


class Hashable:
    """May be in a set, and has what it holds in its state."""

    def __init__(self, held: Any) -> None:
        self.held = held


@pytest.mark.parametrize(
    "make", [lambda inside: {inside}, lambda inside: frozenset([inside]), lambda inside: (inside,)]
)
async def test_what_is_made_of_its_contents_is_found_after_them(make: Callable[[Any], Any]) -> None:
    log: list[Any] = []
    inside = Hashable(None)
    around = make(inside)
    inside.held = [Telling("inside", log, around)]
    tree = [around, Telling("after", log, around)]
    await staged(tree)
    by_staging = log.copy()
    log.clear()
    copy.deepcopy(tree)
    assert log == [("inside", [False]), ("after", [True])]
    assert by_staging == log * 2


async def test_a_tensor_with_attributes_is_found_before_its_turn_like_others() -> None:
    log: list[Any] = []
    plain, attributed = torch.ones(1), torch.ones(1)
    attributed.note = [1]  # type: ignore[attr-defined]
    await staged([Telling("first", log, plain, attributed), plain, attributed])
    assert log == [("first", [True, True])] * 2
