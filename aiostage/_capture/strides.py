"""Strides of what PyTorch computes from strided tensors element by element."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["stride_of_values"]

_CHANNELS_LAST = (1, 3, 2, 0)


def stride_of_values(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the strides that copy.deepcopy gives the values of a conjugate or negative view.

    Derived, because a tensor without memory, on the meta device, could only be asked at the price of importing
    PyTorch's compiler, which takes seconds.
    """
    shape, stride = tuple(tensor.shape), tensor.stride()
    if tensor.is_conj() and not _fills(shape, stride, _by_stride(shape, stride)):
        stride = _filled(shape, _sorted(shape, stride))
    if tensor.is_neg():
        stride = _stride_of_negative(shape, stride)
    return stride


def _stride_of_negative(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    # The order in which PyTorch's element-wise kernels look: a contiguous tensor, then channels last, then any other
    # without gaps, which all keep their strides; else sorted.
    inner_first = tuple(reversed(range(len(shape))))
    for order in (inner_first, _CHANNELS_LAST):
        if len(order) == len(shape) and _fills(shape, stride, order):
            return _filled(shape, order)
    if _fills(shape, stride, _by_stride(shape, stride)):
        return stride
    return _filled(shape, _sorted(shape, stride))


def _by_stride(shape: Sequence[int], stride: Sequence[int]) -> list[int]:
    return sorted(range(len(shape)), key=lambda dimension: stride[dimension])


def _fills(shape: Sequence[int], stride: Sequence[int], order: Sequence[int]) -> bool:
    """Return whether elements follow each other without gaps, if dimensions are taken innermost first."""
    expected = 1
    for dimension in order:
        if shape[dimension] != 1:
            if stride[dimension] != expected and 0 not in shape:
                return False
            expected *= shape[dimension]
    return True


def _filled(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Return strides without gaps for dimensions in some order, innermost first."""
    stride = [0] * len(shape)
    step = 1
    for dimension in order:
        stride[dimension] = step
        step *= max(1, shape[dimension])
    return tuple(stride)


def _sorted(shape: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Return dimensions innermost first, as PyTorch sorts them: a dimension with stride 0 compares with no other."""
    order = list(reversed(range(len(shape))))
    for last in range(1, len(order)):
        here = last
        # PyTorch's own insertion sort, step by step: with a comparison that is not transitive another sort gives
        # another order.
        for before in reversed(range(last)):
            one, other = order[before], order[here]
            if 0 in (stride[one], stride[other]):
                continue
            if (stride[one], shape[one]) > (stride[other], shape[other]):
                order[before], order[here] = other, one
                here = before
            elif stride[one] < stride[other]:
                break
    return order
