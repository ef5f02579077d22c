"""What a walk notes of a tree: one node for each object that has to be copied, and what each holds."""

from __future__ import annotations

import types
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from itertools import repeat
from operator import is_
from typing import Any

from aiostage.leaf import Attribute, Path

__all__ = [
    "HIDDEN",
    "MISSING",
    "READS_PER_STEP",
    "STATE",
    "AttributeSteps",
    "AttributesNode",
    "DictNode",
    "GivenNode",
    "ListNode",
    "MethodNode",
    "Node",
    "ObjectNode",
    "SetNode",
    "TupleNode",
    "emptying",
    "parent_of",
]


class _Inside:
    """A step of a path that does not show."""

    __slots__ = ()


STATE = _Inside()
"""Leads to an object's state, whose keys are the object's attributes."""

HIDDEN = _Inside()
"""Leads to what only Python's copy protocol has a name for."""

MISSING: Any = _Inside()
"""Stands for a copy that is not made yet."""

Fetch = Callable[[int, int], list[Any]]
"""Returns the copies of the leaves with consecutive indices."""


READS_PER_STEP = 4096
"""Children read from a container between two yields: a tenth of a millisecond where they are not in the caches."""

_NESTED_PER_STEP = 256
"""Nodes dropped between two yields."""


class AttributeSteps(Sequence[object]):
    """The steps that lead to what hangs on an object, made of its keys when a path is asked for.

    Args:
        keys: Names of attributes, as a rule; what is not text stays what it is.
    """

    __slots__ = ("_keys",)

    def __init__(self, keys: Sequence[Any]) -> None:
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, slot: Any) -> Any:
        key = self._keys[slot]
        return Attribute(key) if type(key) is str else key


class Node:
    """One object that has to be copied: what it held when the walk met it, and its copy once that is made.

    Attributes:
        source: The object, kept alive, so that no other comes by its identity.
        parent: Where it was met first; None for the root.
        slot: Where in the parent.
        steps: What leads to each child.
        children: What it held.
        first_leaf: The index of the first tensor among the children; the others' follow.
        leaves: The slots of the tensors, in order.
        nested: The slots and nodes of what else among the children has to be copied, in order.
        copy: The copy. A container has it before it is filled, so that cycles lead to it.
        done: Whether the copy is complete.
        active: Whether it is being built, which it then is by one builder.
        filled: How many children the copy has.
        position: How many of the nested have been built.
        entered_again: Whether a cycle has led back to it before it had a copy.
    """

    __slots__ = (
        "active",
        "children",
        "copy",
        "done",
        "entered_again",
        "filled",
        "first_leaf",
        "leaves",
        "nested",
        "parent",
        "position",
        "slot",
        "source",
        "steps",
    )

    def __init__(self, source: Any, parent: Node | None, slot: int) -> None:
        self.source = source
        self.parent = parent
        self.slot = slot
        self.steps: Sequence[object] = ()
        self.children: list[Any] = []
        self.first_leaf = 0
        self.leaves: Sequence[int] = ()
        self.nested: list[tuple[int, Node]] = []
        self.copy: Any = MISSING
        self.done = self.active = self.entered_again = False
        self.filled = self.position = 0

    def again(self) -> Node:
        """Return a node for the same object that is built from the beginning."""
        other = type(self)(self.source, self.parent, self.slot)
        for name in ("steps", "children", "first_leaf", "leaves", "nested"):
            setattr(other, name, getattr(self, name))
        return other

    def path(self, slot: int) -> Path:
        """Return the path of a child."""
        steps: list[object] = []
        node: Node | None = self
        while node is not None:
            # Only steps and slots are read, so that paths can be asked for after release().
            step = node.steps[slot]
            if not isinstance(step, _Inside):
                steps.append(step)
            slot, node = node.slot, node.parent
        return tuple(reversed(steps))

    def own_path(self) -> Path:
        """Return the path of the object itself."""
        return self.parent.path(self.slot) if self.parent is not None else ()

    def note_leaves(self, slots: Sequence[int]) -> None:
        """Note where leaves are; ranges that follow each other stay a range."""
        before = self.leaves
        if not before:
            self.leaves = slots
        elif isinstance(before, range) and isinstance(slots, range) and before.stop == slots.start:
            self.leaves = range(before.start, slots.stop)
        elif isinstance(before, list):
            before += slots
        else:
            self.leaves = [*before, *slots]

    def part(self, start: int, stop: int, fetch: Fetch) -> list[Any]:
        """Return the copies of some children; the nested ones among them have theirs."""
        leaves, first = self.leaves, self.first_leaf
        if isinstance(leaves, range):
            low, high = max(start, leaves.start), min(stop, leaves.stop)
            if high - low == stop - start:
                copies = fetch(first + low - leaves.start, first + high - leaves.start)
            else:
                copies = list(self.children[start:stop])
                if low < high:
                    begin = first - leaves.start
                    copies[low - start : high - start] = fetch(begin + low, begin + high)
        else:
            copies = list(self.children[start:stop])
            begin, end = bisect_left(leaves, start), bisect_left(leaves, stop)
            if begin < end:
                for slot, copy in zip(leaves[begin:end], fetch(first + begin, first + end), strict=True):
                    copies[slot - start] = copy
        number = self.position
        # From the back: what lies before start was taken by earlier calls.
        while number and self.nested[number - 1][0] >= start:
            number -= 1
            slot, node = self.nested[number]
            if slot < stop:
                copies[slot - start] = node.copy
        return copies

    def release(self) -> None:
        """Keep what paths need, and nothing that leads to the source or the copy, or around in a circle."""
        self.source = None
        self.copy = MISSING
        self.children = []
        self.nested = []

    def begin(self, fetch: Fetch) -> None:
        """Make the copy if it can be made before the children are copied."""

    def put(self, start: int, copies: list[Any]) -> None:
        """Take the copies of children, in order."""
        raise NotImplementedError

    def takes_contents(self, slot: int) -> bool:
        """Return whether what is put for a child is what its copy contains by then, and not the copy itself."""
        return False

    def finish(self) -> None:
        """Complete the copy, once all children have been put."""


def parent_of(node: Node) -> Node:
    """Return where a node was met; the root, which was met nowhere, is not asked."""
    assert node.parent is not None  # noqa: S101 - only the root has none
    return node.parent


class ListNode(Node):
    """A list; also the root, as the only item of one."""

    __slots__ = ()

    def begin(self, fetch: Fetch) -> None:
        self.copy = []

    def put(self, start: int, copies: list[Any]) -> None:
        self.copy += copies


class DictNode(Node):
    """A dict or OrderedDict, or a defaultdict whose factory is an atom.

    Keys that are atoms stay what they are; if some are not, the children are values and keys in turn. The children are
    in the order in which :func:`copy.deepcopy` copies them: of a dict the value comes before its key, of its subclasses
    the key before the value, and what hangs on an OrderedDict before all of them.
    """

    __slots__ = ("attributed", "interleaved", "keys")

    def __init__(self, source: Any, parent: Node | None, slot: int) -> None:
        super().__init__(source, parent, slot)
        self.keys: list[Any] = []
        self.interleaved = False
        self.attributed = False

    def again(self) -> Node:
        raise AssertionError("a dict has its copy before its children")

    def begin(self, fetch: Fetch) -> None:
        cls = type(self.source)
        self.copy = defaultdict(self.source.default_factory) if cls is defaultdict else cls()

    def put(self, start: int, copies: list[Any]) -> None:
        if self.attributed:
            if start == 0:
                vars(self.copy).update(copies.pop(0))
            else:
                start -= 1
        # keys holds the first of a pair until the second is copied too.
        if self.interleaved:
            key_first = type(self.source) is not dict
            for slot, copy in enumerate(copies, start):
                if slot % 2 == 0:
                    self.keys.append(copy)
                elif key_first:
                    self.copy[self.keys.pop()] = copy
                else:
                    self.copy[copy] = self.keys.pop()
        else:
            self.copy.update(zip(self.keys[start : start + len(copies)], copies, strict=True))

    def takes_contents(self, slot: int) -> bool:
        return self.attributed and slot == 0

    def release(self) -> None:
        super().release()
        self.keys = []


def emptying(node: Node) -> Generator[None, None, None]:
    """Drop the larger part of what a large node holds, yielding between small steps."""
    # No path leads through an object without children, so its keys are not needed.
    keys = node.keys if isinstance(node, DictNode) and not (node.nested or node.leaves) else ()
    # In parts, since the nodes below may have their last references here.
    while len(node.nested) > _NESTED_PER_STEP:
        del node.nested[-_NESTED_PER_STEP:]
        yield
    for held in (node.children, keys):
        while isinstance(held, list) and len(held) > READS_PER_STEP:
            del held[-READS_PER_STEP:]
            yield


class _Collected(Node):
    """Something that is made of the copies of all its children."""

    __slots__ = ("copies",)

    def begin(self, fetch: Fetch) -> None:
        self.copies: list[Any] = []

    def put(self, start: int, copies: list[Any]) -> None:
        self.copies += copies

    def finish(self) -> None:
        # A cycle may have led back here and made it already.
        if self.copy is MISSING:
            self.copy = self.made()
        self.copies = []

    def made(self) -> Any:
        """Return the copy."""
        raise NotImplementedError

    def release(self) -> None:
        super().release()
        self.copies = []


class TupleNode(_Collected):
    """A tuple. One whose children are all themselves again is kept, as :func:`copy.deepcopy` does."""

    __slots__ = ()

    def made(self) -> Any:
        # Without looking at each where nothing in it had to be copied.
        if not (self.nested or self.leaves) or all(map(is_, self.copies, self.children)):
            return self.source
        return tuple(self.copies)


class SetNode(_Collected):
    """A set or frozenset. A set of atoms is filled in steps, because their hashes run no code of the user.

    A frozenset of atoms is kept: it never changes, and making one of a million takes 45 ms in one call.
    """

    __slots__ = ()

    def put(self, start: int, copies: list[Any]) -> None:
        if self.nested or self.leaves:
            super().put(start, copies)
        # Members that need no copy have hashes without code of the user, so the set may be there before it is complete.
        elif type(self.source) is set:
            if self.copy is MISSING:
                self.copy = set()
            self.copy.update(copies)

    def made(self) -> Any:
        if type(self.source) is frozenset and not (self.nested or self.leaves):
            return self.source
        return type(self.source)(self.copies)


class MethodNode(_Collected):
    """A bound method: the same function, bound to the copy of its object."""

    __slots__ = ()

    def made(self) -> Any:
        return types.MethodType(self.source.__func__, self.copies[0])


class AttributesNode(Node):
    """A tensor with attributes of its own.

    Attributes:
        leaf: The tensor's index.
        names: The names of the attributes; the children are their values.
        kept: Attributes that are put onto the copy as they are.
        slots: The names of those that its class keeps in slots. The others go into the copy's dictionary, as
            :func:`copy.deepcopy` puts them there: no code of the class sees them.
    """

    __slots__ = ("kept", "leaf", "names", "slots")

    def __init__(self, source: Any, parent: Node | None, slot: int) -> None:
        super().__init__(source, parent, slot)
        self.leaf = -1
        self.names: list[str] = []
        self.kept: dict[str, Any] = {}
        self.slots: frozenset[str] = frozenset()

    def begin(self, fetch: Fetch) -> None:
        # The staged leaf is the copy. Its attributes are put on when it is built with the tree.
        (self.copy,) = fetch(self.leaf, self.leaf + 1)
        self._set(self.kept.items())

    def put(self, start: int, copies: list[Any]) -> None:
        self._set(zip(self.names[start : start + len(copies)], copies, strict=True))

    def _set(self, attributes: Iterable[tuple[str, Any]]) -> None:
        if not self.slots:
            vars(self.copy).update(attributes)
            return
        for name, value in attributes:
            if name in self.slots:
                setattr(self.copy, name, value)
            else:
                vars(self.copy)[name] = value

    def release(self) -> None:
        super().release()
        self.kept = {}


class GivenNode(Node):
    """Something whose copy is made by itself, in one step: what no comparison can tell to have changed."""

    __slots__ = ()


class ObjectNode(Node):
    """An object that is copied through what it reduces to: a function, its arguments, state, items and pairs.

    Attributes:
        function: Makes the object of its arguments.
        counts: How many arguments, states, items and pairs there are among the children, in that order.
        failed: Returns the error to raise for one that the object's code has raised.
    """

    __slots__ = ("arguments", "counts", "failed", "function", "key")

    def __init__(self, source: Any, parent: Node | None, slot: int) -> None:
        super().__init__(source, parent, slot)
        self.function: Any = None
        self.counts = (0, 0, 0, 0)
        self.arguments: list[Any] = []
        self.key: Any = MISSING
        self.failed: Callable[[Node, Exception], Exception] | None = None

    def again(self) -> Node:
        other = super().again()
        assert isinstance(other, ObjectNode)  # noqa: S101 - what again() makes is of the class of self
        other.function, other.counts, other.failed = self.function, self.counts, self.failed
        return other

    def set_reduced(
        self,
        function: Any,
        arguments: Sequence[Any],
        state: Any,
        items: Sequence[Any],
        pairs: Sequence[tuple[Any, Any]],
    ) -> None:
        """Take over what the object reduces to."""
        self.function = function
        self.counts = (len(arguments), int(state is not None), len(items), len(pairs))
        # A list of many items, say: no second list of as many, and steps that are a range.
        if items and not (arguments or state is not None or pairs):
            self.children, self.steps = list(items), range(len(items))
            return
        flat = [part for pair in pairs for part in pair]
        keys = [key for key, _ in pairs for _ in range(2)]
        self.children = [*arguments, *([state] if state is not None else ()), *items, *flat]
        states = [STATE] * self.counts[1]
        self.steps = [*repeat(HIDDEN, len(arguments)), *states, *range(len(items)), *keys]

    def begin(self, fetch: Fetch) -> None:
        if not self.counts[0]:
            self._make()

    def put(self, start: int, copies: list[Any]) -> None:
        arguments, states, items, _ = self.counts
        try:
            for slot, copy in enumerate(copies, start):
                if slot < arguments:
                    self.arguments.append(copy)
                    if slot == arguments - 1:
                        self._make()
                elif slot < arguments + states:
                    _set_state(self.copy, copy)
                elif slot < arguments + states + items:
                    self.copy.append(copy)
                elif (slot - arguments - states - items) % 2 == 0:
                    self.key = copy
                else:
                    self.copy[self.key] = copy
        except Exception as error:
            if self.failed is None:
                raise
            raise self.failed(self, error) from error

    def takes_contents(self, slot: int) -> bool:
        return 0 <= slot - self.counts[0] < self.counts[1]

    def _make(self) -> None:
        if self.copy is MISSING:
            # Once. A cycle may have led back here, and made it from what there was.
            self.copy = self.function(*self.arguments)
        self.arguments = []

    def release(self) -> None:
        super().release()
        self.function = self.failed = None
        self.arguments = []
        self.key = MISSING


def _set_state(target: Any, state: Any) -> None:
    if hasattr(target, "__setstate__"):
        target.__setstate__(state)
        return
    slots = None
    if isinstance(state, tuple) and len(state) == 2:
        state, slots = state
    if state is not None:
        target.__dict__.update(state)
    for name, value in (slots or {}).items():
        setattr(target, name, value)
