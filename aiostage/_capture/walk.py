"""The walk over a state dict: everything is noted when it is met, and what cannot be compared later is copied last.

The walk keeps its own stack, so that nesting is bounded by memory and not by the recursion limit, and yields between
small steps, so that an event loop can interrupt it. It only notes; :mod:`aiostage._capture.build` makes the copy.
"""

from __future__ import annotations

import enum
import types
from bisect import bisect_left, bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Generator
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from aiostage import _private
from aiostage._capture.attributes import note_attributes, read_attributes
from aiostage._capture.build import build
from aiostage._capture.early import SelfCopies
from aiostage._capture.faithful import PLAIN_CLASSES, Inspection, Refusal, copies_itself
from aiostage._capture.leaves import LEAVES_PER_STEP, Leaves, Replaced, Table
from aiostage._capture.nodes import (
    HIDDEN,
    READS_PER_STEP,
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
    emptying,
    parent_of,
)
from aiostage._capture.protocol import (
    ATOMIC,
    BUFFERS,
    all_atomic,
    failed,
    is_comparable,
    is_layout,
    read_iterable,
    reduce_object,
)
from aiostage._capture.versions import ContainerChanges, copy_buffer, nbytes_of, read_items
from aiostage._loop.coroutines import exhausted
from aiostage.errors import TornSnapshotError
from aiostage.leaf import Attribute, Path, format_path

__all__ = ["Walk"]

_CHILDREN_PER_STEP = LEAVES_PER_STEP
"""Children looked at between two yields."""

_ATTRIBUTED_AT_ONCE = 64
"""Tensors with attributes looked at between two yields, at some microseconds each."""

_SUBCLASS_COST = 16
"""A tensor of another class counts as so many with attributes. To find out what a DTensor is made of takes 45 us."""

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
        # By identity of the source. An identity stays its object's own because each node refers to its source, and all
        # nodes are in _all until the walk is released.
        self._nodes: Table[Node] = Table(dict)
        # Nodes with leaves, in the order of their first leaf: where a leaf comes from is found by bisection, and no
        # leaf has to keep its path.
        self._origins: list[Node] = []
        # What the node that is read now has led to. It goes to the stack as one list, reversed, so that the first is
        # taken first.
        self._fresh: list[Node] = []
        self._stack: list[list[Node]] = []
        self._all: list[Node] = []
        self._reduced_last: list[ObjectNode] = []
        self._buffers: list[GivenNode] = []
        self._opaque: list[GivenNode] = []
        self._self_copies: SelfCopies | None = None
        self._bytes_left = _BYTES_LAST

    def run(self, state_dict: object, inspection: Inspection | None = None) -> Generator[None, None, None]:
        """Note the tree, yielding between small steps.

        Args:
            state_dict: The tree.
            inspection: By which to recognize tensors in the step in which they are noted.

        Raises:
            UnsupportedLeafError: If something in the tree cannot be copied.
        """
        # A list around the tree, so that the tree itself is the child of something, a tensor too.
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
            # Gradients and parts are leaves that the tree does not lead to. They may have attributes, those lead to
            # tensors, and these have gradients: until none is found.
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
        root = self._root
        if root is None or not (self._opaque or self._reduced_last or self._buffers):
            return
        copies = self._self_copies = SelfCopies(self.leaves, self._nodes)
        failure: Exception | None = None
        if self._opaque or self._reduced_last:
            yield from self.leaves.index()
            yield from copies.order(root, self._reduced_last)
            failure = self._before_code() if self._before_code is not None else None
        reduced_first = self._reduced_last
        while True:
            reduced, self._reduced_last = self._reduced_last, []
            # Each reads the object and what it leads to without giving way: what has no version is read at the one
            # moment M at which all of it is copied.
            for node in reduced:
                self.calls_out |= exhausted(reduce_object(node, self.changes))
                self._stack.append([node])
                exhausted(self._note())
            unknown = [given for given in self._opaque if not copies.has_looked_into(given)]
            for given in unknown:
                self._note_inside(given, copies.look_into(given))
                exhausted(self._note())
            if not (reduced or unknown):
                break
            exhausted(self.inspect(inspection))
        if self._opaque:
            copies.order_within(reduced_first)
        # Kept until here: code of objects may not follow the caller's stream, which matters only if it can meet a
        # tensor on a device.
        if failure is not None and not all(tensor.is_cpu for tensor in self.leaves.tensors):
            raise failure
        if not self._only_leaves:
            # The moment. Nothing has yielded since index() above, and nothing does until the one yield below.
            for given in self._buffers:
                given.copy, given.done = exhausted(copy_buffer(given.source)), True
            if self._opaque:
                copies.make(self._opaque, root)
        yield
        # After the moment: the copies are private by now, so looking into them may take its time.
        if copies.memo is not None:
            yield from copies.check(self._opaque)
            yield from copies.replace(root, self._buffers)
            yield from copies.tie()

    def rebuild(self, staged: list[Any]) -> Generator[None, None, Any]:
        """Build the staged tree around the staged leaves, and return it, yielding between small steps."""
        root = self._root
        assert root is not None  # noqa: S101 - nothing is built before the walk
        memo = self._self_copies.memo if self._self_copies is not None else None
        yield from build(root, lambda start, stop: staged[start:stop], memo)
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
            return parent_of(node), node.slot
        return node, node.leaves[leaf - node.first_leaf]

    def releasing(self) -> Generator[None, None, None]:
        """Do the larger part of :meth:`release`, yielding between small steps."""
        if self._self_copies is not None:
            self._self_copies.release()
            self._self_copies = None
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
                yield from emptying(node)
                node.release()
            del every[-(_CHILDREN_PER_STEP // _NODE_COST) :]
            yield

    def release(self) -> None:
        """Drop the source and the copy; only paths can be asked for from now on."""
        self.leaves.release()
        for held in (self._fresh, self._stack, self._reduced_last, self._buffers, self._opaque):
            held.clear()
        exhausted(self.releasing())

    # Noting

    def _note(self) -> Generator[None, None, None]:
        """Open what was met and not opened yet, depth first."""
        stack, known, cost, since = self._stack, self._inspection, 0, len(self.leaves.tensors)
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
                # A part that is smaller than a step counts as one, so that what it cost is never taken for less.
                cost += _CHILDREN_PER_STEP if start - before < _CHILDREN_PER_STEP else start - before
                while known is not None and self.leaves.inspect_some(known, since, only_known=self.at_call):
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
        if self._passthrough is None and kinds <= PLAIN_CLASSES and not _private.have_attributes(children):
            self.leaves.append(children)
            node.note_leaves(range(start, start + len(children)))
            return start + len(children)
        tensors: list[torch.Tensor] = []
        slots: list[int] = []
        attributed = 0
        for slot, child in enumerate(children, start):
            kind = type(child)
            if kind in ATOMIC:
                continue
            # Met before, by another path: both lead to one node, and so to one copy. Plain tensors are told apart at
            # their inspection instead, where it costs less.
            met = self._nodes.find(id(child))
            if met is not None:
                node.nested.append((slot, met))
            elif self._passthrough is not None and self._passthrough(node.path(slot), child):
                continue
            elif issubclass(kind, torch.Tensor) and not copies_itself(child, kind):
                tensors.append(child)
                slots.append(slot)
                if kind not in PLAIN_CLASSES or _private.have_attributes((child,)):
                    index = len(self.leaves.tensors) + len(tensors) - 1
                    self._attributes(child, index, node, slot)
                    attributed += 1 if kind in PLAIN_CLASSES else _SUBCLASS_COST
                    # The rest of the children come in the next step; _note() counts this one as full.
                    if attributed >= _ATTRIBUTED_AT_ONCE:
                        break
            else:
                self._meet(child, kind, node, slot)
        if tensors:
            self.leaves.append(tensors)
            node.note_leaves(slots)
        return slot + 1

    def _attributes(self, tensor: torch.Tensor, index: int, node: Node, slot: int) -> None:
        """Note what hangs on a tensor."""
        made = note_attributes(tensor, index, node, slot, self.leaves, self.changes)
        if made is not None:
            self._add(made, node, slot)

    def _note_owned(self, start: int) -> Generator[None, None, None]:
        """Note what hangs on the gradients and parts from an index on, which are children of no node."""
        leaves = self.leaves
        attributed = 0
        for count, index in enumerate(leaves.owned[bisect_left(leaves.owned, start) :], 1):
            tensor = leaves.tensors[index]
            if type(tensor) not in PLAIN_CLASSES or _private.have_attributes((tensor,)):
                self._note_beside(index, tensor)
                attributed += 1 if type(tensor) in PLAIN_CLASSES else _SUBCLASS_COST
            if attributed >= _ATTRIBUTED_AT_ONCE or count % _ATTRIBUTED_AT_ONCE == 0:
                attributed = 0
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
            # A further child of the root, hidden from paths: it is built with the tree and is no part of it.
            root.nested.append((len(root.children), holder))
            root.children.append(tensor)
            root.steps = (*root.steps, HIDDEN)
            self._all.append(holder)

    def _add(self, made: Node, node: Node, slot: int, *, last: bool = False) -> None:
        """Add what is copied by way of its children, which are noted next; or in the last step, without that."""
        self._nodes.put(id(made.source), made)
        self._all.append(made)
        node.nested.append((slot, made))
        if not last:
            self._fresh.append(made)

    def _meet(self, child: Any, kind: type, node: Node, slot: int) -> None:
        """Note that a child is to be copied; it is opened later."""
        made: Node
        last = False
        if kind is dict or kind is OrderedDict:
            made = DictNode(child, node, slot)
        elif kind is defaultdict and type(child.default_factory) in ATOMIC:
            made = DictNode(child, node, slot)
            self.changes.add_slots(child, {"default_factory": child.default_factory}, node, slot)
        elif kind is list:
            made = ListNode(child, node, slot)
        elif (
            node.parent is not None
            and type(node.parent.source).__module__ == _private.DTENSOR_SPECS
            and self._keep(child, node, slot)
        ):
            return
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
            # Small ones are copied in the last step, which needs no comparison; the first that are met have that room.
            last = size <= self._bytes_left
            if last:
                self._bytes_left -= size
                self._buffers.append(made)
        # Asked of the instance, as copy.deepcopy does.
        elif getattr(child, "__deepcopy__", None) is not None:
            made = GivenNode(child, node, slot)
            # Its code may look at the values of tensors, but has its own copies of them.
            last = True
            self._opaque.append(made)
        else:
            made = ObjectNode(child, node, slot)
            made.failed = failed
            # Its state comes from code that may answer otherwise each time, so no later comparison could tell. It is
            # reduced in the last step instead.
            last = not is_comparable(kind)
            if last:
                self._reduced_last.append(made)
        self._add(made, node, slot, last=last)

    def _keep(self, child: Any, node: Node, slot: int) -> bool:
        """Pass a part of a DTensor's layout through; return whether something is one."""
        parts = child if type(child) is tuple else ()
        # What has a copy already has it everywhere.
        if any(self._nodes.find(id(part)) is not None for part in parts) or not is_layout(child):
            return False
        # Noted with itself as the copy, for whatever else leads to it or to what is in it.
        for item in (child, *parts):
            kept = ObjectNode(item, node, slot)
            kept.copy, kept.done = item, True
            self._nodes.put(id(item), kept)
        return True

    def _read(self, node: Node) -> Generator[None, None, None]:
        """Note what a node holds, yielding between parts of a large one."""
        source = node.source
        if isinstance(node, DictNode):
            yield from self._read_mapping(node)
        elif isinstance(node, ListNode):
            if len(source) <= READS_PER_STEP:
                node.children = list(source)
            else:
                _private.untrack_all((node.children,))
                while part := source[len(node.children) : len(node.children) + READS_PER_STEP]:
                    node.children += part
                    yield
            node.steps = range(len(node.children))
            self.changes.add_sequence(source, node.children, parent_of(node), node.slot)
        # Tuples cannot change, so nothing is noted for a comparison; nor of frozensets and methods below.
        elif isinstance(node, TupleNode):
            node.children = source
            inside = parent_of(node).steps[node.slot] is STATE and len(source) == 2
            node.steps = (STATE, STATE) if inside else range(len(source))
        elif isinstance(node, SetNode):
            node.children = yield from read_iterable(source)
            node.steps = (HIDDEN,) * len(node.children)
            if type(source) is set:
                self.changes.add_set(source, node.children, parent_of(node), node.slot)
            # Putting a member into a set calls its __hash__ and __eq__.
            if not (yield from all_atomic(node.children)):
                self.calls_out = True
        elif isinstance(node, MethodNode):
            node.children, node.steps = [source.__self__], (Attribute("__self__"),)
        elif isinstance(node, AttributesNode) and not node.steps:
            yield from read_attributes(node, self.changes)
        elif isinstance(node, ObjectNode) and not node.steps:
            self.calls_out |= yield from reduce_object(node, self.changes)

    def _read_mapping(self, node: DictNode) -> Generator[None, None, None]:
        source, keys, values = node.source, node.keys, node.children
        parent, slot = parent_of(node), node.slot
        atomic = (yield from read_items(source, keys, values)) <= ATOMIC
        node.steps = keys
        # The __dict__ of an object, which the path leads through by attribute names.
        if parent.steps[slot] is STATE:
            node.steps = AttributeSteps(keys)
            cls = type(parent.source)
            cached = _private.KEPT_HASHES.get((cls.__module__, cls.__name__))
            if cached is None:
                self.changes.add_attributes(source, keys, values, parent, slot)
            else:
                noted = {name: value for name, value in zip(keys, values, strict=True) if name != cached}
                self.changes.add_names(source, [*noted], lambda name: name == cached, parent, slot)
                self.changes.add_slots(parent.source, noted, parent, slot)
        else:
            self.changes.add_mapping(source, keys, values, parent, slot)
        if not atomic:
            self.calls_out = node.interleaved = True
            pairs = zip(values, keys, strict=True) if type(source) is dict else zip(keys, values, strict=True)
            node.children = [part for pair in pairs for part in pair]
            node.steps = [step for step in node.steps for _ in range(2)]
            node.keys = []
        if type(source) is OrderedDict and vars(source):
            # Module.state_dict() hangs _metadata there.
            node.attributed = True
            node.children = [vars(source), *node.children]
            node.steps = [STATE, *node.steps]
        # It has none now. One that is hung on it before capture changes the tree all the same.
        elif type(source) is OrderedDict:
            self.changes.add_attributes(vars(source), [], [], parent, slot)

    def _copy_buffer(self, node: GivenNode) -> Generator[None, None, None]:
        """Copy memory in pieces, to be compared with it at capture."""
        copy = yield from copy_buffer(node.source)
        node.copy, node.done = copy, True
        self.changes.add_buffer(node.source, copy, parent_of(node), node.slot)

    # The last step

    def _note_inside(self, node: GivenNode, new: list[torch.Tensor]) -> None:
        """Note tensors that were found inside an object that copies itself, so that its code gets their copies."""
        if not new:
            return
        node.first_leaf = len(self.leaves.tensors)
        self.leaves.append(new)
        # Their path is that of the object, because the walk cannot name what only the object's code leads to.
        node.leaves = range(len(new))
        self._origins.append(node)
        for index, tensor in enumerate(new, node.first_leaf):
            if type(tensor) not in PLAIN_CLASSES or _private.have_attributes((tensor,)):
                nested = len(parent_of(node).nested)
                self._attributes(tensor, index, parent_of(node), node.slot)
                # It is reached through the object's own code, and no child of what the object is in.
                del parent_of(node).nested[nested:]
        self._push_fresh()
