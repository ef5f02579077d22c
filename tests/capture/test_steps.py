"""A staging computes on the event loop in steps whose number grows with the tree, and a leaf costs it few calls.

Counts, not times: they are the same on every machine.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import math
import sys
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import pytest
import torch

from aiostage import AsyncStager, StagingOptions
from aiostage._capture import leaves as leaves_module
from aiostage._capture.faithful import Inspection
from aiostage._capture.leaves import LEAVES_PER_STEP, Leaves, Table, changed
from aiostage._capture.plan import compile_plan
from aiostage._capture.versions import copy_buffer
from aiostage._capture.walk import Walk
from aiostage._copy import phases
from aiostage._loop import coroutines
from aiostage._loop.coroutines import exhausted

MANY = 40_000
YOUNG = 2000
IN_ONE_STEP = 5000
"""How many children one step may deal with at most: less than 5 ms, at below a microsecond each."""


class Thing:
    pass


def with_attributes(owner: Any) -> Any:
    for number in range(MANY):
        setattr(owner, f"a{number}", float(number))
    return owner


def nested() -> Any:
    tree: list[Any] = []
    for _ in range(MANY):
        tree = [tree]
    return tree


def views() -> list[torch.Tensor]:
    base = torch.zeros(MANY + 10)
    return [base[start : start + 10] for start in range(MANY)]


def parameters() -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.zeros(1)) for _ in range(MANY // 10)]
    for parameter in made:
        parameter.info = {"a": 1}  # type: ignore[attr-defined]
    return made


TREES: dict[str, tuple[Callable[[], Any], int]] = {
    "attributes of a tensor": (lambda: [with_attributes(torch.zeros(1))], MANY),
    "attributes of an object": (lambda: [with_attributes(Thing())], MANY),
    "overlapping views": (views, MANY),
    "tuples": (lambda: [(number,) for number in range(MANY)], MANY),
    "lists": (lambda: [[number] for number in range(MANY)], MANY),
    "set": (lambda: [set(range(MANY))], MANY),
    "frozenset": (lambda: [frozenset(range(MANY))], MANY),
    "defaultdict": (lambda: [defaultdict(list, {number: number for number in range(MANY)})], MANY),
    "one tensor": (lambda: [torch.zeros(1)] * MANY, MANY),
    "nesting": (nested, MANY),
    "dict": (lambda: [{number: number for number in range(MANY)}], MANY),
    "OrderedDict": (lambda: [OrderedDict((number, number) for number in range(MANY))], MANY),
    "list": (lambda: [list(range(MANY))], MANY),
    "parameters with attributes": (parameters, MANY // 10),
    "bytearray": (lambda: [bytearray(2**26)], 2**26 // 100),
    "ndarray": (lambda: [np.zeros(2**26, dtype=np.uint8)], 2**26 // 100),
}


def steps(work: Generator[None, None, Any]) -> tuple[int, Any]:
    """Run a generator to its end, and return how many steps it took and what it returned."""
    count = 0
    while True:
        count += 1
        try:
            next(work)
        except StopIteration as stop:
            return count, stop.value


def walked(tree: Any, inspection: Inspection) -> Walk:
    walk = Walk()
    exhausted(walk.run(tree))
    exhausted(walk.inspect(inspection))
    exhausted(walk.settle(inspection))
    return walk


@pytest.mark.parametrize("name", TREES)
def test_the_steps_of_every_phase_grow_with_the_tree(name: str) -> None:
    make, size = TREES[name]
    tree = make()
    walk, inspection = Walk(), Inspection(None)
    fewest = size // IN_ONE_STEP
    taken = {"run": steps(walk.run(tree))[0]}
    inspected = steps(walk.inspect(inspection))[0] + steps(walk.settle(inspection))[0]
    tensors = walk.leaves.tensors
    if len(tensors) > IN_ONE_STEP:
        taken["inspect"] = inspected
        taken["plan"], _ = steps(compile_plan(walk.leaves.specs, walk.leaves.addresses))
        taken["leaves"], found = steps(changed(walk.leaves, inspection))
        assert found == []
    again, found = steps(walk.changes.changed())
    assert found == []
    if name not in ("tuples", "frozenset", "overlapping views", "one tensor"):
        taken["compare"] = again
    taken["rebuild"], _ = steps(walk.rebuild([tensor.detach() for tensor in tensors]))
    taken["release"], _ = steps(walk.releasing())
    if name in ("bytearray", "ndarray"):
        del taken["rebuild"], taken["release"]
    assert {phase: count for phase, count in taken.items() if count < fewest} == {}
    walk.release()
    while name == "nesting" and tree:
        inside = tree[0]
        tree.clear()
        tree = inside


@pytest.mark.parametrize("make", [lambda: [deque(range(MANY))], lambda: [tuple(range(MANY))]], ids=["deque", "tuple"])
def test_what_is_read_in_one_call_is_built_in_steps(make: Callable[[], Any]) -> None:
    tree = make()
    walk = walked(tree, Inspection(None))
    count, copy = steps(walk.rebuild([]))
    assert copy == tree
    assert count >= MANY // IN_ONE_STEP
    assert steps(walk.releasing())[0] >= (MANY // IN_ONE_STEP if isinstance(tree[0], deque) else 1)


# Calls


def calls(work: Callable[[], object]) -> int:
    """Return how many functions are called, those that are written in C included, where Python code calls them."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        if event in ("call", "c_call"):
            count += 1

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


LEAVES = 20_000


def flat() -> dict[str, torch.Tensor]:
    return {str(number): torch.ones(1) for number in range(LEAVES)}


class TestCalls:
    """Ceilings for a warm staging of many small tensors: work is done by C, a few hundred leaves at a time."""

    def test_note(self) -> None:
        tree, inspection = flat(), Inspection(None)
        walked(tree, inspection)
        assert calls(lambda: exhausted(Walk().run(tree))) < LEAVES / 10

    def test_inspect(self) -> None:
        tree, inspection = flat(), Inspection(None)
        for _ in range(3):
            walked(tree, inspection)
        walk = Walk()
        exhausted(walk.run(tree))
        assert calls(lambda: exhausted(walk.inspect(inspection))) < LEAVES / 10

    def test_what_is_new_is_inspected_in_the_step_in_which_it_is_noted(self) -> None:
        tree, walk, inspection = flat(), Walk(), Inspection(None)
        walk.at_call = True
        work = walk.run(tree, inspection)
        next(work)
        walk.at_call = False
        assert walk.leaves.specs == []
        assert calls(lambda: exhausted(work)) < LEAVES / 2
        assert len(walk.leaves.specs) > LEAVES - LEAVES_PER_STEP

    def test_what_is_known_is_recognized_in_the_step_in_which_it_is_noted(self) -> None:
        # While it is in the processor's caches: coming back to it costs as much again.
        tree, inspection = flat(), Inspection(None)
        for _ in range(3):
            walked(tree, inspection)
        walk = Walk()
        exhausted(walk.run(tree, inspection))
        assert len(walk.leaves.specs) > LEAVES - LEAVES_PER_STEP
        assert steps(walk.inspect(inspection))[0] <= 3

    @pytest.mark.parametrize("stagings", [0, 3])
    @pytest.mark.parametrize("deepcopied", [False, True])
    def test_compare(self, stagings: int, deepcopied: bool) -> None:
        tree, inspection = flat(), Inspection(None)
        if deepcopied:
            # It leaves an empty dict of attributes on each tensor that it copies.
            copy.deepcopy(tree)
        for _ in range(stagings):
            walked(tree, inspection)
        walk = walked(tree, inspection)
        assert calls(lambda: exhausted(changed(walk.leaves, inspection))) < LEAVES / 10
        assert calls(lambda: exhausted(walk.changes.changed())) < LEAVES / 10

    def test_rebuild_and_release(self) -> None:
        tree = flat()
        walk = walked(tree, Inspection(None))
        staged = list(walk.leaves.tensors)
        assert calls(lambda: exhausted(walk.rebuild(staged))) < LEAVES / 10
        assert calls(lambda: exhausted(walk.releasing())) < LEAVES / 10

    def test_columns_are_emptied_in_steps_and_paths_stay(self) -> None:
        walk = walked(flat(), Inspection(None))
        least = LEAVES
        for _ in walk.leaves.releasing():
            left = len(walk.leaves.tensors) + len(walk.leaves.versions)
            least = min(least, max(0, 2 * LEAVES - left))
        assert least < LEAVES / 5
        columns = (walk.leaves.tensors, walk.leaves.storages, walk.leaves.versions, walk.leaves.storage_sizes)
        assert not any(columns)
        assert len(walk.leaves) == LEAVES
        walk.release()
        assert walk.path(LEAVES - 1) == (str(LEAVES - 1),)

    def test_a_container_costs_a_few_calls(self) -> None:
        tree = {n: {"step": torch.ones(()), "a": torch.ones(1), "b": torch.ones(1)} for n in range(1000)}

        def work() -> None:
            walk = walked(tree, Inspection(None))
            exhausted(walk.rebuild(list(walk.leaves.tensors)))
            exhausted(walk.changes.changed())

        assert calls(work) < 1000 * 150

    @pytest.mark.asyncio
    async def test_the_collector_is_given_the_staged_tensors_and_little_else(self) -> None:
        # Each 700 objects more are a run of the collector, and each eleventh of those a larger one.
        tree = flat()
        async with AsyncStager() as stager:
            for _ in range(3):
                await stager.stage(tree)
            # What is there is old from now on. What other threads free of it counts for nothing.
            gc.collect()
            gc.disable()
            try:
                staging = asyncio.ensure_future(stager.stage(tree))
                most = turns = 0
                while not staging.done():
                    await asyncio.sleep(0)
                    turns += 1
                    if turns % 16 == 0:
                        most = max(most, len(gc.get_objects(generation=0)))
                after = len(gc.get_objects(generation=0))
            finally:
                gc.enable()
            assert len(staging.result()) == LEAVES
            assert LEAVES <= after < 1.01 * LEAVES
            assert most < 1.05 * LEAVES

    @pytest.mark.asyncio
    async def test_a_warm_staging(self) -> None:
        tree = flat()
        # How many turns the event loop gets depends on how fast the machine is, so it gets none.
        async with AsyncStager(StagingOptions(max_loop_hold=math.inf)) as stager:
            for _ in range(3):
                await stager.stage(tree)
            count = 0

            def profile(frame: Any, event: str, argument: Any) -> None:
                nonlocal count
                count += event in ("call", "c_call")

            sys.setprofile(profile)
            try:
                staged = await stager.stage(tree)
            finally:
                sys.setprofile(None)
            assert len(staged) == LEAVES
            assert count < LEAVES
            # One gathering for a few thousand leaves.
            before = stager.statistics().copies
            await stager.stage(tree)
            assert stager.statistics().copies - before <= 10


def test_no_table_of_ours_has_so_many_entries_that_the_next_one_holds_the_loop() -> None:
    table: Table[int] = Table(dict)
    for number in range(3 * MANY):
        table.put(number << 4, number)
    assert max(map(len, table.values())) <= 2**16
    assert [table.find(number << 4) for number in range(3 * MANY)] == list(range(3 * MANY))
    assert table.find(17) is None
    assert table.find(-1) is None


def test_a_deque_is_read_in_steps_also_where_it_has_a_largest_length() -> None:
    for source in (deque(range(MANY)), deque(range(MANY), maxlen=MANY)):
        walk = Walk()
        count, _ = steps(walk.run([source]))
        assert count >= MANY // IN_ONE_STEP
        exhausted(walk.inspect(Inspection(None)))
        copy = exhausted(walk.rebuild([]))[0]
        assert (copy, copy.maxlen) == (source, source.maxlen)
        source[MANY // 2] = None
        assert exhausted(walk.changes.changed()) == [(0, MANY // 2)]


def test_a_deque_that_changes_while_it_is_read_is_noted_anew() -> None:
    source = deque(range(MANY))
    walk = Walk()
    work = walk.run([source])
    next(work)
    source.append(-1)
    exhausted(work)
    exhausted(walk.inspect(Inspection(None)))
    assert exhausted(walk.rebuild([]))[0] == source
    assert exhausted(walk.changes.changed()) == []


def test_a_bytearray_that_becomes_shorter_while_it_is_copied_shows_nothing_that_was_not_written() -> None:
    source = bytearray(range(256)) * 2**14
    work = copy_buffer(source)
    next(work)
    del source[2**20 :]
    assert exhausted(work) == source
    assert exhausted(copy_buffer(source)) == source


@pytest.mark.parametrize("few", [8, 0], ids=["in few places", "in many places"])
def test_tensors_are_told_apart_without_a_table_that_grows_large(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tensors of a step lie in a mebibyte or two; in more, each is looked at by itself.
    monkeypatch.setattr(leaves_module, "_FEW_PARTS", few)
    tensors = [torch.ones(1) for _ in range(LEAVES)]
    leaves = Leaves()
    # Met again, within one step and in a later one.
    scattered = tensors[:: LEAVES // LEAVES_PER_STEP]
    for tensor in (*tensors, tensors[0], tensors[0], tensors[-1], *scattered):
        leaves.append((tensor,))
    assert steps(leaves.index())[0] >= LEAVES // LEAVES_PER_STEP
    assert all(leaves.index_of(id(tensor)) == index for index, tensor in enumerate(tensors))
    expected = [0, 0, LEAVES - 1, *range(0, LEAVES, LEAVES // LEAVES_PER_STEP)]
    assert [leaves.aliases.find(LEAVES + number) for number in range(len(expected))] == expected
    # A part is a mebibyte of tensor objects at most, and there are several.
    assert len(leaves.positions) > 1
    assert max(map(len, leaves.positions.values())) <= 2**20 // torch.ones(1).__sizeof__()
    exhausted(leaves.releasing())
    assert not leaves.positions


@pytest.mark.parametrize("inline", [False, True], ids=["threads", "inline"])
def test_a_large_new_plan_is_made_beside_the_loop(inline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[int] = []

    def noted(*arguments: Any) -> Any:
        planned.append(threading.get_ident())
        return (yield from compile_plan(*arguments))

    monkeypatch.setattr(phases, "compile_plan", noted)

    async def run() -> None:
        async with AsyncStager(StagingOptions(use_async_staging=not inline)) as stager:
            for tree in ({"a": torch.ones(1)}, flat(), flat()):
                staged = await stager.stage(tree)
                assert staged.keys() == tree.keys()
                assert all(map(torch.equal, staged.values(), tree.values()))

    asyncio.run(run())
    loop = threading.get_ident()
    # Small ones, and those without threads, are made by the loop.
    assert [thread == loop for thread in planned] == ([True, True, True] if inline else [True, False, False])


@pytest.mark.parametrize("enabled", [True, False], ids=["collector on", "collector off"])
def test_the_collector_comes_early_in_a_large_first_staging(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    def note(phase: str, about: dict[str, int]) -> None:
        if phase == "stop":
            runs.append(about["generation"])

    async def run() -> None:
        async with AsyncStager() as stager:
            tree = {str(number): torch.ones(1) for number in range(5 * YOUNG // 2)}
            gc.collect()
            gc.callbacks.append(note)
            try:
                await stager.stage(tree)
            finally:
                gc.callbacks.remove(note)

    # Fewer, so that a small tree has as many young runs as a large one.
    monkeypatch.setattr(coroutines, "_YOUNG_OBJECTS", YOUNG)
    monkeypatch.setattr(coroutines, "_FEW_YOUNG_RUNS", 1)
    before = gc.get_threshold()
    if not enabled:
        gc.disable()
    try:
        gc.set_threshold(700, 10, 1000)
        asyncio.run(run())
    finally:
        gc.set_threshold(*before)
        gc.enable()
    # By itself it would come to that after eleven young runs, and this staging has three or four.
    assert runs.count(1) == enabled
    assert 2 not in runs
