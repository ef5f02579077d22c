"""One moment for the whole tree: what can be compared is noted when it is met, what cannot is copied last."""

from __future__ import annotations

import asyncio
import copy
import math
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Generator
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch

from aiostage import AsyncStager, StagingOptions, TornSnapshotError
from tests.staging.holding import copies_held

IN_SINGLE_STEPS = StagingOptions(max_loop_hold=1e-9)
"""Lets other tasks have a turn after each step, however short."""


class ChangedAt:
    """Runs a coroutine, and changes something at its n-th suspension, as another task does that gets its turn there.

    Attributes:
        reached: Whether there was such a suspension.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, Any], number: int, change: Callable[[], object]) -> None:
        self._coroutine, self._number, self._change = coroutine, number, change
        self.reached = False

    def __await__(self) -> Generator[Any, Any, Any]:
        """Run it."""
        for number in count():
            try:
                waited = self._coroutine.send(None)
            except StopIteration as stop:
                return stop.value
            if number == self._number:
                self.reached = True
                self._change()
            yield waited


class Counted:
    """Has a state that only its own code knows."""

    def __init__(self) -> None:
        self.count = 0

    def __getstate__(self) -> Any:
        return {"count": self.count}


class CopiesItself(Counted):
    def __deepcopy__(self, memo: Any) -> CopiesItself:
        other = CopiesItself()
        other.count = self.count
        return other


class Plain:
    pass


class _Value:
    """One of the ways in which a counter can stand in a tree."""

    def __init__(self, make: Callable[[], Any], add: Callable[[Any], object], read: Callable[[Any], int]) -> None:
        self.make, self.add, self.read = make, add, read


def _add_one(item: Any) -> None:
    item.count += 1


def _seed(item: random.Random) -> None:
    item.seed(1)


def _is_seeded(item: random.Random) -> int:
    return int(item.getstate() == random.Random(1).getstate())


def _increase(item: Any) -> None:
    item[0] += 1


VALUES = {
    "an array": _Value(lambda: np.zeros(3), _increase, lambda item: int(item[0])),
    "a large array": _Value(lambda: np.zeros(2**19), _increase, lambda item: int(item[0])),
    "a bytearray": _Value(lambda: bytearray(3), _increase, lambda item: item[0]),
    "a large bytearray": _Value(lambda: bytearray(2**21), _increase, lambda item: item[0]),
    "a state of its own": _Value(Counted, _add_one, lambda item: item.count),
    "a __deepcopy__": _Value(CopiesItself, _add_one, lambda item: item.count),
    "a generator": _Value(lambda: random.Random(0), _seed, _is_seeded),
    "a first attribute": _Value(Plain, lambda item: setattr(item, "count", 1), lambda item: getattr(item, "count", 0)),
    "a dict": _Value(lambda: {"n": 0}, lambda item: item.update(n=1), lambda item: item["n"]),
}


COMPARED = {"a dict", "a large array", "a large bytearray", "a first attribute"}
"""What is noted before the last step and compared, so that a change after its noting is always torn."""


@pytest.mark.one_loop
@pytest.mark.asyncio
@pytest.mark.parametrize("name", VALUES)
async def test_a_step_of_another_task_is_whole_or_torn(name: str) -> None:
    value = VALUES[name]
    total = whole = 0
    for number in count():
        tree: dict[str, Any] = {
            "first": [value.make()],
            "weights": [torch.zeros(1) for _ in range(400)],
            "objects": [Plain() for _ in range(20)],
            "last": [torch.zeros(1)],
        }

        def change(tree: dict[str, Any] = tree) -> None:
            value.add(tree["first"][0])
            tree["last"][0].add_(1)

        async with AsyncStager(IN_SINGLE_STEPS) as stager:
            changed = ChangedAt(stager.stage(tree), number, change)
            staged, error = await outcome(changed)
        if not changed.reached:
            break
        total += 1
        if error is None:
            whole += 1
            assert value.read(staged["first"][0]) == int(staged["last"][0]), number
    assert total > 5
    assert whole + (name in COMPARED) > 0


@pytest.mark.asyncio
async def test_an_attribute_that_a_tensor_is_given_on_the_way_is_torn() -> None:
    tree = {"a": torch.ones(2), "b": torch.ones(2)}
    async with AsyncStager() as stager:
        with copies_held(stager) as release:
            async with stager.snapshot(tree) as snapshot:
                tree["b"].note = 1  # type: ignore[attr-defined]
                release.set()
                with pytest.raises(TornSnapshotError) as caught:
                    await snapshot.captured()
    assert caught.value.paths == ("state_dict['b']",)


@pytest.mark.one_loop
@pytest.mark.asyncio
@pytest.mark.parametrize("stagings", [0, 1])
async def test_what_changes_between_two_steps_of_a_staging_is_not_learnt_for_the_next(stagings: int) -> None:
    for number in count():
        tree = [torch.zeros(1) for _ in range(520)]
        async with AsyncStager(IN_SINGLE_STEPS) as stager:
            for _ in range(stagings):
                await stager.stage(tree)
            changed = ChangedAt(stager.stage(tree), number, tree[300].requires_grad_)
            await outcome(changed)
            tree[300].requires_grad_()
            for _ in range(2):
                assert [n for n, each in enumerate(await stager.stage(tree)) if each.requires_grad] == [300], number
        if not changed.reached:
            break


@pytest.mark.asyncio
async def test_what_is_no_leaf_of_the_autograd_graph_is_not_taken_for_the_one_that_was_there() -> None:
    tensor = torch.ones(3, requires_grad=True)
    async with AsyncStager() as stager:
        for tree, requires_grad in (([tensor], True), ([tensor.view_as(tensor)], False), ([tensor], True)):
            for _ in range(3):
                assert [staged.requires_grad for staged in await stager.stage(tree)] == [requires_grad]


@pytest.mark.asyncio
async def test_another_shape_over_the_same_memory_is_torn() -> None:
    tree = {"a": torch.ones(2, 3)}
    async with AsyncStager() as stager:
        for _ in range(3):
            await stager.stage(tree)
        with copies_held(stager) as release:
            async with stager.snapshot(tree) as snapshot:
                tree["a"].data = tree["a"].data.t()
                release.set()
                with pytest.raises(TornSnapshotError):
                    await snapshot.captured()


@pytest.mark.asyncio
async def test_a_gradient_that_appears_on_the_way_is_torn() -> None:
    tree = {"a": torch.ones(2)}
    async with AsyncStager() as stager:
        for _ in range(3):
            await stager.stage(tree)
        with copies_held(stager) as release:
            async with stager.snapshot(tree) as snapshot:
                tree["a"].grad = torch.ones(2)
                release.set()
                with pytest.raises(TornSnapshotError):
                    await snapshot.captured()


@pytest.mark.asyncio
async def test_a_step_right_after_the_call_is_whole_or_torn() -> None:
    tree: dict[str, Any] = {"version": 7, "weights": [torch.zeros(1) for _ in range(8000)]}
    async with AsyncStager() as stager:
        coroutine = stager.stage(tree)
        torch._foreach_add_(tree["weights"], 1)
        tree["version"] = 8
        try:
            staged = await coroutine
        except TornSnapshotError:
            return
        assert all(int(weight) == staged["version"] - 7 for weight in staged["weights"])


class Own:
    def __init__(self) -> None:
        self.count = 0


def large_tree() -> dict[str, Any]:
    return {
        "weights": [torch.zeros(1) for _ in range(3000)],
        "nested": {"counter": 0, "names": ["a"], "set": {1}},
        "own": Own(),
        "small": np.zeros(3),
        "large": np.zeros(4 << 20, dtype=np.uint8),
        "bytes": bytearray(4 << 20),
        "random": random.Random(1),
    }


@pytest.mark.asyncio
@pytest.mark.parametrize("streamed", [None, False, True])
@pytest.mark.parametrize(
    ("change", "noticed"),
    [
        (lambda tree: torch._foreach_add_(tree["weights"], 1), True),
        (lambda tree: tree["weights"].append(1), True),
        (lambda tree: tree["nested"].update(counter=1), True),
        (lambda tree: tree["nested"]["names"].append("b"), True),
        (lambda tree: tree["nested"]["set"].add(2), True),
        (lambda tree: setattr(tree["own"], "count", 1), True),
        (lambda tree: tree["small"].fill(1), False),
        (lambda tree: tree["large"].fill(1), True),
        (lambda tree: tree["bytes"].extend(b"1"), True),
        (lambda tree: tree["random"].seed(2), False),
    ],
    ids=["weights", "list", "dict", "inner list", "set", "attribute", "array", "large array", "bytes", "random"],
)
async def test_one_indivisible_step_has_its_moment_at_the_call(
    streamed: bool | None, change: Callable[[Any], object], noticed: bool
) -> None:
    tree = large_tree()
    async with AsyncStager(StagingOptions(max_loop_hold=math.inf)) as stager:
        with copies_held(stager) as release:
            if streamed is None:
                task = asyncio.ensure_future(stager.stage(tree))
            else:
                task = asyncio.ensure_future(result_of(stager.snapshot(tree, streamed=streamed)))
            # The first step that another task takes after the call, before anything is copied.
            change(tree)
            release.set()
            staged, error = await outcome(task)
    assert (error is not None) is noticed
    if error is None:
        expected = large_tree()
        assert all(map(torch.equal, staged["weights"], expected["weights"]))
        assert staged["nested"] == expected["nested"]
        assert all(np.array_equal(staged[name], expected[name]) for name in ("small", "large"))
        assert staged["bytes"] == expected["bytes"]
        assert staged["random"].getstate() == expected["random"].getstate()


async def result_of(snapshot: Any) -> Any:
    async with snapshot:
        return await snapshot.result()


class TestCodeThatComputes:
    """Containers that were met earlier are filled when code looks at them."""

    def staged(self, tree: Any) -> Any:
        async def run() -> Any:
            async with AsyncStager() as stager:
                await stager.stage(tree)
                return await stager.stage(tree)

        return asyncio.run(run())

    def test_deepcopy(self) -> None:
        class Sum:
            def __init__(self, items: list[torch.Tensor]) -> None:
                self.items = items
                self.total = 0.0

            def __deepcopy__(self, memo: Any) -> Sum:
                other = Sum(copy.deepcopy(self.items, memo))
                other.total = float(sum(item.sum() for item in other.items))
                return other

        items = [torch.ones(2)]
        for tree in ({"l": items, "s": Sum(items)}, {"s": Sum(items), "l": items}, {"l": (items,), "s": Sum(items)}):
            staged = self.staged(tree)
            assert staged["s"].total == 2
            assert staged["s"].items is (staged["l"][0] if isinstance(staged["l"], tuple) else staged["l"])

    def test_a_memo_that_is_asked_for_keys_of_another_kind(self) -> None:
        class Counted:
            number = 0

            def __deepcopy__(self, memo: Any) -> Counted:
                other = Counted()
                memo[type(self)] = other.number = memo.get(type(self), 0) + memo.get("by name", 1)
                return other

        assert [item.number for item in self.staged([Counted(), Counted()])] == [1, 2]

    def test_reduce_arguments_and_setstate(self) -> None:
        staged = self.staged([SHARED, ByArguments(SHARED), ByState(SHARED)])
        assert staged[1].total == staged[2].total == 3
        assert staged[1].items is staged[2].items is staged[0]

    def test_hashes(self) -> None:
        key = Hashed(SHARED)
        staged = self.staged([SHARED, {key: 1}, frozenset([key])])
        (copied_key,) = staged[1]
        assert staged[1][copied_key] == 1
        assert copied_key in staged[2]

    def test_what_contains_the_object_that_looks(self) -> None:
        class Looks:
            parent: Any = None
            seen = -1

            def __deepcopy__(self, memo: Any) -> Looks:
                other = Looks()
                other.parent = copy.deepcopy(self.parent, memo)
                other.seen = len(other.parent)
                return other

        looks = Looks()
        tree = [torch.ones(1), looks, torch.zeros(1)]
        looks.parent = tree
        expected, staged = copy.deepcopy(tree), self.staged(tree)
        assert staged[1].parent is staged
        assert staged[1].seen == expected[1].seen == 1  # type: ignore[attr-defined]
        assert len(staged) == 3

    def test_a_tuple_that_an_object_holds_as_well_is_one(self) -> None:
        class Holds:
            def __init__(self, pair: Any) -> None:
                self.pair = pair

            def __deepcopy__(self, memo: Any) -> Holds:
                return Holds(copy.deepcopy(self.pair, memo))

        pair = (torch.ones(1), 1)
        array = np.empty(1, dtype=object)
        array[0] = pair[0]
        for tree in ([pair, Holds(pair), array], [array, Holds(pair), pair]):
            staged = self.staged(tree)
            pairs = [item for item in staged if isinstance(item, tuple)]
            arrays = [item for item in staged if isinstance(item, np.ndarray)]
            assert staged[1].pair is pairs[0]
            assert arrays[0][0] is pairs[0][0]

    def test_attributes_and_gradients_inside_an_object_that_copies_itself(self) -> None:
        class Holds:
            def __init__(self, tensor: torch.Tensor) -> None:
                self.tensor = tensor

            def __deepcopy__(self, memo: Any) -> Holds:
                return Holds(copy.deepcopy(self.tensor, memo))

        tensor = torch.ones(2)
        tensor.grad = torch.full((2,), 3.0)
        tensor.note = [1]  # type: ignore[attr-defined]
        (staged,) = self.staged([Holds(tensor)])
        assert staged.tensor.grad.tolist() == [3, 3]
        assert staged.tensor.note == [1]
        assert staged.tensor.note is not tensor.note  # type: ignore[attr-defined]


SHARED: list[Any] = [torch.ones(1), torch.full((1,), 2.0)]


class ByArguments:
    def __init__(self, items: list[torch.Tensor]) -> None:
        self.items = items
        self.total = float(sum(items))

    def __reduce__(self) -> Any:
        return ByArguments, (self.items,)


class ByState:
    def __init__(self, items: list[torch.Tensor]) -> None:
        self.items = items

    def __setstate__(self, state: Any) -> None:
        self.items = state["items"]
        self.total = float(sum(self.items))


class Hashed:
    def __init__(self, items: list[torch.Tensor]) -> None:
        self.items = items

    def __hash__(self) -> int:
        return hash(tuple(float(item) for item in self.items))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hashed) and self.items is other.items


class TestGradients:
    def staged(self, tree: Any) -> Any:
        async def run() -> Any:
            async with AsyncStager() as stager:
                for _ in range(3):
                    first = await stager.stage(tree)
                return first

        return asyncio.run(run())

    def test_of_a_tensor_that_requires_none(self) -> None:
        tensor = torch.ones(2)
        tensor.grad = torch.full((2,), 5.0)
        staged = self.staged([tensor, tensor.grad])
        assert staged[0].grad is staged[1]
        assert staged[1].tolist() == [5, 5]

    def test_of_a_sparse_leaf(self) -> None:
        leaf = torch.eye(2).to_sparse().requires_grad_()
        leaf.grad = torch.eye(2).to_sparse()
        staged = self.staged([leaf])[0]
        assert torch.equal(staged.grad.to_dense(), torch.eye(2))

    def test_that_appears_after_a_structure_was_learnt(self) -> None:
        async def run() -> None:
            tensor = torch.ones(2, requires_grad=True)
            async with AsyncStager() as stager:
                for _ in range(4):
                    assert (await stager.stage([tensor]))[0].grad is None
                tensor.grad = torch.full((2,), 7.0)
                assert (await stager.stage([tensor]))[0].grad.tolist() == [7, 7]

        asyncio.run(run())


@pytest.mark.asyncio
async def test_strides_of_dimensions_of_size_one_stay() -> None:
    weight = torch.arange(32.0).reshape(8, 4, 1, 1).to(memory_format=torch.channels_last)
    async with AsyncStager() as stager:
        staged = (await stager.stage([weight, torch.ones(3)]))[0]
    assert staged.stride() == weight.stride()
    assert torch.equal(staged, weight)


@pytest.mark.asyncio
async def test_a_tensor_as_a_key_is_short_in_a_path() -> None:
    key = torch.ones(1000)
    async with AsyncStager() as stager:
        staged = await stager.stage({key: torch.ones(1)})
        (copied_key,) = staged
        assert torch.equal(copied_key, key)
        tree = {key: torch.empty(1, device="meta")}
        with pytest.raises(Exception, match="meta") as caught:
            await stager.stage(tree)
    assert len(str(caught.value)) < 300


@pytest.mark.asyncio
@pytest.mark.parametrize("make", [deque, list, OrderedDict.fromkeys, set])
async def test_subclasses_of_containers_that_change_between_steps(make: Any) -> None:
    cls = type("Own", (type(make(())),), {})
    source = cls(make(range(5000)))
    tree = {"first": source, "rest": [[n] for n in range(3000)]}
    async with AsyncStager(StagingOptions(max_loop_hold=1e-9)) as stager:
        task = asyncio.ensure_future(stager.stage(tree))
        for turn in range(20):
            await asyncio.sleep(0)
            if turn == 5:
                {deque: lambda: source.append(1), list: lambda: source.append(1), set: lambda: source.add(-1)}.get(
                    make, lambda: source.update({-1: 1})
                )()
        staged, error = await outcome(task)
    if error is not None:
        assert error.paths[0].startswith("state_dict['first']")
    else:
        assert len(staged["first"]) == 5001


async def outcome(task: asyncio.Future[Any]) -> tuple[Any, TornSnapshotError | None]:
    try:
        return await task, None
    except TornSnapshotError as error:
        return None, error
