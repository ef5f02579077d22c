"""Any tree: what comes out is what copy.deepcopy gives, and a replayed plan gives what a fresh walk does."""

from __future__ import annotations

import asyncio
import copy
from collections import OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.staging import DefaultStager
from torch.distributed.checkpoint.staging import StagingOptions as TorchStagingOptions

from aiostage import AsyncStager
from tests.fuzz.classes import Frozen, Record, Reduced, Slotted, Stateful

Pair = namedtuple("Pair", "first second")


DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.uint16,
    torch.float8_e5m2,
]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    base = torch.arange(draw(st.integers(0, 3)), 24 + 3, dtype=torch.float32)[:24].to(dtype).clone()
    kind = draw(st.sampled_from(["plain", "view", "strided", "transposed", "scalar", "empty", "expanded", "parameter"]))
    if kind == "view":
        return base[3:9]
    if kind == "strided":
        return base[1::3]
    if kind == "transposed":
        return base.reshape(4, 6).t()
    if kind == "scalar":
        return base[0]
    if kind == "empty":
        return base[:0]
    if kind == "expanded":
        return base[:1].expand(3)
    if kind == "parameter":
        return torch.nn.Parameter(base, requires_grad=dtype.is_floating_point and dtype.itemsize > 1)
    return base.reshape(2, 3, 4)


ATOMS = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.floats(allow_nan=False)


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    few = st.lists(children, max_size=4)
    keys = st.text(max_size=2) | st.integers(0, 9) | st.tuples(st.integers(0, 3), st.text(max_size=1))
    mappings = st.dictionaries(keys, children, max_size=4)
    return st.one_of(
        few,
        few.map(tuple),
        few.map(deque),
        mappings,
        mappings.map(OrderedDict),
        mappings.map(lambda items: defaultdict(list, items)),
        st.tuples(children, children).map(lambda pair: Pair(*pair)),
        st.tuples(children, few).map(lambda pair: Record(*pair)),
        children.map(Frozen),
        children.map(Slotted),
        children.map(Reduced),
        children.map(Stateful),
        st.sets(st.integers(), max_size=3),
        # The same object, twice.
        children.map(lambda child: [child, child]),
        # A container that contains itself.
        few.map(lambda items: _circle(list(items))),
    )


def _circle(items: list[Any]) -> list[Any]:
    items.append(items)
    return items


TREES = st.recursive(ATOMS | tensors(), containers, max_leaves=12)


class Comparison:
    """Compares two trees, object by object, with the way in which their objects are shared."""

    def __init__(self) -> None:
        self.twins: dict[int, int] = {}
        self.storages: dict[int, int] = {}
        self.alive: list[Any] = []

    def same(self, one: Any, other: Any) -> None:
        assert type(one) is type(other)
        if id(one) in self.twins or isinstance(one, (type(None), bool, int, float, str)):
            if not isinstance(one, (type(None), bool, int, float, str)):
                assert self.twins[id(one)] == id(other), "shared in one tree and not in the other"
            else:
                assert one == other
            return
        self.twins[id(one)] = id(other)
        self.alive += [one, other]
        if isinstance(one, torch.Tensor):
            self.same_tensor(one, other)
        elif isinstance(one, dict):
            assert len(one) == len(other)
            for (key, value), (other_key, other_value) in zip(one.items(), other.items(), strict=True):
                self.same(key, other_key)
                self.same(value, other_value)
        elif isinstance(one, (list, tuple, deque)):
            assert len(one) == len(other)
            for value, other_value in zip(one, other, strict=True):
                self.same(value, other_value)
        elif isinstance(one, set):
            assert one == other
        else:
            for name in ("value", "items"):
                if hasattr(one, name):
                    self.same(getattr(one, name), getattr(other, name))

    def same_tensor(self, one: torch.Tensor, other: torch.Tensor) -> None:
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert one.requires_grad == other.requires_grad
        assert other.grad_fn is None
        one, other = one.detach(), other.detach()
        assert torch.equal(_bytes(one), _bytes(other))
        if one.numel():
            storage, copied = one.untyped_storage()._cdata, other.untyped_storage()._cdata
            assert storage != copied


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def stage(tree: Any) -> Any:
    async def run() -> Any:
        async with AsyncStager() as stager:
            return await stager.stage(tree)

    return asyncio.run(run())


def tensors_in(tree: Any, seen: set[int] | None = None) -> list[torch.Tensor]:
    seen = seen if seen is not None else set()
    if id(tree) in seen:
        return []
    seen.add(id(tree))
    if isinstance(tree, torch.Tensor):
        return [tree]
    children: list[Any] = []
    if isinstance(tree, dict):
        children = list(tree.values())
    elif isinstance(tree, (list, tuple, deque)):
        children = list(tree)
    elif not isinstance(tree, (str, bytes)):
        children = [getattr(tree, name) for name in ("value", "items") if hasattr(tree, name) and not callable(tree)]
    return [tensor for child in children for tensor in tensors_in(child, seen)]


@settings(max_examples=150)
@given(TREES)
def test_is_what_deepcopy_gives(tree: Any) -> None:
    with torch.no_grad():
        expected = copy.deepcopy(tree)
    staged = stage(tree)
    Comparison().same(tree, staged)
    Comparison().same(expected, staged)


@given(TREES)
def test_is_independent_of_the_source(tree: Any) -> None:
    staged = stage(tree)
    before = copy.deepcopy(staged)
    with torch.no_grad():
        for tensor in tensors_in(tree):
            if tensor.numel() and 0 not in tensor.stride():
                tensor.copy_(torch.ones_like(tensor, dtype=torch.float32).to(tensor.dtype))
    Comparison().same(before, staged)


SIMPLE = st.recursive(
    ATOMS | tensors().filter(lambda tensor: type(tensor) is torch.Tensor),
    lambda children: st.one_of(
        st.lists(children, max_size=4), st.dictionaries(st.text(max_size=2), children, max_size=4)
    ),
    max_leaves=8,
)


@given(SIMPLE)
def test_is_what_pytorchs_stager_gives_where_it_can(tree: Any) -> None:
    peer = DefaultStager(TorchStagingOptions(False, False, False, False))
    Comparison().same(peer.stage({"tree": tree}), stage({"tree": tree}))


CHANGES = st.lists(
    st.sampled_from(["value", "replace", "resize", "dtype", "add", "attribute", "stride", "remove", "nothing", "data"]),
    min_size=3,
    max_size=8,
)


def change(tree: dict[str, Any], what: str, number: int) -> None:
    """Make one change that a remembered plan has to notice, or to follow."""
    name = f"t{number % 3}"
    tensor = tree.get(name)
    if not isinstance(tensor, torch.Tensor):
        tree[name] = torch.full((4,), float(number))
    elif what == "value":
        tensor.fill_(number)
    elif what == "replace":
        tree[name] = torch.full_like(tensor, number)
    elif what == "resize":
        tensor.resize_(tensor.numel() + 1).fill_(number)
    elif what == "dtype":
        tree[name] = tensor.to(torch.float64)
    elif what == "add":
        tree[f"added{number}"] = torch.full((number + 1,), float(number))
    elif what == "attribute":
        tensor.note = {"number": number, "inside": torch.full((2,), float(number))}  # type: ignore[attr-defined]
    elif what == "stride":
        tree[name] = torch.arange(6.0).reshape(2, 3).t()
    elif what == "remove":
        del tree[name]
    elif what == "data":
        tensor.data = torch.full((3,), float(number))


@settings(max_examples=100)
@given(CHANGES, st.integers(0, 3))
def test_a_replay_gives_what_a_fresh_walk_does(changes: list[str], repeats: int) -> None:
    tree: dict[str, Any] = {"t0": torch.zeros(4), "n": [torch.ones(3), 1], "t1": torch.zeros(4), "t2": torch.zeros(4)}

    async def run() -> None:
        async with AsyncStager() as stager:
            for number, what in enumerate(changes):
                for _ in range(repeats + 1):
                    staged = await stager.stage(tree)
                    async with AsyncStager() as fresh:
                        expected = await fresh.stage(tree)
                    Comparison().same(expected, staged)
                    assert [vars(t) for t in tensors_in(staged)].__repr__() == [
                        vars(t) for t in tensors_in(expected)
                    ].__repr__()
                change(tree, what, number)

    asyncio.run(run())
