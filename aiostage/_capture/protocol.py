"""Objects with code of their own: how those of a class are copied, what is inside them, which lie in circles."""

from __future__ import annotations

import array
import copyreg
import datetime
import decimal
import enum
import fractions
import gc
import mmap
import pathlib
import types
import uuid
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Container, Generator, Iterator, Sequence
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import torch

from aiostage import _private
from aiostage._capture.nodes import READS_PER_STEP, Node, ObjectNode, parent_of
from aiostage._capture.versions import GONE, ContainerChanges
from aiostage.errors import UnsupportedLeafError
from aiostage.leaf import Attribute, format_path

__all__ = [
    "ATOMIC",
    "BUFFERS",
    "IMMUTABLE",
    "all_atomic",
    "circles_of",
    "depth_first",
    "failed",
    "is_comparable",
    "is_layout",
    "is_safe_to_make",
    "objects_within",
    "read_iterable",
    "reduce_object",
]

ATOMIC = frozenset(
    (
        type(None),
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        type,
        range,
        property,
        type(Ellipsis),
        type(NotImplemented),
        types.CodeType,
        types.FunctionType,
        types.BuiltinFunctionType,
        types.ModuleType,
        weakref.ref,
        torch.dtype,
        torch.device,
        torch.layout,
        torch.memory_format,
        torch.Size,
        Attribute,
    )
)
"""Classes whose instances are passed through: immutable, or code rather than state."""

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
    if _is_placement(cls):
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


def _is_placement(cls: Any) -> bool:
    """Return whether a class is one of the placements of a DTensor that reduce to values without a setter.

    Each DTensor has its own. Reduced in the last step, 200 of them held the event loop for 4 ms.
    """
    return cls.__module__ == _private.DTENSOR_PLACEMENTS and _has_no_setters(cls)


def is_layout(value: Any) -> bool:
    """Return whether something is part of a DTensor's layout that never changes, and neither does anything in it.

    Such are placements, the shape and strides of the whole tensor, and the order of shards, of which each DTensor has
    its own. The walk passes them through: copied by what they reduce to, they were eight objects of a DTensor.
    """
    parts = value if type(value) is tuple else (value,)
    return bool(parts) and all(map(_is_layout_part, parts))


def _is_layout_part(value: Any) -> bool:
    cls: Any = type(value)
    if _is_placement(cls):
        # It has a dictionary, which is no part of what it reduces to.
        return not vars(value)
    return _is_layout_tuple(cls) and all(
        type(field) in ATOMIC or (type(field) is tuple and ATOMIC.issuperset(map(type, field))) for field in value
    )


@cache
def _is_layout_tuple(cls: Any) -> bool:
    """Return whether a class is one of the named tuples in the spec of a DTensor."""
    return bool(cls.__module__ == _private.DTENSOR_SPECS and cls.__bases__ == (tuple,))


@cache
def _has_no_setters(cls: Any) -> bool:
    values = [value for name in dir(cls) if isinstance(value := getattr(cls, name), property)]
    # Those of other versions of PyTorch are dataclasses, which show what they hold as others do.
    return cls.__getstate__ is not object.__getstate__ and not any(value.fset for value in values)


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


_SAFE = frozenset((_private.new_object, deque, defaultdict, OrderedDict, Counter))
"""What makes an object without looking at what it is given."""


def reduce_object(node: ObjectNode, changes: ContainerChanges) -> Generator[None, None, bool]:
    """Note what an object reduces to, yielding between parts of a large deque.

    Returns:
        Whether making the object calls code that may look at what it is given.

    Raises:
        UnsupportedLeafError: If the object says that it cannot be copied.
    """
    source, cls = node.source, type(node.source)
    if cls is deque and len(source) > READS_PER_STEP and cls not in copyreg.dispatch_table:
        # In parts: what __reduce_ex__ gives of a deque is an iterator, and a list of a million items would be one step.
        items = yield from read_iterable(source)
        # As deque.__reduce_ex__ does, which has nothing else to say of one without attributes.
        node.set_reduced(deque, ((), source.maxlen) if source.maxlen is not None else (), None, items, [])
        changes.add_sequence(source, items, parent_of(node), node.slot)
        return False
    reductor = copyreg.dispatch_table.get(cls)
    try:
        reduced = reductor(source) if reductor is not None else source.__reduce_ex__(4)
        if isinstance(reduced, str):
            # A name of a global, which is its own copy.
            node.copy, node.done = source, True
            return False
        function, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        given = list(items) if items is not None else []
        mapped = list(pairs) if pairs is not None else []
    except Exception as error:
        raise failed(node, error) from error
    node.set_reduced(function, arguments, state, given, mapped)
    calls_out = not issubclass(cls, IMMUTABLE) and not (function in _SAFE and is_safe_to_make(cls))
    # In the step in which it was reduced, so that both are of one moment.
    _record_contents(node, changes)
    return calls_out


def _record_contents(node: ObjectNode, changes: ContainerChanges) -> None:
    """Note what an object holds, where that can be looked at again."""
    source, cls = node.source, type(node.source)
    if not is_comparable(cls) or issubclass(cls, IMMUTABLE) or isinstance(source, np.generic) or _is_placement(cls):
        return
    parent, slot = parent_of(node), node.slot
    if isinstance(source, dict):
        changes.add_mapping(source, list(dict.keys(source)), list(dict.values(source)), parent, slot)
    elif isinstance(source, (list, deque)):
        changes.add_sequence(source, list(source), parent, slot)
    elif isinstance(source, set):
        changes.add_set(source, list(set.__iter__(source)), parent, slot)
    noted = {name: getattr(source, name, GONE) for name in _private.slot_names(cls)}
    if isinstance(source, defaultdict):
        noted["default_factory"] = source.default_factory
    if cls.__dictoffset__:
        noted["__dict__"] = source.__dict__
        # Not among the children while it is empty, so it is compared here: an attribute that comes later is a change.
        if not source.__dict__:
            changes.add_attributes(source.__dict__, [], [], parent, slot)
    if noted:
        changes.add_slots(source, noted, parent, slot)


def read_iterable(source: set[Any] | frozenset[Any] | deque[Any]) -> Generator[None, None, list[Any]]:
    """Return what is in a container as it is at one moment, yielding between parts of a large one."""
    if len(source) <= READS_PER_STEP:
        return list(source)
    items: list[Any] = []
    _private.untrack_all((items,))
    iterator = iter(source)
    try:
        while part := list(islice(iterator, READS_PER_STEP)):
            items += part
            yield
    except RuntimeError:
        # It changed meanwhile: record it again, in one step.
        items[:] = source
    return items


def all_atomic(values: Sequence[Any]) -> Generator[None, None, bool]:
    """Return whether all of some values are atoms, yielding between parts of many."""
    for start in range(0, len(values), READS_PER_STEP):
        if start:
            yield
        if not set(map(type, values[start : start + READS_PER_STEP])) <= ATOMIC:
            return False
    return True


def failed(node: Node, error: Exception) -> Exception:
    """Return the error to raise for one that the code of an object has raised."""
    if isinstance(error, UnsupportedLeafError):
        return error
    cls = type(node.source)
    if cls is mmap.mmap:
        # Of a memory-mapped TensorDict, for example, whose class the caller cannot change.
        remedy = "Stage a clone() of the tensor or TensorDict whose memory it is, or leave it out with passthrough."
    else:
        remedy = "Give it, or what holds it, a __deepcopy__ or __reduce__, or leave it out with passthrough."
    return UnsupportedLeafError(
        f"{cls.__qualname__} cannot be copied: {type(error).__name__}: {str(error)[:400].rstrip('.')}.",
        path=format_path(node.own_path()),
        remedy=remedy,
    )


def objects_within(root: object, seen: dict[int, list[Any]] | None = None) -> Iterator[Any]:
    """Yield an object and all that its containers, attributes and slots lead to, up to tensors, each once.

    Args:
        root: The object.
        seen: What was yielded before and is not to be yielded again, by its identity: a list of the object and of what
            it leads to. Added to.
    """
    # Kept alive: what is made for being asked, such as what a partial reduces to, would leave its identity to the next.
    seen = {} if seen is None else seen
    pending: list[Any] = [root]
    while pending:
        item = pending.pop()
        cls = type(item)
        if cls in _ATOMS or isinstance(item, _NOT_STATE) or id(item) in seen:
            continue
        found = seen[id(item)] = [item]
        yield item
        if isinstance(item, torch.Tensor):
            continue
        if isinstance(item, dict):
            found += item.keys()
            found += item.values()
        elif isinstance(item, (list, tuple, set, frozenset, deque)):
            found += item
        elif isinstance(item, types.MethodType):
            found.append(item.__self__)
        elif isinstance(item, np.ndarray):
            found += item.ravel().tolist() if item.dtype == object else ()
        elif cls.__module__ in _REDUCED:
            found += _reduced(item)
        # Asking an exception that has no attributes for them changes what it reduces to.
        if not isinstance(item, BaseException) or dict in map(type, gc.get_referents(item)):
            found += getattr(item, "__dict__", {}).values()
        slots = _private.slot_names(cls)
        found += [getattr(item, name) for name in slots if hasattr(item, name)]
        pending += found[1:]


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


def circles_of(some: Sequence[Node], leads: Leads, between: Container[int] = ()) -> dict[int, int]:
    """Return which circles some nodes lie in or lead to: a number for each node of one, by its identity.

    What code sees of a circle depends on where copying began.

    Args:
        some: Nodes whose code looks at copies.
        leads: Returns what a node leads to.
        between: The identities of nodes that stand for objects which only connect others.
    """
    circles: dict[int, int] = {}
    for number, component in enumerate(_components(some, leads)):
        nodes = [node for node in component if id(node) not in between]
        if len(nodes) > 1 or (nodes and nodes[0] in leads(nodes[0])):
            circles.update((id(node), number) for node in nodes)
    return circles


def depth_first(root: Node, leads: Leads, seen: set[int] | None = None) -> Iterator[Node]:
    """Yield a node and what it leads to, each once, in the order of copying.

    Args:
        root: The first.
        leads: Returns what a node leads to; asked once the node has been dealt with.
        seen: Identities of nodes that are left out; grows by those that are yielded.
    """
    seen = set() if seen is None else seen
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
                    # Tarjan's recursion on a stack of its own: circles may be as deep as memory is large. The iterator
                    # goes on behind this child.
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
