"""From a loaded tree into a live one, in place: everything is compared first, then everything is changed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch

from aiostage.checkpoint.blocks import CARRIERS
from aiostage.errors import CheckpointMismatchError
from aiostage.leaf import Path, format_path
from aiostage.storage.safetensors import DTYPE_NAMES

__all__ = ["Transfer", "compare"]

_CHUNK = 64
_BATCH_BYTES = 32 << 20
_BATCH_LEAVES = 256

_Place: TypeAlias = "tuple[object, _Place] | None"
"""The way to a place, last step first."""

_Pair: TypeAlias = tuple[_Place, torch.Tensor, torch.Tensor]


class Transfer:
    """What has to be done to make a live tree equal a loaded one.

    Attributes:
        host: Batches of live tensors in host memory, each with the tensors to copy into them.
        device: Live tensors elsewhere, each with the tensor to copy into it.
        assignments: Mutable containers, each with a key or an index and the value to put there.
    """

    def __init__(self) -> None:
        self.host: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
        self.device: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.assignments: list[tuple[Any, Any, Any]] = []
        self._room = 0

    def add(self, live: torch.Tensor, loaded: torch.Tensor) -> None:
        """Have one tensor copied into another."""
        if live.numel() == 0:
            return
        live, loaded = _copyable(live), _copyable(loaded)
        for dimension, (size, stride) in enumerate(zip(live.shape, live.stride(), strict=True)):
            if size > 1 and stride == 0:
                # The two were found to be laid out alike, so one element stands for all.
                live, loaded = live.narrow(dimension, 0, 1), loaded.narrow(dimension, 0, 1)
        if live.device.type != "cpu":
            self.device.append((live, loaded))
            return
        alone = live.is_conj() or live.is_neg()
        if alone or self._room < live.nbytes or len(self.host[-1][0]) >= _BATCH_LEAVES:
            self.host.append(([], []))
            self._room = _BATCH_BYTES
        # Fused copies do not take conjugate and negative views.
        self._room -= self._room if alone else live.nbytes
        self.host[-1][0].append(live)
        self.host[-1][1].append(loaded)

    def batches(self) -> Iterator[Callable[[], None]]:
        """Iterate over calls that copy in host memory, each in one go. They block."""
        return (partial(_copy, live, loaded) for live, loaded in self.host)

    def copy_to_devices(self) -> Generator[None, None, None]:
        """Copy to accelerators, behind what the calling thread has enqueued there; yields after each.

        May be interrupted and called again for what is left.
        """
        while self.device:
            live, loaded = self.device.pop()
            with torch.no_grad():
                live.copy_(loaded)
            yield

    def assign(self) -> None:
        """Put the values that are not tensors into their containers."""
        for container, key, value in self.assignments:
            container[key] = value


def _copy(live: list[torch.Tensor], loaded: list[torch.Tensor]) -> None:
    # Without gradients a leaf that requires one may be written to; the mode belongs to the thread.
    with torch.no_grad():
        if len(live) == 1:
            live[0].copy_(loaded[0])
        else:
            torch._foreach_copy_(live, loaded)


def compare(live: Any, loaded: Any) -> Generator[None, None, Transfer]:
    """Compare two trees without changing either, yielding now and then.

    Dicts, lists and tuples are compared key by key. A tensor fits a tensor of the same shape and dtype; anything else
    is a value, and the loaded one takes the live one's place.

    Args:
        live: The tree that is to be changed.
        loaded: The tree with the new values, which the live one will own in part.

    Returns:
        What has to be done.

    Raises:
        CheckpointMismatchError: If the trees do not fit, with every place where they do not.
    """
    comparison = _Comparison()
    yield from comparison.run(live, loaded)
    yield from comparison.check_ties()
    if comparison.missing or comparison.unexpected or comparison.mismatched:
        raise CheckpointMismatchError(
            missing=comparison.missing, unexpected=comparison.unexpected, mismatched=comparison.mismatched
        )
    transfer = Transfer()
    transfer.assignments = comparison.assignments
    for count, (_, target, source) in enumerate(comparison.pairs):
        transfer.add(target, source)
        if count % _CHUNK == 0:
            yield
    return transfer


class _Comparison:
    """A walk through two trees side by side."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.mismatched: list[str] = []
        self.pairs: list[_Pair] = []
        self.assignments: list[tuple[Any, Any, Any]] = []
        self._seen: set[tuple[int, int]] = set()
        self._todo: list[tuple[_Place, Any, Any, tuple[Any, Any] | None]] = []

    def run(self, live: Any, loaded: Any) -> Generator[None, None, None]:
        """Walk both trees; where a value is to be put is None inside what cannot be changed."""
        self._todo.append((None, live, loaded, None))
        count = 0
        while self._todo:
            place, mine, theirs, where = self._todo.pop()
            yield from self._visit(place, mine, theirs, where)
            count += 1
            if count % _CHUNK == 0:
                yield

    def _visit(
        self, place: _Place, live: Any, loaded: Any, where: tuple[Any, Any] | None
    ) -> Generator[None, None, None]:
        if isinstance(live, torch.Tensor) or isinstance(loaded, torch.Tensor):
            reason = _why_not(live, loaded)
            if reason is None:
                self.pairs.append((place, live, loaded))
            else:
                self._mismatch(place, reason)
        elif isinstance(live, (dict, list, tuple)) and _same_kind(live, loaded):
            if isinstance(live, tuple) and where is not None and not _has_state(live) and not _has_state(loaded):
                self.assignments.append((*where, loaded))
            elif (id(live), id(loaded)) not in self._seen:
                self._seen.add((id(live), id(loaded)))
                yield from self._descend(place, live, loaded)
        elif _has_state(live) or _has_state(loaded):
            self._mismatch(place, f"a {type(loaded).__name__} into a {type(live).__name__}")
        elif where is not None:
            self.assignments.append((*where, loaded))
        elif not _equal(live, loaded):
            self._mismatch(place, f"{loaded!r:.100} instead of {live!r:.100} in a tuple, which cannot be changed")

    def _descend(self, place: _Place, live: Any, loaded: Any) -> Generator[None, None, None]:
        mutable = not isinstance(live, tuple)
        if isinstance(live, dict):
            mine, theirs = live, loaded
        else:
            mine, theirs = dict(enumerate(live)), dict(enumerate(loaded))
        found = []
        for count, (key, value) in enumerate(mine.items()):
            here = (key, place)
            if key in theirs:
                found.append((here, value, theirs[key], (live, key) if mutable else None))
            else:
                self.missing.append(format_path(_path(here)))
            if count % _CHUNK == 0:
                yield
        for count, key in enumerate(theirs):
            if key not in mine:
                self.unexpected.append(format_path(_path((key, place))))
            if count % _CHUNK == 0:
                yield
        self._todo += reversed(found)

    def _mismatch(self, place: _Place, reason: str) -> None:
        self.mismatched.append(f"{format_path(_path(place))} ({reason})")

    def check_ties(self) -> Generator[None, None, None]:
        """Find live tensors that share memory which loaded ones do not: both values cannot be had."""
        pairs: list[_Pair] = []
        starts: list[int] = []
        stops: list[int] = []
        for count, pair in enumerate(self.pairs):
            live = pair[1]
            if live.numel() and not live.is_meta:
                pairs.append(pair)
                starts.append(live.data_ptr())
                stops.append(starts[-1] + _reach(live))
            if count % _CHUNK == 0:
                yield
        order, joined = _overlapping(starts, stops)
        yield
        for place in joined:
            first, second = pairs[order[place]], pairs[order[place + 1]]
            if not _tied_alike(first, second):
                self._mismatch(second[0], "it shares memory with another live tensor, but not so in the checkpoint")
            yield


def _overlapping(starts: list[int], stops: list[int]) -> tuple[list[int], list[int]]:
    """Return the order of addresses, and the places in it where memory and the next overlap."""
    first, last = np.array(starts, np.int64), np.array(stops, np.int64)
    order = np.argsort(first, kind="stable")
    reach = np.maximum.accumulate(last[order])
    return order.tolist(), np.flatnonzero(first[order][1:] < reach[:-1]).tolist()


def _tied_alike(first: _Pair, second: _Pair) -> bool:
    """Return whether two loaded tensors share memory in the way in which their live ones do."""
    (_, live, loaded), (_, other, other_loaded) = first, second
    distance = other.data_ptr() - live.data_ptr()
    if loaded.untyped_storage().data_ptr() != other_loaded.untyped_storage().data_ptr():
        return False
    if other_loaded.data_ptr() - loaded.data_ptr() != distance:
        return False
    if distance == 0 and live.stride() == other.stride() and loaded.stride() == other_loaded.stride():
        return True
    return live.stride() == loaded.stride() and other.stride() == other_loaded.stride()


def _reach(tensor: torch.Tensor) -> int:
    """Return how many bytes lie between a tensor's first and one past its last element."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return extent * tensor.element_size()


def _copyable(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor over the same memory of a dtype that torch can copy."""
    if tensor.dtype in DTYPE_NAMES or tensor.dtype.is_complex:
        return tensor.detach()
    carrier = torch.empty(0, dtype=CARRIERS[tensor.element_size()], device=tensor.device)
    return carrier.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _path(place: _Place) -> Path:
    steps = []
    while place is not None:
        step, place = place
        steps.append(step)
    return tuple(reversed(steps))


def _same_kind(live: Any, loaded: Any) -> bool:
    return any(isinstance(live, kind) and isinstance(loaded, kind) for kind in (dict, list, tuple))


def _has_state(value: Any) -> bool:
    """Return whether a value is, or is a tuple around, something that is changed in place."""
    todo = deque([value])
    while todo:
        item = todo.popleft()
        if isinstance(item, (torch.Tensor, dict, list)):
            return True
        if isinstance(item, tuple):
            todo.extend(item)
    return False


def _equal(live: Any, loaded: Any) -> bool:
    same = live is loaded or live == loaded
    # NaN equals itself here, and an array equals another if all of it does.
    return bool(np.all(same)) or (live != live and loaded != loaded)


def _why_not(live: Any, loaded: Any) -> str | None:
    """Return why a loaded value cannot be copied into a live tensor, or None if it can."""
    if not isinstance(live, torch.Tensor) or not isinstance(loaded, torch.Tensor):
        return f"a {type(loaded).__name__} into a {type(live).__name__}"
    if live.shape != loaded.shape or live.dtype is not loaded.dtype:
        return f"{loaded.dtype} {tuple(loaded.shape)} into {live.dtype} {tuple(live.shape)}"
    if hasattr(live, "__tensor_flatten__"):
        return f"the live tensor is a {type(live).__name__}"
    for tensor, which in ((live, "live"), (loaded, "loaded")):
        if tensor.is_quantized:
            return f"the {which} tensor is quantized"
        if tensor.layout is not torch.strided:
            return f"the {which} tensor is {tensor.layout}"
    if live.is_meta:
        return "the live tensor is on the meta device"
    if live.is_inference() and not torch.is_inference_mode_enabled():
        return "the live tensor was made in inference mode"
    if live.numel() and live.untyped_storage().nbytes() < live.storage_offset() * live.element_size() + _reach(live):
        return "the live tensor's storage is smaller than its elements"
    expanded = any(size > 1 and stride == 0 for size, stride in zip(live.shape, live.stride(), strict=True))
    if expanded and live.stride() != loaded.stride():
        return "the live tensor is expanded, the loaded one is not"
    return None
