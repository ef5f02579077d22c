"""The walk over a state dict: everything is noted when it is met, and what cannot be compared later is copied last.

The walk keeps its own stack, so that nesting is bounded by memory and not by the recursion limit, and yields between
small steps, so that an event loop can interrupt it. It only notes; :mod:`aiostage._capture.build` makes the copy.
"""

from __future__ import annotations

import copyreg
import enum
import types
import weakref
from bisect import bisect_left, bisect_right
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Generator, Sequence
from itertools import islice
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from aiostage import _private
from aiostage._capture.build import Memo, build, built_now
from aiostage._capture.early import EarlyCopies
from aiostage._capture.faithful import PLAIN_CLASSES, Refusal
from aiostage._capture.leaves import LEAVES_PER_STEP, Inspection, Leaves, Replaced, Table, have_attributes
from aiostage._capture.nodes import (
    HIDDEN,
    STATE,
    AttributesNode,
    AttributeSteps,
    DictNode,
    GivenNode,
    ListNode,
    MethodNode,
    Node,
    ObjectNode,
    SetNode,
    TupleNode,
)
from aiostage._capture.protocol import (
    BUFFERS,
    IMMUTABLE,
    circles_of,
    depth_first,
    is_comparable,
    is_safe_to_make,
    objects_within,
    tensors_within,
)
from aiostage._capture.versions import GONE, ContainerChanges, copy_buffer, nbytes_of
from aiostage._loop.slices import exhausted
from aiostage.errors import TornSnapshotError, UnsupportedLeafError
from aiostage.leaf import Attribute, Path, format_path

__all__ = ["ATOMIC", "Walk"]

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

_CHILDREN_PER_STEP = LEAVES_PER_STEP
"""Children looked at between two yields."""

_READS_PER_STEP = 16 * _CHILDREN_PER_STEP
"""Children read from a container between two yields: a tenth of a millisecond where they are not in the caches."""

_ATTRIBUTED_AT_ONCE = 64
"""Tensors with attributes looked at between two yields, at some microseconds each."""

_NODE_COST = 8
"""What opening a container costs in terms of children."""

_BYTES_LAST = 2**20
"""How many bytes of arrays are copied in the last step, which is one. A megabyte takes a tenth of a millisecond; what
is beyond is copied before, in pieces, and compared at capture."""

_SMALLEST_BUFFER = 1024
"""What the smallest array counts for, in bytes: calling for its copy takes as long."""


class Walk:
    """One walk over one state dict.

    Args:
        passthrough: Says which objects are put into the staged tree uncopied.
        only_leaves: Whether to find the tensors only, so that objects that copy themselves need not.
        before_code: Called before objects copy themselves, which may be in a later step than the call, where other
            streams are current. Returns an error, which is raised if there is a tensor on a device.
    """

    def __init__(
        self,
        *,
        passthrough: Callable[[Path, object], bool] | None = None,
        only_leaves: bool = False,
        before_code: Callable[[], Exception | None] | None = None,
    ) -> None:
        self.leaves = Leaves()
        self.changes = ContainerChanges()
        self.at_call = False
        """Whether this is the step inside the call. It only notes, so that what it gets to is as it was then."""
        self.calls_out = False
        """Whether building calls other people's code, which may look at the values of tensors."""
        self._passthrough = passthrough
        self._only_leaves = only_leaves
        self._before_code = before_code
        self._inspection: Inspection | None = None
        self._root: Node | None = None
        self._nodes: Table[Node] = Table(dict)
        self._origins: list[Node] = []
        self._fresh: list[Node] = []
        self._stack: list[list[Node]] = []
        self._all: list[Node] = []
        self._reduced_last: list[ObjectNode] = []
        self._buffers: list[GivenNode] = []
        self._opaque: list[GivenNode] = []
        self._within: dict[int, list[torch.Tensor]] = {}
        self._reach: dict[int, list[int]] = {}
        self._early: EarlyCopies | None = None
        self._memo: Memo | None = None
        self._bytes_left = _BYTES_LAST

    def run(self, state_dict: object, inspection: Inspection | None = None) -> Generator[None, None, None]:
        """Note the tree, yielding between small steps.

        Args:
            state_dict: The tree.
            inspection: By which to recognize tensors in the step in which they are noted.

        Raises:
            UnsupportedLeafError: If something in the tree cannot be copied.
        """
        root = self._root = ListNode(None, None, 0)
        root.children, root.steps = [state_dict], (HIDDEN,)
        self._all.append(root)
        self._take(root, 0)
        self._opened(root)
        self._inspection = inspection
        yield from self._note()

    def inspect(self, inspection: Inspection) -> Generator[None, None, None]:
        """Find out what each tensor noted is, yielding between small steps.

        Raises:
            UnsupportedLeafError: If a leaf cannot be staged faithfully.
            TornSnapshotError: If a leaf has got other memory since it was met.
        """
        while True:
            known = len(self.leaves.specs)
            try:
                yield from self.leaves.inspect(inspection)
            except Refusal as refusal:
                raise refusal.at(self.path(len(self.leaves.specs))) from None
            except Replaced as replaced:
                raise TornSnapshotError([format_path(self.path(replaced.index))]) from None
            if not self.leaves.owned or self.leaves.owned[-1] < known:
                return
            # What hangs on gradients and parts that were found only now.
            yield from self._note_owned(known)

    def settle(self, inspection: Inspection) -> Generator[None, None, None]:
        """Copy what no comparison can tell to have changed, in one step: the moment of the copy.

        Everything else has been noted by then, and is compared at capture: unchanged between the two, it was so in
        this step.

        Raises:
            UnsupportedLeafError: If something cannot be copied.
            StagingError: If the device has failed.
        """
        failure: Exception | None = None
        if self._opaque or self._reduced_last:
            yield from self.leaves.index()
            failure = self._before_code() if self._before_code is not None else None
        if not (self._opaque or self._reduced_last or self._buffers):
            return
        while True:
            reduced, self._reduced_last = self._reduced_last, []
            for node in reduced:
                exhausted(self._reduce(node))
                self._stack.append([node])
                exhausted(self._note())
            unknown = self._opaque_unknown()
            for given in unknown:
                self._find_tensors(given)
                exhausted(self._note())
            if not (reduced or unknown):
                break
            exhausted(self.inspect(inspection))
        if failure is not None and not all(tensor.is_cpu for tensor in self.leaves.tensors):
            raise failure
        if not self._only_leaves:
            self._copy_last()
        yield
        if self._early is not None:
            yield from self._early.tie()

    def rebuild(self, staged: list[Any]) -> Generator[None, None, Any]:
        """Build the staged tree around the staged leaves, and return it, yielding between small steps."""
        root = self._root
        assert root is not None  # noqa: S101 - nothing is built before the walk
        yield from build(root, lambda start, stop: staged[start:stop], self._memo)
        return root.copy[0]

    def path(self, leaf: int) -> Path:
        """Return the path of a leaf: one that leads to it."""
        node, slot = self._place_of(leaf)
        return node.path(slot)

    def _place_of(self, leaf: int) -> tuple[Node, int]:
        """Return the node that leads to a leaf, and its slot there."""
        while (owner := self.leaves.owners.find(leaf)) is not None:
            leaf = owner
        node = self._origins[bisect_right(self._origins, leaf, key=attrgetter("first_leaf")) - 1]
        if isinstance(node, GivenNode):
            return _parent(node), node.slot
        return node, node.leaves[leaf - node.first_leaf]

    def releasing(self) -> Generator[None, None, None]:
        """Do the larger part of :meth:`release`, yielding between small steps."""
        if self._memo is not None:
            self._memo.forget()
            self._memo = None
        yield from self.changes.releasing()
        nodes, every = self._nodes, self._all
        while nodes:
            _, part = nodes.popitem()
            while part:
                for _ in range(min(len(part), _CHILDREN_PER_STEP)):
                    part.popitem()
                yield
        while every:
            for node in every[: -1 - _CHILDREN_PER_STEP // _NODE_COST : -1]:
                yield from _emptying(node)
                node.release()
            del every[-(_CHILDREN_PER_STEP // _NODE_COST) :]
            yield

    def release(self) -> None:
        """Drop the source and the copy; only paths can be asked for from now on."""
        self.leaves.release()
        self._early = None
        for held in (
            self._fresh,
            self._stack,
            self._reduced_last,
            self._buffers,
            self._opaque,
            self._within,
            self._reach,
        ):
            held.clear()
        exhausted(self.releasing())

    # Noting

    def _note(self) -> Generator[None, None, None]:
        """Open what was met and not opened yet, depth first."""
        stack, cost, since = self._stack, 0, len(self.leaves.tensors)
        while stack:
            # What a node of many children has led to stays one list: moving it takes milliseconds.
            pending = stack[-1]
            node = pending.pop()
            if not pending:
                stack.pop()
            if isinstance(node, GivenNode):
                yield from self._copy_buffer(node)
                since = len(self.leaves.tensors)
                continue
            for _ in self._read(node):
                yield
                cost, since = 0, len(self.leaves.tensors)
            node.first_leaf = len(self.leaves.tensors)
            start = 0
            while start < len(node.children):
                if cost >= _CHILDREN_PER_STEP:
                    yield
                    cost, since = 0, len(self.leaves.tensors)
                before, start = start, self._take(node, start)
                cost += _CHILDREN_PER_STEP if start - before < _CHILDREN_PER_STEP else start - before
                while self._inspection is not None and self.leaves.inspect_some(
                    self._inspection, since, only_known=self.at_call
                ):
                    yield
                    cost, since = 0, len(self.leaves.tensors)
            self._opened(node)
            cost += _NODE_COST
            if cost >= _CHILDREN_PER_STEP:
                yield
                cost, since = 0, len(self.leaves.tensors)

    def _opened(self, node: Node) -> None:
        if node.leaves:
            self._origins.append(node)
        self._fresh.reverse()
        self._push_fresh()

    def _push_fresh(self) -> None:
        if self._fresh:
            self._stack.append(self._fresh)
            self._fresh = []

    def _take(self, node: Node, start: int) -> int:
        """Sort some children of a node, and return the first slot that comes after them."""
        children = node.children[start : start + _CHILDREN_PER_STEP]
        kinds = set(map(type, children))
        if kinds <= ATOMIC:
            return start + len(children)
        if self._passthrough is None and kinds <= PLAIN_CLASSES and not have_attributes(children):
            self.leaves.append(children)
            node.note_leaves(range(start, start + len(children)))
            return start + len(children)
        tensors: list[torch.Tensor] = []
        slots: list[int] = []
        attributed = 0
        slot = start
        for slot, child in enumerate(children, start):
            kind = type(child)
            if kind in ATOMIC:
                continue
            met = self._nodes.find(id(child))
            if met is not None:
                node.nested.append((slot, met))
            elif self._passthrough is not None and self._passthrough(node.path(slot), child):
                continue
            elif issubclass(kind, torch.Tensor) and not _copies_itself(child, kind):
                tensors.append(child)
                slots.append(slot)
                if kind not in PLAIN_CLASSES or have_attributes((child,)):
                    index = len(self.leaves.tensors) + len(tensors) - 1
                    self._attributes(child, index, node, slot)
                    attributed += 1
                    if attributed == _ATTRIBUTED_AT_ONCE:
                        break
            else:
                self._meet(child, kind, node, slot)
        if tensors:
            self.leaves.append(tensors)
            node.note_leaves(slots)
        return slot + 1

    def _attributes(self, tensor: torch.Tensor, index: int, node: Node, slot: int) -> None:
        """Note what hangs on a tensor."""
        try:
            composite = self.leaves.composite_of(index, tensor)
        except Refusal as refusal:
            raise refusal.at(node.path(slot)) from None
        if type(tensor) in PLAIN_CLASSES and len(vars(tensor)) > _CHILDREN_PER_STEP:
            self.leaves.attributed.add(index)
            made = AttributesNode(tensor, node, slot)
            made.leaf = index
            self._add(made, node, slot)
            return
        attributes = dict(vars(tensor))
        if composite is None or composite.owned is None:
            self.changes.add_attributes(vars(tensor), list(attributes), list(attributes.values()), node, slot)
        else:
            attributes = {name: value for name, value in attributes.items() if not composite.owns(name)}
            self.changes.add_names(vars(tensor), list(attributes), composite.owns, node, slot)
            self.changes.add_slots(tensor, dict(attributes), node, slot)
        if type(tensor) not in PLAIN_CLASSES:
            names = _private.slot_names(type(tensor))
            self.changes.add_slots(tensor, {name: getattr(tensor, name, GONE) for name in names}, node, slot)
            attributes |= {name: getattr(tensor, name) for name in names if hasattr(tensor, name)}
        self.leaves.attributed.add(index)
        if not attributes:
            return
        made = AttributesNode(tensor, node, slot)
        made.leaf = index
        # A bound method on a tensor (a weight loader, say) is code, and the module behind it is no part of the tensor.
        made.kept = {name: value for name, value in attributes.items() if type(value) is types.MethodType}
        made.names = [name for name in attributes if name not in made.kept]
        made.children = [attributes[name] for name in made.names]
        made.steps = list(map(Attribute, made.names))
        self._add(made, node, slot)

    def _note_owned(self, start: int) -> Generator[None, None, None]:
        """Note what hangs on the gradients and parts from an index on, which are children of no node."""
        leaves = self.leaves
        owned = leaves.owned[bisect_left(leaves.owned, start) :]
        for first in range(0, len(owned), _ATTRIBUTED_AT_ONCE):
            for index in owned[first : first + _ATTRIBUTED_AT_ONCE]:
                tensor = leaves.tensors[index]
                if type(tensor) not in PLAIN_CLASSES or have_attributes((tensor,)):
                    self._note_beside(index, tensor)
            yield
        self._push_fresh()
        yield from self._note()

    def _note_beside(self, index: int, tensor: torch.Tensor) -> None:
        """Note what hangs on a tensor beside the tree, so that it is built with it."""
        leaves, root = self.leaves, self._root
        assert root is not None  # noqa: S101 - nothing is inspected before the walk
        owner = leaves.owners.find(index)
        is_gradient = owner is not None and leaves.gradients.get(owner) == index
        holder = ListNode([tensor], *self._place_of(index))
        holder.children, holder.steps = holder.source, (Attribute("grad") if is_gradient else HIDDEN,)
        self._attributes(tensor, index, holder, 0)
        if holder.nested:
            root.nested.append((len(root.children), holder))
            root.children.append(tensor)
            root.steps = (*root.steps, HIDDEN)
            self._all.append(holder)

    def _add(self, made: Node, node: Node, slot: int) -> None:
        self._nodes.put(id(made.source), made)
        self._all.append(made)
        self._fresh.append(made)
        node.nested.append((slot, made))

    def _meet(self, child: Any, kind: type, node: Node, slot: int) -> None:
        """Note that a child is to be copied; it is opened later."""
        made: Node
        if kind is dict or kind is OrderedDict:
            made = DictNode(child, node, slot)
        elif kind is defaultdict and type(child.default_factory) in ATOMIC:
            made = DictNode(child, node, slot)
            self.changes.add_slots(child, {"default_factory": child.default_factory}, node, slot)
        elif kind is list:
            made = ListNode(child, node, slot)
        elif kind is tuple:
            made = TupleNode(child, node, slot)
        elif kind is set or kind is frozenset:
            made = SetNode(child, node, slot)
        elif kind is types.MethodType:
            made = MethodNode(child, node, slot)
        elif issubclass(kind, (type, enum.Enum)):
            return
        elif kind in BUFFERS and not (kind is np.ndarray and child.dtype.hasobject):
            made = GivenNode(child, node, slot)
            size = max(_SMALLEST_BUFFER, nbytes_of(child))
            if size <= self._bytes_left:
                self._bytes_left -= size
                self._buffers.append(made)
                self._nodes.put(id(child), made)
                self._all.append(made)
                node.nested.append((slot, made))
                return
        elif getattr(child, "__deepcopy__", None) is not None:
            made = GivenNode(child, node, slot)
            self._opaque.append(made)
            # Its code may look at the values of tensors, but has its own copies of them.
            self._nodes.put(id(child), made)
            self._all.append(made)
            node.nested.append((slot, made))
            return
        else:
            made = ObjectNode(child, node, slot)
            made.failed = failed
            if not is_comparable(kind):
                self._reduced_last.append(made)
                self._nodes.put(id(child), made)
                self._all.append(made)
                node.nested.append((slot, made))
                return
        self._add(made, node, slot)

    def _read(self, node: Node) -> Generator[None, None, None]:
        """Note what a node holds, yielding between parts of a large one."""
        source = node.source
        if isinstance(node, DictNode):
            yield from self._read_mapping(node)
        elif isinstance(node, ListNode):
            if len(source) <= _READS_PER_STEP:
                node.children = list(source)
            else:
                _private.untrack_all((node.children,))
                while part := source[len(node.children) : len(node.children) + _READS_PER_STEP]:
                    node.children += part
                    yield
            node.steps = range(len(node.children))
            self.changes.add_sequence(source, node.children, _parent(node), node.slot)
        elif isinstance(node, TupleNode):
            node.children = source
            inside = _parent(node).steps[node.slot] is STATE and len(source) == 2
            node.steps = (STATE, STATE) if inside else range(len(source))
        elif isinstance(node, SetNode):
            node.children = yield from _read_iterable(source)
            node.steps = (HIDDEN,) * len(node.children)
            if type(source) is set:
                self.changes.add_set(source, node.children, _parent(node), node.slot)
            if not (yield from _all_atomic(node.children)):
                self.calls_out = True
        elif isinstance(node, MethodNode):
            node.children, node.steps = [source.__self__], (Attribute("__self__"),)
        elif isinstance(node, AttributesNode) and not node.steps:
            yield from self._read_attributes(node)
        elif isinstance(node, ObjectNode) and not node.steps:
            yield from self._reduce(node)

    def _read_mapping(self, node: DictNode) -> Generator[None, None, None]:
        source, keys, values = node.source, node.keys, node.children
        parent, slot = _parent(node), node.slot
        atomic = yield from _read_items(source, keys, values)
        node.steps = keys
        if parent.steps[slot] is STATE:
            node.steps = AttributeSteps(keys)
            self.changes.add_attributes(source, keys, values, parent, slot)
        else:
            self.changes.add_mapping(source, keys, values, parent, slot)
        if not atomic:
            self.calls_out = node.interleaved = True
            node.children = [part for pair in zip(values, keys, strict=True) for part in pair]
            node.steps = [step for step in node.steps for _ in range(2)]
            node.keys = []
        if type(source) is OrderedDict and vars(source):
            # Module.state_dict() hangs _metadata there.
            node.attributed = True
            node.children = [*node.children, vars(source)]
            node.steps = [*node.steps, STATE]
        elif type(source) is OrderedDict:
            self.changes.add_attributes(vars(source), [], [], parent, slot)

    def _read_attributes(self, node: AttributesNode) -> Generator[None, None, None]:
        """Note the many attributes of a tensor."""
        attributes, names, values = vars(node.source), node.names, node.children
        yield from _read_items(attributes, names, values)
        self.changes.add_attributes(attributes, names, values, _parent(node), node.slot)
        methods = []
        for start in range(0, len(values), _READS_PER_STEP):
            part = values[start : start + _READS_PER_STEP]
            if types.MethodType in map(type, part):
                methods += [slot for slot, value in enumerate(part, start) if type(value) is types.MethodType]
            yield
        if methods:
            node.kept = {names[slot]: values[slot] for slot in methods}
            node.names = [name for name in names if name not in node.kept]
            node.children = [attributes[name] for name in node.names]
        node.steps = AttributeSteps(node.names)

    def _reduce(self, node: ObjectNode) -> Generator[None, None, None]:
        """Note what an object reduces to, yielding between parts of a large deque."""
        source, cls = node.source, type(node.source)
        if cls is deque and len(source) > _READS_PER_STEP and cls not in copyreg.dispatch_table:
            items = yield from _read_iterable(source)
            # As deque.__reduce_ex__ does, which has nothing else to say of one without attributes.
            node.set_reduced(deque, ((), source.maxlen) if source.maxlen is not None else (), None, items, [])
            self.changes.add_sequence(source, items, _parent(node), node.slot)
            return
        reductor = copyreg.dispatch_table.get(cls)
        try:
            reduced = reductor(source) if reductor is not None else source.__reduce_ex__(4)
            if isinstance(reduced, str):
                node.copy, node.done = source, True
                return
            function, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
            given = list(items) if items is not None else []
            mapped = list(pairs) if pairs is not None else []
        except Exception as error:
            raise failed(node, error) from error
        node.set_reduced(function, arguments, state, given, mapped)
        if not issubclass(cls, IMMUTABLE) and not (function in _SAFE and is_safe_to_make(cls)):
            self.calls_out = True
        self._record_contents(node, state)

    def _record_contents(self, node: ObjectNode, state: Any) -> None:
        """Note what an object holds, where that can be looked at again."""
        source, cls = node.source, type(node.source)
        if not is_comparable(cls) or issubclass(cls, IMMUTABLE) or isinstance(source, np.generic):
            return
        parent, slot, changes = _parent(node), node.slot, self.changes
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
            if not source.__dict__:
                changes.add_attributes(source.__dict__, [], [], parent, slot)
        if noted:
            changes.add_slots(source, noted, parent, slot)

    def _copy_buffer(self, node: GivenNode) -> Generator[None, None, None]:
        """Copy memory in pieces, to be compared with it at capture."""
        copy = yield from copy_buffer(node.source)
        node.copy, node.done = copy, True
        self.changes.add_buffer(node.source, copy, _parent(node), node.slot)

    # The last step

    def _opaque_unknown(self) -> list[GivenNode]:
        return [node for node in self._opaque if id(node) not in self._within]

    def _find_tensors(self, node: GivenNode) -> None:
        """Note the tensors inside an object that copies itself, so that its code gets their staged copies."""
        objects = list(objects_within(node.source))
        self._reach[id(node)] = list(map(id, objects))
        found = self._within[id(node)] = [
            item for item in objects if isinstance(item, torch.Tensor) and not _copies_itself(item, type(item))
        ]
        known = self.leaves.positions
        exhausted(self.leaves.index())
        new = [tensor for tensor in found if id(tensor) not in known]
        if not new:
            return
        node.first_leaf = len(self.leaves.tensors)
        self.leaves.append(new)
        node.leaves = range(len(new))
        self._origins.append(node)
        for index, tensor in enumerate(new, node.first_leaf):
            if type(tensor) not in PLAIN_CLASSES or have_attributes((tensor,)):
                nested = len(_parent(node).nested)
                self._attributes(tensor, index, _parent(node), node.slot)
                # It is reached through the object's own code, and no child of what the object is in.
                del _parent(node).nested[nested:]
        self._push_fresh()

    def _copy_last(self) -> None:
        """Copy everything that cannot be compared later."""
        for node in self._buffers:
            node.copy, node.done = exhausted(copy_buffer(node.source)), True
        if not self._opaque:
            return
        exhausted(self.leaves.index())
        early = self._early = EarlyCopies(self.leaves)
        memo = self._memo = Memo(self._nodes, early.copies, self.leaves.positions, early.storages, self._give)
        root = self._root
        assert root is not None  # noqa: S101 - nothing is copied before the walk
        memo.circles = circles_of(self._opaque, self._leads)
        if memo.circles:
            self._copy_around_circles(root, memo)
        for node in self._opaque:
            if not node.done:
                self._give(node)
        for suspended in memo.suspended:
            if not suspended.done:
                built_now(suspended, memo)

    def _copy_around_circles(self, root: Node, memo: Memo) -> None:
        """Let objects copy themselves in the order of copy.deepcopy, which enters each circle at the same node.

        What is made of part of a circle, such as an iterator over a list in it, depends on that.
        """
        with_code = {memo.circles.get(id(node)) for node in self._opaque}
        for node in depth_first(root, _leads_before):
            circle = memo.circles.get(id(node))
            if node.done:
                continue
            if isinstance(node, GivenNode):
                self._give(node)
            elif circle is not None and memo.entries.setdefault(circle, node) is node and circle in with_code:
                built_now(node, memo)

    def _leads(self, node: Node) -> list[Node]:
        """Return the nodes that a node leads to."""
        within = map(self._nodes.find, self._reach.get(id(node), ()))
        return [child for _, child in node.nested] + [child for child in within if child not in (None, node)]

    def _give(self, node: GivenNode) -> None:
        """Let an object copy itself.

        It may compute with the copies of tensors, so they have their values.
        """
        memo, early = self._memo, self._early
        assert memo is not None and early is not None  # noqa: S101, PT018 - made before the first is copied
        source = node.source
        node.active = True
        try:
            result = source.__deepcopy__(memo)
        except Refusal as refusal:
            raise refusal.at(node.own_path()) from None
        except Exception as error:
            raise failed(node, error) from error
        finally:
            node.active = False
        memory = {_memory_of(tensor) for tensor in self._within.get(id(node), ())}
        for tensor in tensors_within(result):
            if not early.made(tensor) and (_memory_of(tensor) in memory or tensor.device.type != "cpu"):
                raise UnsupportedLeafError(
                    f"the __deepcopy__ of {type(source).__qualname__} returned a tensor that is not a copy in host "
                    f"memory ({tensor.dtype} {tuple(tensor.shape)} on {tensor.device}).",
                    path=format_path(node.own_path()),
                    remedy="In a class of your own, copy tensors with copy.deepcopy(tensor, memo). Of another's class, "
                    "stage what the object is made of, such as its to_dict(). passthrough leaves the object as it is.",
                )
        node.copy, node.done = result, True
        memo[id(source)] = result


def _leads_before(node: Node) -> list[Node]:
    """Return the nodes that a node leads to, unless it has its copy: then they were dealt with."""
    return [] if node.done else [child for _, child in node.nested]


_SAFE = frozenset((_private.new_object, deque, defaultdict, OrderedDict, Counter))
"""What makes an object without looking at what it is given."""


def _emptying(node: Node) -> Generator[None, None, None]:
    """Let go of the larger part of what a large node holds, yielding between small steps."""
    # No path leads through an object without children, so its keys are not needed.
    keys = node.keys if isinstance(node, DictNode) and not (node.nested or node.leaves) else ()
    # In parts, since the nodes below may have their last references here.
    while len(node.nested) > _CHILDREN_PER_STEP:
        del node.nested[-_CHILDREN_PER_STEP:]
        yield
    for held in (node.children, keys):
        while isinstance(held, list) and len(held) > _READS_PER_STEP:
            del held[-_READS_PER_STEP:]
            yield


def _read_items(source: dict[Any, Any], keys: list[Any], values: list[Any]) -> Generator[None, None, bool]:
    """Note the keys and values of a mapping as they are at one moment, yielding between parts of a large one.

    Returns:
        Whether all keys are atoms.
    """
    if len(source) <= _READS_PER_STEP:
        keys += source
        values += source.values()
        return set(map(type, keys)) <= ATOMIC
    _private.untrack_all((keys, values))
    key_iterator, value_iterator = iter(source), iter(source.values())
    atomic = True
    try:
        while part := list(islice(key_iterator, _READS_PER_STEP)):
            keys += part
            values += islice(value_iterator, _READS_PER_STEP)
            atomic = atomic and set(map(type, part)) <= ATOMIC
            yield
    except RuntimeError:
        # It changed size meanwhile: record it again, in one step.
        keys[:], values[:] = source.keys(), source.values()
        return set(map(type, keys)) <= ATOMIC
    return atomic


def _read_iterable(source: set[Any] | frozenset[Any] | deque[Any]) -> Generator[None, None, list[Any]]:
    """Return what is in a container as it is at one moment, yielding between parts of a large one."""
    if len(source) <= _READS_PER_STEP:
        return list(source)
    items: list[Any] = []
    _private.untrack_all((items,))
    iterator = iter(source)
    try:
        while part := list(islice(iterator, _READS_PER_STEP)):
            items += part
            yield
    except RuntimeError:
        # It changed meanwhile: record it again, in one step.
        items[:] = source
    return items


def _all_atomic(values: Sequence[Any]) -> Generator[None, None, bool]:
    """Return whether all of some values are atoms, yielding between parts of many."""
    for start in range(0, len(values), _READS_PER_STEP):
        if start:
            yield
        if not set(map(type, values[start : start + _READS_PER_STEP])) <= ATOMIC:
            return False
    return True


def _parent(node: Node) -> Node:
    assert node.parent is not None  # noqa: S101 - only the root has none, and it is never asked
    return node.parent


def _copies_itself(tensor: torch.Tensor, kind: type) -> bool:
    """Return whether a tensor in host memory is of a class with a __deepcopy__ that is not PyTorch's."""
    if kind in PLAIN_CLASSES:
        return False
    own = getattr(kind, "__deepcopy__", None)
    return not str(getattr(own, "__module__", "")).startswith("torch") and not _private.is_wrapper(tensor)


def _memory_of(tensor: torch.Tensor) -> object:
    """Return what two tensors have in common exactly when they share a storage."""
    with _private.without_torch_function():
        if _private.has_storage(tensor):
            return _private.storage_identity(tensor.untyped_storage())
    return id(tensor)


def failed(node: Node, error: Exception) -> Exception:
    """Return the error to raise for one that the code of an object has raised."""
    if isinstance(error, UnsupportedLeafError):
        return error
    return UnsupportedLeafError(
        f"{type(node.source).__qualname__} cannot be copied: {type(error).__name__}: {str(error)[:400]}.",
        path=format_path(node.own_path()),
        remedy="Give it a __deepcopy__ or __reduce__, or leave it out with passthrough.",
    )
