"""The short way through state dicts that are made of nothing but dicts, lists, tuples and plain tensors.

Nearly all are. There the general walk's questions (has it a ``__deepcopy__``? was it met before? what does it reduce
to?) have known answers, and whole containers can be asked at once whether that is so. It remembers nothing from one
capture to the next, so there is nothing that could be out of date; the first thing that is not plain ends it, and the
general walk begins anew.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Generator, Sequence
from itertools import islice
from operator import attrgetter, is_
from typing import Any

from aiostage._capture.faithful import PLAIN_CLASSES
from aiostage._capture.leaves import Leaves, NotPlain
from aiostage._capture.memo import ATOMIC
from aiostage._capture.rebuild import Results
from aiostage._capture.versions import Witness
from aiostage._loop.collection import untrack_all
from aiostage.leaf import Attribute, Path

__all__ = ["PlainWalk"]

_AT_ONCE = 512
"""Children looked at, or put into place, between two yields."""

_READ_AT_ONCE = 8 * _AT_ONCE
"""Children read from a mapping between two yields: a tenth of a millisecond where they are not in the caches."""

_NODE_COST = 8
"""What opening a container, or building one, costs in terms of children."""

_CONTAINERS = (dict, OrderedDict, list, tuple)
_ITSELF = -1
"""The slot of a container in itself, where its own path is asked for."""


class _Node:
    """One container: its children, and where among them the leaves and other containers are.

    Attributes:
        source: The container.
        parent: The container that it was met in; for the attributes of an OrderedDict, that OrderedDict.
        slot: Where in the parent.
        keys: Of a mapping.
        steps: What leads to each child.
        children: As they were met.
        first_leaf: The index of the first tensor among the children; the others' follow.
        leaves: Which children are tensors.
        nested: The containers among the children, and the attributes.
        attributes: What hangs on an OrderedDict, if anything.
        copy: The staged container, once it is built.
    """

    __slots__ = (
        "attributes",
        "children",
        "copy",
        "first_leaf",
        "keys",
        "leaves",
        "nested",
        "parent",
        "slot",
        "source",
        "steps",
    )

    def __init__(self, source: Any, parent: _Node | None, slot: int) -> None:
        self.source = source
        self.parent = parent
        self.slot = slot
        self.keys: list[Any] = []
        self.steps: Sequence[object] = ()
        self.children: list[Any] = []
        self.first_leaf = 0
        self.leaves: Sequence[int] = ()
        self.nested: list[_Node] = []
        self.attributes: _Node | None = None
        self.copy: Any = None

    def path(self, slot: int) -> Path:
        """Return the path of a child, or of the container itself."""
        steps: list[object] = []
        node: _Node | None = self
        while node is not None:
            if slot != _ITSELF:
                steps.append(node.steps[slot])
            slot = node.slot
            node = node.parent
        return tuple(reversed(steps))

    def release(self) -> None:
        """Keep what paths need, and nothing that leads to the source or the copy, or around in a circle."""
        self.source = self.copy = self.attributes = None
        self.children = []
        self.nested = []


class PlainWalk:
    """One walk over one plain state dict; it offers what :class:`~aiostage._capture.walk.Walk` does."""

    calls_out = False
    """Building plain containers calls no code that could look at values."""

    late = 0
    """All containers are made around what they hold."""

    def __init__(self) -> None:
        self.leaves = Leaves()
        self.witness = Witness()
        self._nodes: list[_Node] = []
        self._origins: list[_Node] = []
        self._containers: set[int] = set()

    def run(self, state_dict: object) -> Generator[None, None, None]:
        """Walk the tree, yielding between small steps.

        Raises:
            NotPlain: If something in it is not plain. That a tensor was met twice comes out at its inspection.
        """
        if type(state_dict) not in _CONTAINERS:
            raise NotPlain
        stack = [_Node(state_dict, None, _ITSELF)]
        looked_at = 0
        while stack:
            node = stack.pop()
            self._nodes.append(node)
            if not self._open(node):
                yield from _read(node)
            for start in range(0, len(node.children), _AT_ONCE):
                looked_at += self._take(node, start)
                if looked_at >= _AT_ONCE:
                    yield
                    looked_at = 0
            if node.leaves:
                self._origins.append(node)
            stack += reversed(node.nested)
            looked_at += _NODE_COST

    def rebuild(self, results: Results) -> Generator[None, None, Any]:
        """Build the staged tree around the staged leaves, yielding between small steps."""
        staged, built = results.staged, 0
        # Each container was met before those inside it.
        for node in reversed(self._nodes):
            steps = _build(node, staged)
            if len(node.children) <= _AT_ONCE:
                for _ in steps:
                    pass
                built += len(node.children) + _NODE_COST
                if built >= _AT_ONCE:
                    yield
                    built = 0
            else:
                yield from steps
        return self._nodes[0].copy

    def path(self, leaf: int) -> Path:
        """Return the path of a leaf."""
        while leaf in self.leaves.owners:
            leaf = self.leaves.owners[leaf]
        node = self._origins[bisect_right(self._origins, leaf, key=_first_leaf) - 1]
        return node.path(node.leaves[leaf - node.first_leaf])

    def release(self) -> None:
        """Let go of the source and of the copy; only paths can be asked for from now on."""
        self.witness = Witness()
        self.leaves.release()
        for node in self._nodes:
            node.release()

    def releasing(self) -> Generator[None, None, None]:
        """Do the larger part of :meth:`release`, yielding between small steps."""
        for start in range(0, len(self._nodes), _AT_ONCE // _NODE_COST):
            for node in self._nodes[start : start + _AT_ONCE // _NODE_COST]:
                node.release()
            yield

    def _open(self, node: _Node) -> bool:
        """Read a container's children; return False if they are many and still to be read."""
        source = node.source
        node.first_leaf = len(self.leaves.tensors)
        whole = True
        if isinstance(source, dict):
            keys, children = node.keys, node.children
            attributes = node.slot == _ITSELF and node.parent is not None
            if len(source) > _READ_AT_ONCE and not attributes:
                untrack_all((keys, children))
                whole = False
            else:
                keys += source
                children += source.values()
            if attributes:
                node.steps = list(map(Attribute, keys))
                self.witness.add_attributes(source, children, node, _ITSELF)
            else:
                node.steps = keys
                self.witness.add_mapping(source, keys, children, node, _ITSELF)
            if type(source) is OrderedDict and vars(source):
                # Module.state_dict() hangs _metadata there.
                node.attributes = _Node(vars(source), node, _ITSELF)
                node.nested.append(node.attributes)
        else:
            children = node.children = list(source)
            node.steps = range(len(children))
            if type(source) is list:
                self.witness.add_sequence(source, children, node, _ITSELF)
            elif set(map(type, children)) <= ATOMIC:
                # A tuple that stays as it is may be met any number of times.
                return whole
        if id(source) in self._containers:
            raise NotPlain
        self._containers.add(id(source))
        return whole

    def _take(self, node: _Node, start: int) -> int:
        """Sort some children of a container; return how many."""
        children = node.children[start : start + _AT_ONCE]
        if not set(map(type, node.keys[start : start + _AT_ONCE])) <= ATOMIC:
            raise NotPlain
        kinds = set(map(type, children))
        if kinds <= PLAIN_CLASSES:
            self.leaves.append(children)
            _note(node, range(start, start + len(children)))
        elif not kinds <= ATOMIC:
            places, tensors = [], []
            for slot, child in enumerate(children, start):
                kind = type(child)
                if kind in PLAIN_CLASSES:
                    tensors.append(child)
                    places.append(slot)
                elif kind in _CONTAINERS:
                    node.nested.append(_Node(child, node, slot))
                elif kind not in ATOMIC:
                    raise NotPlain
            self.leaves.append(tensors)
            _note(node, places)
        return len(children)


def _read(node: _Node) -> Generator[None, None, None]:
    """Read the children of a large mapping, yielding between parts."""
    keys, children = iter(node.source), iter(node.source.values())
    try:
        while part := list(islice(keys, _READ_AT_ONCE)):
            node.keys += part
            node.children += islice(children, _READ_AT_ONCE)
            yield
    except RuntimeError:
        # It changed size meanwhile. Whatever else changed is found when it is compared.
        raise NotPlain from None


def _note(node: _Node, slots: Sequence[int]) -> None:
    """Note where leaves are; ranges that follow each other stay a range."""
    before = node.leaves
    if not before:
        node.leaves = slots
    elif isinstance(before, range) and isinstance(slots, range) and before.stop == slots.start:
        node.leaves = range(before.start, slots.stop)
    elif slots:
        node.leaves = [*before, *slots]


def _build(node: _Node, staged: list[Any]) -> Generator[None, None, None]:
    """Build one container; yields after each part of a large one."""
    source, count, first = node.source, len(node.children), node.first_leaf
    children = node.children
    if node.leaves and len(node.leaves) == count:
        children = staged[first : first + count]
    elif node.leaves or node.nested:
        children = list(children)
        for start in range(0, len(node.leaves), _AT_ONCE):
            slots = node.leaves[start : start + _AT_ONCE]
            for slot, leaf in zip(slots, staged[first + start : first + start + len(slots)], strict=True):
                children[slot] = leaf
            yield
        for start in range(0, len(node.nested), _AT_ONCE):
            for inner in node.nested[start : start + _AT_ONCE]:
                if inner.slot != _ITSELF:
                    children[inner.slot] = inner.copy
            yield
    if isinstance(source, dict):
        target: dict[Any, Any] = OrderedDict() if type(source) is OrderedDict else {}
        for start in range(0, count, _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            target.update(zip(node.keys[part], children[part], strict=True))
            yield
        if node.attributes is not None:
            vars(target).update(node.attributes.copy)
        node.copy = target
    elif type(source) is tuple:
        # As copy.deepcopy does: one whose children are all themselves again is kept.
        node.copy = source if all(map(is_, children, source)) else tuple(children)
    else:
        node.copy = list(children) if children is node.children else children


_first_leaf = attrgetter("first_leaf")
