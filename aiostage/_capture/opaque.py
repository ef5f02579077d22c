"""Finding what is inside objects that copy themselves."""

from __future__ import annotations

import gc
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from aiostage import _private

__all__ = ["objects_within", "tensors_within"]

_NOT_STATE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)

_ATOMS = frozenset((str, bytes, bytearray, int, float, complex, bool, type(None), range))

_REDUCED = frozenset(("builtins", "collections", "functools"))
"""Where the classes are that show what they hold through what they reduce to: iterators, slices, partials, errors."""


def tensors_within(root: object) -> Iterator[torch.Tensor]:
    """Yield every distinct tensor that containers, attributes and slots lead to from an object."""
    return (item for item in objects_within(root) if isinstance(item, torch.Tensor))


def objects_within(root: object) -> Iterator[Any]:
    """Yield an object and all that its containers, attributes and slots lead to, up to tensors, each once."""
    seen: set[int] = set()
    pending: list[Any] = [root]
    while pending:
        item = pending.pop()
        cls = type(item)
        if cls in _ATOMS or isinstance(item, _NOT_STATE) or id(item) in seen:
            continue
        seen.add(id(item))
        yield item
        if isinstance(item, torch.Tensor):
            continue
        if isinstance(item, dict):
            pending += item.keys()
            pending += item.values()
        elif isinstance(item, (list, tuple, set, frozenset, deque)):
            pending += item
        elif isinstance(item, types.MethodType):
            pending.append(item.__self__)
        elif isinstance(item, np.ndarray):
            pending += item.ravel().tolist() if item.dtype == object else ()
        elif cls.__module__ in _REDUCED:
            pending += _reduced(item)
        # Asking an exception that has no attributes for them changes what it reduces to.
        if not isinstance(item, BaseException) or dict in map(type, gc.get_referents(item)):
            pending += getattr(item, "__dict__", {}).values()
        slots = _private.slot_names(cls)
        pending += [getattr(item, name) for name in slots if hasattr(item, name)]


def _reduced(item: Any) -> list[Any]:
    """Return what an object of a class of Python's own is made of, in the order of :func:`copy.deepcopy`."""
    try:
        reduced = item.__reduce_ex__(4)
    except Exception:
        # It cannot be copied at all, which is found out if its copy is asked for.
        return []
    return list(reduced[1:3]) if isinstance(reduced, tuple) else []
