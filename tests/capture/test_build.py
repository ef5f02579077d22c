"""Leaves over an arena's memory: sizes, classes, ties, and which of them the collector tracks."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from aiostage._capture.build import build_overlap_group, build_run
from aiostage._capture.faithful import Spec
from aiostage._capture.plan import LeafRun, OverlapGroup
from tests.capture.test_plan import spec

DTYPES = [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.complex128, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "stride"),
    [((), ()), ((6,), (1,)), ((2, 3), (3, 1)), ((3, 2), (1, 3)), ((2, 2), (5, 2)), ((4, 3), (0, 1))],
)
def test_a_run_gives_each_leaf_a_storage_of_its_own_size(
    dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    each = spec(shape, dtype, stride=stride)
    memory = np.zeros(3 * each.nbytes, dtype=np.uint8)
    tensors = build_run(memory, LeafRun(each, [0, 1, 2], 0))
    address = memory.ctypes.data
    for number, tensor in enumerate(tensors):
        assert (tensor.dtype, tuple(tensor.shape), tensor.stride()) == (dtype, shape, stride)
        assert tensor.untyped_storage().nbytes() == each.nbytes
        assert tensor.data_ptr() == address + number * each.nbytes


def test_leaves_without_elements_need_no_memory() -> None:
    (tensor,) = build_run(np.empty(0, dtype=np.uint8), LeafRun(spec([0, 3]), [0], 0))
    assert tuple(tensor.shape) == (0, 3)


class Marked(torch.Tensor):
    pass


@pytest.mark.parametrize("cls", [torch.Tensor, torch.nn.Parameter, Marked])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_classes_and_gradients(cls: type[torch.Tensor], requires_grad: bool) -> None:
    each = Spec(cls, torch.float32, torch.float32, (2,), (1,), requires_grad, None, False)
    for tensor in build_run(np.zeros(16, dtype=np.uint8), LeafRun(each, [0, 1], 0)):
        assert type(tensor) is cls
        assert tensor.requires_grad is requires_grad
        assert tensor.is_leaf


def test_a_block_ties_its_leaves() -> None:
    memory = np.zeros(40, dtype=np.uint8)
    specs = [spec([10]), spec([2, 2], stride=(4, 1)), spec([5], torch.int32)]
    ((indices, (whole, part, other)),) = build_overlap_group(memory, OverlapGroup((0, 1, 2), (0, 8, 20), 0, 40), specs)
    assert indices == (0, 1, 2)
    assert {tensor.untyped_storage().data_ptr() for tensor in (whole, part, other)} == {memory.ctypes.data}
    whole.copy_(torch.arange(10.0))
    assert part.tolist() == [[2, 3], [6, 7]]
    other.zero_()
    assert whole.tolist() == [0, 1, 2, 3, 4, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropping_the_last_leaf_frees_the_memory(dtype: torch.dtype) -> None:
    memory = np.zeros(64 * dtype.itemsize, dtype=np.uint8)
    gone = weakref.ref(memory)
    tensors: list[Any] = build_run(memory, LeafRun(spec([16], dtype), list(range(4)), 0))
    del memory
    view = tensors[2][3:]
    tensors.clear()
    assert gone() is not None
    del view
    assert gone() is None


def test_a_leaf_in_a_circle_is_collected() -> None:
    memory = np.zeros(8, dtype=np.uint8)
    gone = weakref.ref(memory)
    (tensor,) = build_run(memory, LeafRun(spec([2]), [0], 0))
    tensor.owner = [tensor]  # type: ignore[attr-defined]
    del memory, tensor
    gc.collect()
    assert gone() is None
