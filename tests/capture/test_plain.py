"""The short walk: the same trees as the general walk's, for a fraction of the calls, and a clear end where it ends."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aiostage import AsyncStager
from aiostage._capture.leaves import Inspection, NotPlain
from aiostage._capture.plain import PlainWalk
from aiostage._capture.rebuild import Results
from aiostage._capture.walk import Walk
from aiostage._loop.slices import exhausted
from aiostage.leaf import Attribute


@contextmanager
def counting_calls() -> Iterator[list[str]]:
    """Note the calls of Python functions, which is what the loop is held for; calls into C are many leaves each."""
    called: list[str] = []

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            called.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        yield called
    finally:
        sys.setprofile(None)


def calls(work: Callable[[], object]) -> int:
    with counting_calls() as called:
        work()
    return len(called)


def walked(tree: object, inspection: Inspection | None = None) -> PlainWalk:
    walk = PlainWalk()
    exhausted(walk.run(tree))
    exhausted(walk.leaves.inspect(inspection or Inspection(None)))
    return walk


def rebuilt(walk: PlainWalk | Walk, leaves: list[torch.Tensor]) -> Any:
    return exhausted(walk.rebuild(Results(leaves, walk.late)))


def parametric() -> OrderedDict[str, Any]:
    tree: OrderedDict[str, Any] = OrderedDict(a=torch.ones(1), b=[1, (torch.ones(2), "x")])
    tree._metadata = {"": {"version": 1}, "t": torch.ones(3)}  # type: ignore[attr-defined]
    return tree


TREES = st.recursive(
    st.none() | st.integers() | st.text(max_size=3) | st.builds(torch.ones, st.integers(0, 3)),
    lambda children: st.one_of(
        st.lists(children, max_size=4),
        st.lists(children, max_size=4).map(tuple),
        st.dictionaries(st.text(max_size=2) | st.integers(0, 9), children, max_size=4),
        st.dictionaries(st.text(max_size=2), children, max_size=4).map(OrderedDict),
    ),
    max_leaves=20,
).filter(lambda tree: type(tree) in (list, tuple, dict, OrderedDict))


def shape(tree: Any) -> Any:
    """Say what a tree is, with the identities of its leaves."""
    if isinstance(tree, torch.Tensor):
        return id(tree)
    if isinstance(tree, dict):
        return type(tree), [(key, shape(value)) for key, value in tree.items()], shape(getattr(tree, "__dict__", None))
    if isinstance(tree, (list, tuple)):
        return type(tree), [shape(child) for child in tree]
    return tree


@given(TREES)
def test_builds_what_the_general_walk_builds(tree: Any) -> None:
    # Distinct objects throughout: what is shared is the general walk's.
    tree = copy.deepcopy(tree)
    short, general = PlainWalk(), Walk()
    try:
        exhausted(short.run(tree))
        exhausted(short.leaves.inspect(Inspection(None)))
    except NotPlain:
        return
    exhausted(general.run(tree))
    assert set(map(id, short.leaves.tensors)) == set(map(id, general.leaves.tensors))
    assert shape(rebuilt(short, list(short.leaves.tensors))) == shape(rebuilt(general, list(general.leaves.tensors)))
    paths = {id(tensor): general.path(index) for index, tensor in enumerate(general.leaves.tensors)}
    assert {id(tensor): short.path(index) for index, tensor in enumerate(short.leaves.tensors)} == paths


def test_copies_every_container_and_keeps_attributes() -> None:
    tree = parametric()
    walk = walked(tree)
    built = rebuilt(walk, [tensor + 1 for tensor in walk.leaves.tensors])
    assert type(built) is OrderedDict
    assert built is not tree
    assert built["b"] is not tree["b"]
    assert built["b"][1][1] == "x"
    assert built._metadata[""] == {"version": 1}
    assert built._metadata[""] is not tree._metadata[""]  # type: ignore[attr-defined]
    assert float(built._metadata["t"][0]) == 2
    assert {walk.path(index) for index in range(3)} == {("a",), (Attribute("_metadata"), "t"), ("b", 1, 0)}


def test_large_containers_are_built_in_steps() -> None:
    tree = {"flat": {str(n): torch.ones(1) for n in range(2000)}, "mixed": [[n] if n % 2 else n for n in range(2000)]}
    walk = walked(tree)
    work = walk.rebuild(Results(list(walk.leaves.tensors)))
    yields = 0
    while True:
        try:
            next(work)
            yields += 1
        except StopIteration as stop:
            built = stop.value
            break
    assert yields >= 8
    assert shape(built) == shape(tree)


def test_large_mappings_are_read_in_steps_and_a_change_of_size_ends_the_short_way() -> None:
    tree = {str(n): n for n in range(20_000)}
    walk = PlainWalk()
    work = walk.run(tree)
    next(work)
    assert 0 < len(walk._nodes[0].children) < 20_000
    exhausted(work)
    assert shape(rebuilt(walk, [])) == shape(tree)

    work = PlainWalk().run(tree)
    next(work)
    tree["another"] = 1
    with pytest.raises(NotPlain):
        exhausted(work)


def _shared() -> object:
    inner = [1]
    return [inner, inner]


def _circle() -> object:
    tree: list[object] = []
    tree.append(tree)
    return tree


def _twice() -> object:
    tensor = torch.ones(1)
    return {"a": tensor, "b": [tensor]}


def _with_attribute() -> object:
    tensor = torch.ones(1)
    tensor.note = 1  # type: ignore[attr-defined]
    return [tensor]


class _Key(str):
    pass


@pytest.mark.parametrize(
    "make",
    [
        _shared,
        _circle,
        _twice,
        _with_attribute,
        lambda: [slice(1)],
        lambda: {_Key("a"): 1},
        lambda: [torch.ones(1).as_subclass(type("Own", (torch.Tensor,), {}))],
        lambda: torch.ones(1),
        lambda: {"a": {1, 2}},
    ],
)
def test_ends_at_what_is_not_plain(make: Callable[[], object]) -> None:
    with pytest.raises(NotPlain):
        walked(make())


@pytest.mark.asyncio
async def test_keeps_nothing_of_the_source_when_it_ends_early() -> None:
    source = {"inside": [{"a": torch.ones(1)}], "odd": slice(1)}
    alive = weakref.ref(source["inside"][0]["a"])  # type: ignore[index]
    gc.collect()
    gc.disable()
    try:
        async with AsyncStager() as stager:
            staged = await stager.stage(source)
            del source
            assert alive() is None
        assert staged["odd"] == slice(1)
    finally:
        gc.enable()


def test_a_tensor_met_twice_is_noticed_whether_or_not_its_neighbours_are_known() -> None:
    inspection = Inspection(None)
    tensors = [torch.ones(1) for _ in range(600)]
    for _ in range(4):
        walked(tensors, inspection)
    assert inspection.apart
    for place in (0, 300, 599):
        other = list(tensors)
        other[place] = other[place - 1]
        for _ in range(4):
            with pytest.raises(NotPlain):
                walked(other, inspection)
    for _ in range(4):
        walked(tensors, inspection)
    assert inspection.apart


def test_tensors_over_one_memory_are_no_repetition() -> None:
    inspection = Inspection(None)
    tensor = torch.ones(4)
    for tree in ([tensor, tensor.view(4)], [torch.empty(0), torch.empty(0)]):
        for _ in range(4):
            assert len(walked(tree, inspection).leaves) == 2
        assert not inspection.apart
        with pytest.raises(NotPlain):
            walked([tree[0], tree[0]], inspection)


def test_a_tuple_of_atoms_may_be_shared() -> None:
    betas = (0.9, 0.999)
    tree = [{"betas": betas}, {"betas": betas}]
    assert rebuilt(walked(tree), [])[1]["betas"] is betas


def test_a_change_is_noticed_by_the_second_look() -> None:
    tree = {"a": [1, 2], "b": {"c": torch.ones(1)}}
    walk = walked(tree)
    tree["a"][0] = 3  # type: ignore[index]
    tree["b"]["d"] = 1  # type: ignore[index]
    assert set(exhausted(walk.witness.changed())) == {("a", 0), ("b",)}


class TestCosts:
    """Counts of Python calls guard what was gained: they do not depend on the machine."""

    def test_a_leaf_of_a_flat_tree_costs_no_call(self) -> None:
        tree = {str(n): torch.ones(1) for n in range(10_000)}
        inspection = Inspection(None)
        for _ in range(3):
            walked(tree, inspection)

        def work() -> None:
            walk = walked(tree, inspection)
            rebuilt(walk, list(walk.leaves.tensors))
            exhausted(walk.witness.changed())

        assert calls(work) < 10_000 / 20

    def test_a_container_costs_a_few_calls(self) -> None:
        tree = {n: {"step": torch.ones(()), "a": torch.ones(1), "b": torch.ones(1)} for n in range(1000)}

        def work() -> None:
            walk = walked(tree)
            rebuilt(walk, list(walk.leaves.tensors))
            exhausted(walk.witness.changed())

        assert calls(work) < 1000 * 20

    @pytest.mark.asyncio
    async def test_a_warm_staging_costs_less_than_a_call_a_leaf(self) -> None:
        tree = {str(n): torch.ones(1) for n in range(20_000)}
        async with AsyncStager() as stager:
            for _ in range(3):
                await stager.stage(tree)
            with counting_calls() as called:
                staged = await stager.stage(tree)
            assert len(staged) == 20_000
            assert len(called) < 20_000
            # One gathering for a few thousand leaves.
            before = stager.statistics().copies
            await stager.stage(tree)
            assert stager.statistics().copies - before <= 10
