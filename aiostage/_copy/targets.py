"""What has to be known of live tensors before any of them is written to: which can be, and which share memory."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from aiostage._capture.plan import overlapping
from aiostage._device.bits import without_bits
from aiostage._private import storage_identity
from aiostage.format.parts import extent_of
from aiostage.format.safetensors import CARRIERS, DTYPE_NAMES

__all__ = [
    "Pair",
    "agree",
    "copyable",
    "is_expanded",
    "is_itself",
    "reach",
    "read_and_written",
    "shared_unlike",
    "unexpanded",
    "unwritable",
]

_LEAVES_PER_STEP = 64
"""Tensors looked at between two yields."""


class Pair(NamedTuple):
    """A live tensor and the value that is to be copied into it, both dense.

    Attributes:
        live: Any tensor with memory of its own.
        value: A value of the same shape, and of the same dtype unless it is cast. On the meta device, it
             stands for elements that have not been read yet.
    """

    live: torch.Tensor
    value: torch.Tensor


def unwritable(live: torch.Tensor, value: torch.Tensor, *, inference: bool) -> str | None:
    """Return why a value cannot be copied into a live tensor, or None if it can be. Changes nothing.

    Args:
        live: A dense tensor, on any device.
        value: A dense tensor of the same shape, on any device.
        inference: Whether the caller is in inference mode, which alone may write to tensors that were made in it.
    """
    if live.is_meta:
        return "the live tensor is on the meta device"
    if live.is_inference() and not inference:
        return "the live tensor was made in inference mode"
    if not live.numel():
        return None
    if live.untyped_storage().nbytes() < live.storage_offset() * live.element_size() + reach(live):
        return "the live tensor's storage is smaller than its elements"
    if live.stride() != value.stride() and _overlaps_itself(live):
        if is_expanded(live):
            return "the live tensor is expanded, the new value is not"
        return "elements of the live tensor share memory, those of the new value do not"
    return None


def copyable(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor over the same memory of a dtype that torch can copy."""
    if (tensor.dtype in DTYPE_NAMES or tensor.dtype.is_complex) and tensor.dtype is not torch.float4_e2m1fn_x2:
        return tensor.detach()
    carrier = torch.empty(0, dtype=CARRIERS[tensor.element_size()], device=tensor.device)
    return carrier.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def unexpanded(live: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is copied into what, without history, and with one element for all that share its memory."""
    live, value = live.detach(), value.detach()
    # All elements along such a dimension are one; it is written once, since PyTorch refuses to write to the same memory
    # twice.
    for dimension, (size, stride) in enumerate(zip(live.shape, live.stride(), strict=True)):
        if size > 1 and stride == 0:
            # The two were found to be laid out alike.
            live, value = live.narrow(dimension, 0, 1), value.narrow(dimension, 0, 1)
    return live, value


def shared_unlike(pairs: Sequence[Pair]) -> Generator[None, None, list[list[int]]]:
    """Find live tensors that share memory which their values do not share in the same way, yielding now and then.

    Args:
        pairs: All that is going to be copied.

    Returns:
        For each stretch of such memory the places of all pairs whose live tensors lie in it, in the order of addresses.
        It may be that not all of their values can be had: :func:`agree` tells.
    """
    starts, stops, places = [], [], []
    for place, (live, _) in enumerate(pairs):
        if live.numel() and not live.is_meta:
            places.append(place)
            starts.append(live.data_ptr())
            stops.append(starts[-1] + reach(live))
        if place % _LEAVES_PER_STEP == 0:
            yield
    unlike: list[list[int]] = []
    for members in overlapping(starts, stops):
        group = [places[member] for member in members]
        is_alike = True
        for first, second in pairwise(group):
            is_alike = is_alike and _tied_alike(pairs[first], pairs[second])
            yield
        if not is_alike:
            unlike.append(group)
    return unlike


def agree(pairs: Sequence[Pair]) -> bool:
    """Return whether live tensors that share memory can all have their values. Reads them all: run it in a thread.

    Args:
        pairs: With values in host memory; otherwise they do not.
    """
    if not all(value.is_cpu for _, value in pairs):
        return False
    # Tried out in memory of its own, as the live tensors lie: all values are put in, and then each is looked for.
    base = min(live.data_ptr() for live, _ in pairs)
    nbytes = max(live.data_ptr() + reach(live) for live, _ in pairs) - base
    memory = torch.zeros(nbytes, dtype=torch.uint8, device="cpu")
    written = []
    with torch.no_grad():
        for live, value in pairs:
            plain, wanted = without_bits(copyable(live), copyable(value))
            at, rest = divmod(live.data_ptr() - base, live.element_size())
            if rest:
                return False
            there = torch.empty(0, dtype=plain.dtype, device="cpu").set_(
                memory.untyped_storage(), at, live.shape, live.stride()
            )
            target, source = unexpanded(there, wanted)
            target.copy_(source)
            written.append((there, wanted))
        return all(_bytes_of(there).equal(_bytes_of(wanted)) for there, wanted in written)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor's elements as bytes, by which NaN equals itself."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def read_and_written(pairs: Sequence[Pair]) -> Generator[None, None, list[tuple[int, int]]]:
    """Find values in host memory that would be overwritten before they are read, yielding now and then.

    Returns:
        The places of two pairs each, the value of the first of which lies in the live memory of the second. A value
        that is its own live tensor is none.
    """
    starts, stops, places = [], [], []
    for place, (live, value) in enumerate(pairs):
        if live.numel() and live.is_cpu and value.is_cpu and not is_itself(live, value):
            for tensor, at in ((live, place), (value, ~place)):
                places.append(at)
                starts.append(tensor.data_ptr())
                stops.append(starts[-1] + reach(tensor))
        if place % _LEAVES_PER_STEP == 0:
            yield
    found = []
    for members in overlapping(starts, stops):
        # Of what overlaps, some value is next to some live tensor.
        for one, other in pairwise(places[member] for member in members):
            if (one < 0) != (other < 0):
                found.append((~one, other) if one < 0 else (~other, one))
            yield
    return found


def reach(tensor: torch.Tensor) -> int:
    """Return how many bytes lie between a tensor's first and one past its last element."""
    return extent_of(tensor.shape, tensor.stride()) * tensor.element_size()


def is_itself(live: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether a value is the memory of its live tensor, as ``passthrough`` leaves it: nothing is to be done."""
    return (
        live.data_ptr() == value.data_ptr()
        and live.stride() == value.stride()
        and live.device == value.device
        and (live.is_conj(), live.is_neg()) == (value.is_conj(), value.is_neg())
    )


def is_expanded(tensor: torch.Tensor) -> bool:
    """Return whether a dimension of several elements has the memory of one."""
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """Return whether two elements may have the same memory."""
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return True
            extent += (size - 1) * stride
    return False


def _tied_alike(first: Pair, second: Pair) -> bool:
    """Return whether two values share memory in the way in which their live tensors do."""
    (live, value), (other, other_value) = first, second
    distance = other.data_ptr() - live.data_ptr()
    if live.is_conj() != other.is_conj() or live.is_neg() != other.is_neg():
        return False
    # Those that have not been read yet have no address.
    if storage_identity(value.untyped_storage()) != storage_identity(other_value.untyped_storage()):
        return False
    if _offset(other_value) - _offset(value) != distance:
        return False
    cast = live.dtype is not value.dtype or other.dtype is not other_value.dtype
    if cast and (distance or live.dtype is not other.dtype or value.dtype is not other_value.dtype):
        # Distances in bytes say nothing where elements have other sizes.
        return False
    if distance == 0 and live.stride() == other.stride() and value.stride() == other_value.stride():
        return True
    return live.stride() == value.stride() and other.stride() == other_value.stride()


def _offset(tensor: torch.Tensor) -> int:
    """Return how many bytes lie between the beginning of a tensor's storage and its first element."""
    return int(tensor.storage_offset()) * tensor.element_size()
