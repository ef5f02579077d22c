"""The layout of arenas, as what it is: a pure function. No tensor is made, no byte is copied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aiostage._capture import plan as module
from aiostage._capture.faithful import Spec
from aiostage._capture.plan import MixedCast, Plan, as_range, compile_plan
from aiostage._loop.coroutines import exhausted

CUDA = torch.device("cuda", 0)
DTYPES = [torch.uint8, torch.float16, torch.float32, torch.complex64, torch.complex128]


def spec(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    stride: Sequence[int] | None = None,
    target: torch.dtype | None = None,
    device: torch.device | None = None,
    by_value: bool = False,
) -> Spec:
    if stride is None:
        stride = torch.empty(tuple(shape), device="meta").stride()
    return Spec(torch.Tensor, dtype, target or dtype, tuple(shape), tuple(stride), False, device, by_value)


def compiled(specs: Sequence[Spec | None], addresses: Sequence[int]) -> Plan:
    return exhausted(compile_plan(specs, addresses))


@contextmanager
def small_batches(nbytes: int, leaves: int) -> Iterator[None]:
    """Cut batches as if little data were much."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BATCH_BYTES", nbytes)
        patch.setattr(module, "BATCH_LEAVES", leaves)
        patch.setattr(module, "RUN_LEAVES", max(1, leaves // 2))
        yield


def carry_out(
    plan: Plan, specs: Sequence[Spec | None], addresses: Sequence[int]
) -> tuple[dict[int, Any], dict[int, int]]:
    """Do what a plan says, with addresses for bytes.

    Returns:
        For each byte of the arena which byte of the source it came from (or which element, where it was cast), and
        where each leaf is in the arena.
    """
    arena: dict[int, Any] = {}
    places: dict[int, int] = {}
    completed: list[int] = []
    for batch in plan.batches:
        written: set[int] = set()

        def write(index: int, start: int, count: int, offset: int, written: set[int] = written) -> None:
            each = specs[index]
            assert each is not None
            if each.dtype == each.target:
                source = addresses[index] + start * each.dtype.itemsize
                moved = {offset + n: source + n for n in range(count * each.dtype.itemsize)}
            else:
                moved = {
                    offset + n * each.target.itemsize + m: (addresses[index] + (start + n) * each.dtype.itemsize, m)
                    for n in range(count)
                    for m in range(each.target.itemsize)
                }
            # An element of which a part is there already is copied once more, to where it is.
            again = moved.keys() & arena.keys()
            assert len(again) < each.dtype.itemsize, "an element is copied twice"
            assert all(arena[byte] == moved[byte] for byte in again), "a byte is written twice"
            arena.update(moved)
            written |= moved.keys()

        for run in batch.runs:
            for number, index in enumerate(run.indices):
                places[index] = run.offset + number * run.spec.staged_nbytes
                if run.is_whole:
                    write(index, 0, run.spec.extent, places[index])
        for group in batch.overlap_groups:
            for index, offset in zip(group.indices, group.offsets, strict=True):
                places[index] = group.offset + offset
        for piece in batch.pieces:
            write(piece.index, piece.start, piece.length, piece.offset)
        assert all(batch.start <= byte < batch.stop for byte in written)
        devices = {each.device for index in batch.completes if (each := specs[index]) is not None}
        assert devices <= {batch.device}
        completed += batch.completes
    assert sorted(completed) == sorted(index for index, each in enumerate(specs) if each is not None and each.extent)
    assert sorted(plan.order) == list(range(len(plan.batches)))
    return arena, places


def check(specs: Sequence[Spec | None], addresses: Sequence[int]) -> Plan:
    plan = compiled(specs, addresses)
    arena, places = carry_out(plan, specs, addresses)
    assert all(0 <= byte < plan.nbytes for byte in arena)
    for index, each in enumerate(specs):
        if each is None or not each.extent:
            assert index not in places
            continue
        place = places[index]
        assert place % each.target.itemsize == 0, "a leaf is not aligned to its elements"
        for n in range(each.extent):
            for m in range(each.target.itemsize):
                came_from = arena[place + n * each.target.itemsize + m]
                source = addresses[index] + n * each.dtype.itemsize
                assert came_from == (source + m if each.dtype == each.target else (source, m))
    position = 0
    for batch in plan.batches:
        assert position <= batch.start <= batch.stop
        position = batch.stop
    assert position <= plan.nbytes
    return plan


@st.composite
def leaves(draw: st.DrawFn) -> tuple[list[Spec | None], list[int]]:
    """Views of a few storages, and leaves without memory, on the host and on a device."""
    specs: list[Spec | None] = []
    addresses: list[int] = []
    for _ in range(draw(st.integers(0, 12))):
        if draw(st.integers(0, 9)) == 0:
            specs.append(None)
            addresses.append(0)
            continue
        dtype = draw(st.sampled_from(DTYPES))
        device = draw(st.sampled_from([None, None, CUDA]))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        stride = None
        if draw(st.booleans()):
            stride = draw(st.lists(st.integers(0, 5), min_size=len(shape), max_size=len(shape)))
        storage = draw(st.integers(0, 6))
        offset = draw(st.integers(0, 30)) * dtype.itemsize
        # A storage is on one device, and far from all others.
        base = 1 << 20 if device is None else 1 << 30
        specs.append(spec(shape, dtype, stride=stride, device=device))
        addresses.append(base + (storage << 12) + offset)
    return specs, addresses


@given(leaves(), st.sampled_from([(64, 4), (1 << 10, 2048), (1 << 25, 2048)]))
def test_every_byte_comes_from_where_it_should_once(made: tuple[list[Spec | None], list[int]], limits: Any) -> None:
    with small_batches(*limits):
        check(*made)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 12)), min_size=1, max_size=8))
def test_casting_moves_what_overlaps_together(views: list[tuple[int, int]]) -> None:
    specs = [spec([length], torch.float32, target=torch.float16) for _, length in views]
    addresses = [4096 + 4 * start for start, _ in views]
    plan = check(specs, addresses)
    covered = {start + n for start, length in views for n in range(length)}
    assert plan.nbytes >= 2 * len(covered)


@given(leaves())
def test_the_same_leaves_give_the_same_plan(made: tuple[list[Spec | None], list[int]]) -> None:
    assert compiled(*made) == compiled(*made)


def test_leaves_of_one_kind_lie_side_by_side_without_gaps() -> None:
    specs = [spec([3]), spec([5], torch.float64), spec([1], torch.uint8), spec([7]), spec([3]), spec([9], torch.uint8)]
    plan = check(specs, [4096 * (number + 1) for number in range(6)])
    assert plan.nbytes == sum(each.nbytes for each in specs)
    assert len(plan.batches) == 1


def test_a_small_view_takes_what_it_shows() -> None:
    plan = check([spec([10])], [1 << 20])
    assert plan.nbytes == 40


def test_ties_take_one_place() -> None:
    plan = check([spec([10]), spec([10]), spec([5])], [4096, 4096, 4096 + 20])
    (batch,) = plan.batches
    (group,) = batch.overlap_groups
    assert group.offsets == (0, 0, 20)
    assert group.nbytes == 40


def test_a_large_leaf_is_cut_into_batches_that_continue_each_other() -> None:
    with small_batches(64, 8):
        plan = check([spec([100], torch.uint8)], [4096])
    assert [(batch.start, batch.stop) for batch in plan.batches] == [(0, 64), (64, 100)]
    assert [batch.continues for batch in plan.batches] == [False, True]
    assert [list(batch.completes) for batch in plan.batches] == [[], [0]]
    assert plan.order == (0, 1)


def test_small_leaves_of_devices_go_before_large_ones() -> None:
    large = spec([module.SMALL_BYTES], device=CUDA)
    small = spec([4], device=CUDA)
    plan = check([large, small, spec([4])], [1 << 30, 1 << 31, 4096])
    order = [list(plan.batches[number].completes) for number in plan.order]
    assert order == [[2], [1], [0]]


def test_a_cast_that_shares_memory_with_another_dtype_is_refused() -> None:
    specs = [spec([4], torch.int32), spec([4], torch.float32, target=torch.float16)]
    with pytest.raises(MixedCast) as caught:
        compiled(specs, [4096, 4096])
    assert caught.value.index == 1


def test_values_that_are_not_their_memory_are_never_tied() -> None:
    specs = [spec([4], torch.complex64), spec([4], torch.complex64, by_value=True)]
    plan = compiled(specs, [4096, 4096])
    assert not any(batch.overlap_groups for batch in plan.batches)
    assert plan.nbytes == 64


def test_larger_elements_come_first_wherever_they_are() -> None:
    plan = check([spec([3], torch.uint8), spec([2], torch.complex128, device=CUDA)], [4096, 1 << 30])
    assert [(batch.start, batch.stop) for batch in plan.batches] == [(0, 32), (32, 35)]


def test_nothing() -> None:
    assert compiled([], []) == Plan(0, (), (), ())
    plan = compiled([None, spec([0, 3])], [0, 0])
    assert (plan.nbytes, plan.batches) == (0, ())
    assert [list(run.indices) for run in plan.empty] == [[1]]


def test_many_leaves_are_laid_out_in_small_steps() -> None:
    count = 20_000
    work = compile_plan([spec([2])] * count, [4096 * (number + 1) for number in range(count)])
    steps = sum(1 for _ in work)
    assert steps > count / module.LOOKED_AT


@pytest.mark.parametrize("indices", [[0, 2, 1, 3], [5, 7, 6, 8], [0, 0, 2], [3, 2, 1], [4, 6]])
def test_indices_are_a_range_only_if_each_follows_the_one_before(indices: list[int]) -> None:
    assert list(as_range(indices)) == indices
    assert not isinstance(as_range(indices), range)


@pytest.mark.parametrize("indices", [[0], [3, 4, 5]])
def test_indices_that_follow_each_other_are_a_range(indices: list[int]) -> None:
    assert as_range(indices) == range(indices[0], indices[-1] + 1)
