"""What ``into`` asks of a live value and the loaded one: do they have tensors in them, are they equal, do they fit."""

from __future__ import annotations

import argparse
import types
from collections import deque
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from aiostage._copy.targets import unwritable
from aiostage.checkpoint.live_tuples import is_around
from aiostage.format.classes import PlainObject
from aiostage.format.kinds import NotCarried, Parts
from aiostage.format.objects import take_object_apart
from aiostage.format.registry import flattening_of
from aiostage.format.values import SCALARS, write_scalar

__all__ = [
    "SIMPLE",
    "are_equal",
    "are_wrappers",
    "has_state",
    "has_tensors",
    "is_own",
    "is_state",
    "parts_of",
    "why_not",
]

SIMPLE = frozenset((type(None), bool, int, float, complex, str, bytes))
"""Exact classes of values that contain nothing else."""

_NOT_ROUNDED = frozenset({torch.float4_e2m1fn_x2, torch.float8_e8m0fnu})
"""Floating-point dtypes that are not cast: elements that are two numbers, and scales, which are powers of two."""

_OF_ATTRIBUTES = frozenset((PlainObject, argparse.Namespace, types.SimpleNamespace))


def has_state(value: Any) -> bool:
    """Return whether a value is, or is a tuple around, something that is changed in place."""
    return is_around((value,), is_state, {})


def is_state(value: Any) -> bool:
    """Return whether a value is changed in place: a tensor, dict or list."""
    return isinstance(value, (torch.Tensor, dict, list))


def are_wrappers(live: Any, loaded: Any) -> bool:
    """Return whether two values are tensors of one class around others, and alike but for what those hold."""
    if type(live) is not type(loaded) or not hasattr(live, "__tensor_flatten__"):
        return False
    (names, context), (others, other_context) = live.__tensor_flatten__(), loaded.__tensor_flatten__()
    shapes = live.shape == loaded.shape and live.stride() == loaded.stride() and live.dtype is loaded.dtype
    return bool(list(names) == list(others) and shapes and context == other_context)


def has_tensors(value: Any) -> bool:
    """Return whether a value is, or is a container or an object around, a tensor."""
    # Most values are such.
    if type(value) in SIMPLE:
        return False
    # Kept alive: what is made for being asked would leave its identity to the next.
    pending, seen = deque([value]), dict[int, Any]()
    while pending:
        item = pending.popleft()
        if isinstance(item, torch.Tensor):
            return True
        if type(item) in SIMPLE or id(item) in seen:
            continue
        seen[id(item)] = item
        if isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, (list, tuple, deque, set, frozenset)):
            pending.extend(item)
        elif (parts := parts_of(item)) is not None:
            pending.extend((*parts.children.values(), *parts.attributes.values()))
    return False


def parts_of(value: Any) -> Parts | None:
    """Return the parts of an object that consists of others; None of any other one."""
    cls = type(value)
    if cls not in _OF_ATTRIBUTES and not is_dataclass(cls) and flattening_of(cls) is None:
        return None
    try:
        return take_object_apart(value)[1]
    except NotCarried:
        return None


def is_own(part: Any, again: Any) -> bool:
    """Return whether an object is taken apart into what is in it, and not into what is made for that each time."""
    return part is again or (
        type(part) is torch.Tensor
        and type(again) is torch.Tensor
        and part.layout is again.layout is torch.strided
        and part.data_ptr() == again.data_ptr()
    )


def are_equal(live: Any, loaded: Any) -> bool:
    """Return whether two values are the same, of the same classes and dtypes. NaN equals NaN."""
    pending = [(live, loaded)]
    # By their ids, each pair that was compared. The values are kept too: the parts of an object are made here, and when
    # they die, their ids are used again.
    seen: dict[tuple[int, int], tuple[Any, Any]] = {}
    while pending:
        pair = mine, theirs = pending.pop()
        if mine is theirs or (id(mine), id(theirs)) in seen:
            continue
        seen[id(mine), id(theirs)] = pair
        if type(mine) is not type(theirs):
            return False
        if isinstance(mine, dict):
            if mine.keys() != theirs.keys():
                return False
            pending += ((value, theirs[key]) for key, value in mine.items())
        elif isinstance(mine, (list, tuple, deque)):
            if len(mine) != len(theirs):
                return False
            pending += zip(mine, theirs, strict=True)
        elif (parts := parts_of(mine)) is not None and (others := parts_of(theirs)) is not None:
            if parts.form != others.form:
                return False
            pending += (
                (dict(parts.children), dict(others.children)),
                (dict(parts.attributes), dict(others.attributes)),
            )
        elif not _are_equal_leaves(mine, theirs):
            return False
    return True


def _are_equal_leaves(live: Any, loaded: Any) -> bool:
    """Return whether two values of one class are the same that do not contain others."""
    if type(live) is np.ndarray:
        # Not by ==, which broadcasts, and which has no single answer.
        return bool(live.dtype == loaded.dtype and live.shape == loaded.shape and live.tobytes() == loaded.tobytes())
    if type(live) in SCALARS and write_scalar(live) == write_scalar(loaded):
        return True
    if getattr(live, "shape", None) != getattr(loaded, "shape", None):
        return False
    are_nan = bool(np.all(live != live)) and bool(np.all(loaded != loaded))
    return are_nan or (type(live) not in SCALARS and bool(np.all(live == loaded)))


def _is_rounded(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has floating-point numbers that torch can round to others."""
    return tensor.dtype.is_floating_point and tensor.dtype not in _NOT_ROUNDED


def why_not(live: Any, loaded: Any, *, inference: bool, cast: bool) -> str | None:
    """Return why a loaded value cannot be copied into a live tensor, or None if it can."""
    if not isinstance(live, torch.Tensor) or not isinstance(loaded, torch.Tensor):
        return f"a {type(loaded).__name__} into a {type(live).__name__}"
    for tensor, which in ((live, "live"), (loaded, "loaded")):
        if is_lazy(tensor):
            return f"the {which} tensor is a {type(tensor).__name__}, which has no shape yet"
        # It has no shape that could be compared.
        if tensor.is_nested:
            return f"the {which} tensor is nested"
    castable = live.dtype is loaded.dtype or (cast and _is_rounded(live) and _is_rounded(loaded))
    if live.shape != loaded.shape or not castable:
        hint = ", which cast=True would allow" if _is_rounded(live) and _is_rounded(loaded) and not cast else ""
        hint = hint if live.shape == loaded.shape else ""
        return f"{loaded.dtype} {tuple(loaded.shape)} into {live.dtype} {tuple(live.shape)}{hint}"
    if hasattr(live, "__tensor_flatten__"):
        return f"the live tensor is a {type(live).__name__}"
    for tensor, which in ((live, "live"), (loaded, "loaded")):
        if tensor.is_quantized:
            return f"the {which} tensor is quantized"
        if tensor.layout is not torch.strided:
            return f"the {which} tensor is {tensor.layout}"
    return unwritable(live, loaded, inference=inference)
