"""Objects with code of their own: how those of a class are copied, what is inside them, which lie in circles."""

from __future__ import annotations

import array
import copyreg
import datetime
import decimal
import enum
import fractions
import gc
import pathlib
import types
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from aiostage import _private
from aiostage._capture.nodes import Node

__all__ = [
    "BUFFERS",
    "IMMUTABLE",
    "circles_of",
    "depth_first",
    "is_comparable",
    "is_safe_to_make",
    "objects_within",
    "tensors_within",
]

BUFFERS = frozenset((np.ndarray, bytearray, array.array))
"""Classes whose instances are memory without a version."""

IMMUTABLE = (
    datetime.date,
    datetime.time,
    datetime.timedelta,
    datetime.tzinfo,
    decimal.Decimal,
    enum.Enum,
    fractions.Fraction,
    pathlib.PurePath,
    slice,
    uuid.UUID,
    np.dtype,
)
"""Classes whose instances never change, so that it does not matter when they are looked at."""

_READ = ("__iter__", "items", "keys", "values", "__reduce__", "__reduce_ex__", "__getstate__", "__getattribute__")


def is_comparable(cls: Any) -> bool:
    """Return whether all that objects of a class reduce to can be compared later, because no other code makes it."""
    return _is_comparable(cls)


@cache
def _is_comparable(cls: Any) -> bool:
    if cls in copyreg.dispatch_table:
        return cls in (slice, complex)
    if issubclass(cls, IMMUTABLE) or (issubclass(cls, np.generic) and not issubclass(cls, np.void)):
        return True
    base: Any = object
    for known in (Counter, OrderedDict, defaultdict, dict, list, tuple, set, frozenset, deque):
        if issubclass(cls, known):
            base = known
            break
    if any(getattr(cls, name, None) is not getattr(base, name, None) for name in _READ):
        return False
    # A tuple's are its items, which are what they are.
    if base is not tuple and (hasattr(cls, "__getnewargs__") or hasattr(cls, "__getnewargs_ex__")):
        return hasattr(base, "__getnewargs__")
    return base is not object or cls.__module__ != "builtins" or cls is object


def is_safe_to_make(cls: Any) -> bool:
    """Return whether making an object of a class runs no code that could look at the values of tensors."""
    return _is_safe_to_make(cls)


@cache
def _is_safe_to_make(cls: Any) -> bool:
    if hasattr(cls, "__setstate__"):
        return False
    if issubclass(cls, (dict, list, set, frozenset, deque)):
        return cls.__module__ in ("builtins", "collections")
    return True


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


Leads = Callable[[Node], Sequence[Node]]
"""Returns what a node leads to, in the order of copying."""


def circles_of(some: Sequence[Node], leads: Leads) -> dict[int, int]:
    """Return which circles some nodes lie in or lead to: a number for each node of one, by its identity.

    What code sees of a circle depends on where copying began.

    Args:
        some: Nodes whose code looks at copies.
        leads: Returns what a node leads to.
    """
    circles: dict[int, int] = {}
    for number, component in enumerate(_components(some, leads)):
        if len(component) > 1 or component[0] in leads(component[0]):
            circles.update((id(node), number) for node in component)
    return circles


def depth_first(root: Node, leads: Leads) -> Iterator[Node]:
    """Yield a node and what it leads to, each once, in the order of copying.

    Args:
        root: The first.
        leads: Returns what a node leads to; asked once the node has been dealt with.
    """
    seen: set[int] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            stack += reversed(leads(node))


def _components(roots: Sequence[Node], leads: Leads) -> Iterator[list[Node]]:
    """Yield the strongly connected components of what some nodes lead to, after Tarjan."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    open_nodes: list[Node] = []
    is_open: set[int] = set()
    for root in roots:
        if id(root) in index:
            continue
        stack: list[tuple[Node, Iterator[Node]]] = []
        following: Node | None = root
        while following is not None or stack:
            if following is not None:
                index[id(following)] = low[id(following)] = len(index)
                open_nodes.append(following)
                is_open.add(id(following))
                stack.append((following, iter(leads(following))))
                following = None
            node, children = stack[-1]
            for child in children:
                if id(child) not in index:
                    following = child
                    break
                if id(child) in is_open:
                    low[id(node)] = min(low[id(node)], index[id(child)])
            if following is not None:
                continue
            stack.pop()
            if stack:
                parent = id(stack[-1][0])
                low[parent] = min(low[parent], low[id(node)])
            if low[id(node)] == index[id(node)]:
                position = next(place for place in reversed(range(len(open_nodes))) if open_nodes[place] is node)
                component = open_nodes[position:]
                del open_nodes[position:]
                is_open.difference_update(map(id, component))
                yield component
