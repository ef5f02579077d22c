"""Trees with everything in them that a checkpoint can carry."""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex32,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]
OPAQUE_DTYPES = [torch.float4_e2m1fn_x2, torch.uint4, torch.int3, torch.bits16]
"""Dtypes that torch cannot print."""


def of_bytes(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    """Return a one-dimensional tensor of the given bytes."""
    if dtype is torch.bool:
        data = bytes(byte & 1 for byte in data)
    memory = torch.tensor(list(data), dtype=torch.uint8)
    with warnings.catch_warnings():
        # complex32 is called experimental.
        warnings.simplefilter("ignore", UserWarning)
        return torch.empty(0, dtype=dtype).set_(memory.untyped_storage(), 0, (len(data) // dtype.itemsize,), (1,))


@st.composite
def strided(draw: st.DrawFn, base: torch.Tensor) -> torch.Tensor:
    """Return a view of a one-dimensional tensor: whole, sliced, stepped, transposed, expanded, empty or one element."""
    kind = draw(st.sampled_from(["whole", "sliced", "stepped", "transposed", "expanded", "empty", "scalar", "padded"]))
    count = base.numel()
    if kind == "whole" or count < 4:
        return base
    if kind == "sliced":
        start = draw(st.integers(0, count - 1))
        return base[start : draw(st.integers(start, count))]
    if kind == "stepped":
        return base[draw(st.integers(0, 1)) :: draw(st.integers(2, 3))]
    if kind == "transposed":
        rows = draw(st.integers(1, 3))
        return base[: count // rows * rows].view(rows, -1).t()
    if kind == "expanded":
        return base[:2].view(2, 1).expand(2, 3)
    if kind == "empty":
        return base[:0].view(draw(st.sampled_from([(0,), (0, 3), (2, 0, 1)])))
    if kind == "padded":
        return base[: count // 2 * 2].view(-1, 2)[:, :1]
    return base[draw(st.integers(0, count - 1))]


@st.composite
def tensors(draw: st.DrawFn) -> list[torch.Tensor]:
    """Return views of one storage, of one or several dtypes; the first may be a parameter."""
    dtype = draw(st.sampled_from(DTYPES))
    base = of_bytes(draw(st.binary(min_size=48, max_size=144)).ljust(144, b"\x05"), dtype)
    views = [draw(strided(base)) for _ in range(draw(st.integers(1, 3)))]
    if draw(st.booleans()):
        other = torch.empty(0, dtype=torch.int16)
        views.append(other.set_(base.untyped_storage(), draw(st.integers(0, 9)), (3, 2), (4, 1)))
    if dtype.is_complex and dtype is not torch.complex32:
        views += draw(st.sampled_from([[], [base.conj()], [base[1:].conj().imag]]))
    if dtype.is_floating_point and dtype.itemsize > 1:
        views += draw(st.sampled_from([[], [torch.nn.Parameter(base)], [torch.nn.Parameter(base, False)]]))
        views += draw(st.sampled_from([[], [torch.ones(3, dtype=dtype, requires_grad=True)]]))
    if draw(st.booleans()):
        views[0].note = {"kept": [views[-1], 1.5]}  # type: ignore[attr-defined]
    return views


def not_strided() -> list[torch.Tensor]:
    """Return tensors that are not one piece of memory."""
    dense = torch.tensor([[0.0, 1.5], [-2.0, 0.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            dense.to_sparse(),
            torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (2, 2), check_invariants=True),
            dense.to_sparse_csr(),
            dense.to_sparse_csc(),
            torch.quantize_per_tensor(dense, 0.25, 3, torch.quint8),
            torch.quantize_per_channel(dense, torch.tensor([0.5, 0.25]), torch.tensor([0, 1]), 0, torch.qint8),
        ]


scalars: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(1 << 600), 1 << 600),
    st.floats(),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), -0.0, 5e-324]),
    st.complex_numbers(),
    st.text(),
    st.text(st.characters(codec=None, categories=["Cs", "Cc", "Lu"])),
    st.binary(),
    st.sampled_from(DTYPES),
    st.sampled_from([torch.Size([]), torch.Size([2, 0, 3]), torch.device("cpu"), torch.device("cuda:1")]),
    st.sampled_from([torch.strided, torch.sparse_coo, torch.channels_last]),
    st.sampled_from([np.float32(0.1), np.int64(-3), np.bool_(True), np.complex64(1 - 2j), np.float16("nan")]),
)

mutable_scalars: st.SearchStrategy[Any] = st.one_of(
    st.binary().map(bytearray),
    st.builds(lambda values: np.array(values, np.int16), st.lists(st.integers(-9, 9), max_size=5)),
    st.just(None).map(lambda _: np.arange(12.0).reshape(3, 4)[::-1, 1::2]),
)

keys: st.SearchStrategy[Any] = st.one_of(
    st.text(max_size=5),
    st.integers(),
    st.booleans(),
    st.none(),
    st.binary(max_size=3),
    st.tuples(st.text(max_size=2), st.integers()),
    st.sampled_from([0.5, torch.float32]),
)


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    items = st.lists(st.tuples(keys, children), max_size=4)
    few = st.lists(children, max_size=4)
    return st.one_of(
        few,
        few.map(tuple),
        few.map(deque),
        few.map(lambda values: deque(values, maxlen=4)),
        st.frozensets(st.one_of(st.integers(), st.text()), max_size=3),
        st.sets(st.one_of(st.integers(), st.binary(), st.none()), max_size=3),
        items.map(dict),
        items.map(OrderedDict),
        items.map(lambda pairs: defaultdict(list, pairs)),
        st.dictionaries(st.text(max_size=3), st.integers(-5, 5), max_size=3).map(Counter),
    )


@st.composite
def trees(draw: st.DrawFn) -> Any:
    """Return a tree, with tensors and containers in it that are met more than once."""
    pool = [tensor for _ in range(draw(st.integers(0, 3))) for tensor in draw(tensors())]
    pool += draw(st.lists(st.sampled_from(not_strided()), max_size=1))
    shared = [*pool, [1, None], {}]
    leaves = st.one_of(scalars, mutable_scalars, st.sampled_from(shared), st.sampled_from(shared))
    return draw(st.recursive(leaves, containers, max_leaves=12))
