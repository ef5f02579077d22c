"""What the code of objects that copy themselves puts into memo, and what of it the rest of the tree gets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from heapq import merge
from itertools import chain, count, repeat
from operator import is_, itemgetter
from typing import Any

import torch

from aiostage._capture.faithful import Refusal
from aiostage._capture.leaves import LEAVES_PER_STEP, Leaves, Positions, Table
from aiostage._capture.nodes import MISSING, DictNode, Fetch, GivenNode, ListNode, Node, ObjectNode, TupleNode
from aiostage.errors import UnsupportedLeafError
from aiostage.leaf import format_path

__all__ = ["Memo", "ReplacedCopies", "StorageCopies"]


class Memo(dict[Any, Any]):
    """What ``memo`` is to :func:`copy.deepcopy`, for objects that copy themselves.

    An object that the walk has recorded is copied when it is requested, with its values, so that code which computes
    with copies sees what it would see under :func:`copy.deepcopy`. What such code puts in here is the copy from then
    on.

    Args:
        nodes: What was noted, by the identity of the source.
        fetch: Returns copies of leaves that have their values.
        leaf_of: Indices of noted tensors by their identity.
        storages: Copies of storages by the identity of the source, where PyTorch's code looks for them and puts them.
        give: Makes the copy of an object that copies itself.
        build_now: Builds an object that does not, at once.
        given: Copies of tensors that were made, by their indices.
        has_reached: Says whether copy.deepcopy would have come to a node before what copies itself now.

    Attributes:
        announced: Keys of containers and plain objects, and the copies that code has put in for them.
        defaulted: Keys whose copy was put in as a default, for what had none by then.
        touched: Keys of tensors and of objects that copy themselves that a copy was put in for.
        suspended: What was built only in part, because it contains an object that was copying itself.
        circles: The number of the circle that a node lies in, by its identity.
        entries: Where copying enters a circle, by its number, if that is before what copies itself now.
    """

    def __init__(
        self,
        nodes: Table[Node],
        fetch: Fetch,
        leaf_of: Positions,
        storages: dict[int, Any],
        give: Callable[[GivenNode], None],
        build_now: Callable[[Node, Memo], None],
        given: dict[int, torch.Tensor],
        has_reached: Callable[[Node], bool],
    ) -> None:
        super().__init__(torch=storages)
        self.has_reached = has_reached
        self.nodes = nodes
        self.fetch = fetch
        self.leaf_of = leaf_of
        self.give = give
        self.build_now = build_now
        self.given = given
        self.announced: list[tuple[int, Any]] = []
        self.defaulted: set[int] = set()
        self.touched: list[int] = []
        self.suspended: list[Node] = []
        self.circles: dict[int, int] = {}
        self.entries: dict[int, Node] = {}

    def get(self, key: Any, default: Any = None) -> Any:
        """Return the copy of what has an identity, made now if need be."""
        # Code of objects goes through this class, aiostage through dict's own methods: looking something up must not
        # build it.
        if dict.__contains__(self, key):
            return dict.__getitem__(self, key)
        node, leaf = self._met(key)
        if node is not None:
            if not node.done and not node.active:
                if isinstance(node, GivenNode):
                    self.give(node)
                else:
                    entry = self.entry_before(node)
                    if entry is not None:
                        self.build_now(entry, self)
                    if not node.done:
                        self.build_now(node, self)
            return default if node.copy is MISSING else node.copy
        return default if leaf is None else self.fetch(leaf, leaf + 1)[0]

    def _met(self, key: Any) -> tuple[Node | None, int | None]:
        """Return the node with an identity and the index of the leaf with it, None for either if there is none."""
        # Code of objects may ask for keys of its own, which are no identities.
        return (self.nodes.find(key), self.leaf_of.find(key)) if isinstance(key, int) else (None, None)

    def __setitem__(self, key: Any, copy: Any) -> None:
        if dict.get(self, key, MISSING) is not copy:
            node, leaf = self._met(key)
            # Of what copies itself and of tensors, the end of the code that is running tells which copy they have.
            if isinstance(node, GivenNode) or leaf is not None:
                self.touched.append(key)
            elif node is not None and node.copy is not copy:
                self.announced.append((key, copy))
        super().__setitem__(key, copy)

    # A dict's own of these know only what is in here by now.

    def update(self, *others: Any, **named: Any) -> None:
        """Put copies in, as one by one."""
        for key, copy in dict(*others, **named).items():
            self[key] = copy

    def __ior__(self, others: Any) -> Memo:  # type: ignore[misc]
        """Put copies in, as one by one."""
        self.update(others)
        return self

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """Return the copy of what has an identity, if it was made; else put one in."""
        if dict.__contains__(self, key):
            return dict.__getitem__(self, key)
        node, leaf = self._met(key)
        if leaf in self.given or (node is not None and node.copy is not MISSING):
            return self.get(key)
        self[key] = default
        self.defaulted.add(key)
        return default

    def pop(self, key: Any, *default: Any) -> Any:
        """Take something out that is no copy of what the walk has met."""
        self._check_removable(key)
        return super().pop(key, *default)

    def __delitem__(self, key: Any) -> None:
        self._check_removable(key)
        super().__delitem__(key)

    def _check_removable(self, key: Any) -> None:
        node, leaf = self._met(key)
        if leaf is not None or (node is not None and not node.active):
            raise Refusal(
                "its code takes the copy of another object out of memo, which would get a second one.",
                "In a __deepcopy__ of your own, leave in memo what is there.",
            )

    def noted(self, node: Node) -> Any:
        """Return the copy of a node that code has put in here."""
        return dict.get(self, id(node.source), MISSING)

    def entry_before(self, node: Node) -> Node | None:
        """Return what is to be built before a node: where copying enters its circle, if it has not yet done so."""
        entry = self.entries.get(self.circles.get(id(node), -1))
        return entry if entry is not None and entry.copy is MISSING and not entry.active else None

    def forget(self) -> None:
        """Drop all references; the memo may live on in objects that keep theirs."""
        self.clear()
        self.suspended.clear()
        self.announced.clear()
        self.defaulted.clear()
        self.touched.clear()
        self.circles, self.entries = {}, {}
        self.nodes, self.leaf_of, self.given = Table(dict), Positions(dict), {}
        self.fetch, self.give, self.has_reached = _nothing, _no_copy, _not_reached

    def __contains__(self, key: object) -> bool:
        """Return whether there is a copy, as copy.deepcopy would have it by now.

        Of a tensor there always is one: code that finds none makes its own, and makes it on a device. An array has been
        copied before.
        """
        if not isinstance(key, int):
            return False
        if not dict.__contains__(self, key):
            node, leaf = self._met(key)
            if node is not None and node.copy is MISSING and not node.active and leaf is None:
                if not self.has_reached(node):
                    return False
                # A question copies nothing: code of what is inside would run now, and before its turn.
                if _is_made_before_its_contents(node) and not isinstance(node, GivenNode):
                    return True
        return self.get(key, MISSING) is not MISSING

    def __getitem__(self, key: Any) -> Any:
        found = self.get(key, MISSING)
        if found is MISSING:
            raise KeyError(key)
        return found


def _nothing(start: int, stop: int) -> list[Any]:
    raise KeyError(start)


def _no_copy(node: GivenNode) -> None:
    raise KeyError(id(node.source))


def _not_reached(node: Node) -> bool:
    return False


def _is_made_before_its_contents(node: Node) -> bool:
    """Return whether copy.deepcopy puts the copy of an object into memo before it comes to what the object holds."""
    if isinstance(node, ObjectNode):
        return not node.nested or node.nested[0][0] >= node.counts[0]
    return isinstance(node, (DictNode, ListNode, GivenNode))


def _as_noted_in_memo(root: Node) -> Iterator[Node]:
    """Yield what is in a tree in the order in which copy.deepcopy puts its copies into memo.

    What is made of the copies of its contents, such as a tuple or a set, comes after these.
    """
    seen: set[int] = {id(root)}
    stack: list[tuple[Iterator[tuple[Node, int, Node | int]], Node | None]] = [(_children(root), None)]
    while stack:
        children, late = stack[-1]
        for _, _, child in children:
            if isinstance(child, Node) and id(child) not in seen:
                seen.add(id(child))
                early = _is_made_before_its_contents(child)
                if early:
                    yield child
                stack.append((_children(child), None if early else child))
                break
        else:
            stack.pop()
            if late is not None:
                yield late


class StorageCopies(dict[int, torch.UntypedStorage]):
    """Copies of storages by the identity of the source.

    The deepcopy of a storage, and of a tensor that the walk has not met, looks for the copy of the storage here and
    puts it here: it is PyTorch's part of the memo.
    """

    def __setitem__(self, identity: int, copy: torch.UntypedStorage) -> None:
        if copy.device.type != "cpu":
            raise Refusal(
                f"code of an object copies a storage of {copy.nbytes()} bytes on {copy.device}, which only that code "
                "leads to.",
                "Keep the tensors of that storage in attributes or containers of the object, or use passthrough for "
                "the object.",
            )
        # PyTorch's code puts it here while an object copies itself, so the Refusal comes out of that object's own
        # __deepcopy__, and gets its path there.
        super().__setitem__(identity, copy)


class ReplacedCopies:
    """The copies that the code of objects has put into memo in the place of those that the walk would give.

    Args:
        leaves: Of the walk.
        nodes: What the walk has noted, by the identity of the source.
    """

    def __init__(self, leaves: Leaves, nodes: Table[Node]) -> None:
        self._leaves = leaves
        self._nodes = nodes
        self._by_giver: dict[GivenNode, dict[int, Any]] = {}
        self._announced: list[tuple[int, Any]] = []
        self._turns: dict[int, int] = {}
        self._giver: Node | None = None
        self._order: Iterator[Node] = iter(())
        self._reached: set[int] = set()

    def begin(self, giver: GivenNode) -> None:
        """Take note that the code of an object begins, behind all others so far."""
        self._turns[id(giver)] = len(self._turns)
        self._giver = giver

    def follow(self, root: Node) -> None:
        """Take note of the tree in which :meth:`has_reached` is asked for nodes."""
        self._order = _as_noted_in_memo(root)

    def has_reached(self, node: Node) -> bool:
        """Return whether copy.deepcopy would have come to a node before the object whose code is running.

        Objects copy themselves in the order of copy.deepcopy, so this goes through the tree once, and only if code
        asks. If one does not, as in a circle, all counts as reached after it.
        """
        while id(self._giver) not in self._reached:
            child = next(self._order, None)
            if child is None:
                return True
            self._reached.add(id(child))
        return id(node) in self._reached

    def by(self, giver: GivenNode) -> Collection[Any]:
        """Return the copies that the code of an object has put in."""
        return self._by_giver.get(giver, {}).values()

    def clear(self) -> None:
        """Drop all references."""
        self._by_giver.clear()
        self._announced.clear()
        self._order, self._giver = iter(()), None

    def note(self, giver: GivenNode, memo: Memo) -> None:
        """Note which objects of the tree have another copy in the memo than the walk would give them."""
        for identity in memo.touched:
            node, copy = self._nodes.find(identity), dict.get(memo, identity, MISSING)
            own = node.copy if node is not None else self._leaves.given.get(self._leaves.index_of(identity))
            if copy is not MISSING and copy is not own:
                self._by_giver.setdefault(giver, {})[identity] = copy
        if memo.announced:
            self._by_giver.setdefault(giver, {}).update(memo.announced)
            self._announced += memo.announced
        memo.touched.clear()
        memo.announced.clear()

    def give(
        self, root: Node, buffers: Collection[Node], memo: Memo, early: Mapping[int, Any]
    ) -> Generator[None, None, None]:
        """Give what comes after the code of an object, in the order of copy.deepcopy, the copies that it put into memo.

        Yields between small steps.

        Args:
            root: Of the tree.
            buffers: Those that were copied because nothing tells of their changes, and not by code of their own.
            memo: What the code of objects has put in.
            early: What leaves have got of it already, by their indices.

        Raises:
            UnsupportedLeafError: If copy.deepcopy would give one object two copies, or a tensor something else.
        """
        leaves = self._leaves
        if not self._by_giver:
            return
        announced: dict[int, list[Any]] = {}
        for identity, copy in chain(self._announced, *(found.items() for found in self._by_giver.values())):
            announced.setdefault(identity, []).append(copy)
        now: dict[int, Any] = dict.fromkeys(announced, MISSING)
        wanted: dict[int, Any] = {}
        met: set[int] = set()
        latest = newest = -1
        in_pieces = {*leaves.gradients, *leaves.gradients.values(), *leaves.composites}
        for number, (node, slot, child) in enumerate(_in_order(root, now)):
            source = child.source if isinstance(child, Node) else leaves.tensors[child]
            copy = now.get(id(source), MISSING)
            if id(source) in now:
                met.add(id(source))
                if isinstance(child, Node):
                    made = child.copy is not MISSING and child.copy is not copy
                    if made and child in buffers and not node.done:
                        if copy is not MISSING:
                            child.copy = copy
                    elif made and (copy is not MISSING or any(map(is_, announced[id(source)], repeat(child.copy)))):
                        raise _replaced(node, slot, source, _LATE)
                    if wanted.setdefault(id(source), copy) is not copy:
                        raise _replaced(node, slot, source, _LATE)
                elif node.done:
                    if early.get(child, MISSING) is not copy:
                        raise _replaced(node, slot, source, _LATE)
                else:
                    first = wanted.setdefault(id(source), copy)
                    index = leaves.index_of(id(source))
                    if copy is not MISSING:
                        plain = self._nodes.find(id(source)) is None and index not in in_pieces
                        if not (isinstance(copy, torch.Tensor) and plain and (first is copy or child != index)):
                            raise _replaced(node, slot, source, "where only another plain tensor can be.")
                        # What is staged of the leaf itself is what comes first in the tree.
                        (leaves.given if child == index else leaves.replaced)[child] = copy
            if isinstance(child, GivenNode):
                replaced = self._by_giver.pop(child, {})
                turn = self._turns.pop(id(child), newest)
                # What is met in the last step only, such as by an iterator, may have copied itself out of order.
                # A default is none for what copy.deepcopy has copied by then.
                if (
                    turn < newest
                    or (replaced and turn < latest)
                    or not met.isdisjoint(replaced.keys() & memo.defaulted)
                ):
                    raise _replaced(node, slot, child.source, _LATE)
                now |= replaced
                latest, newest = max(latest, turn), turn if replaced else newest
            if number % LEAVES_PER_STEP == 0:
                yield
        for giver in self._by_giver:
            # It is inside something that has another copy, where copy.deepcopy does not come.
            raise UnsupportedLeafError(
                f"the code of this {type(giver.source).__qualname__} puts copies of other objects into memo, and it "
                "lies in an object that has a copy by other code.",
                path=format_path(giver.own_path()),
                remedy=_REMEDY,
            )
        for identity, copy in wanted.items():
            leaf = leaves.positions.find(identity)
            if leaf is not None and copy is not MISSING:
                leaves.given[leaf] = copy
            if copy is MISSING:
                # All of it comes before that code.
                dict.pop(memo, identity, None)
            else:
                dict.__setitem__(memo, identity, copy)


def _in_order(root: Node, replaced: Mapping[int, Any]) -> Iterator[tuple[Node, int, Node | int]]:
    """Yield what is in a tree in the order of copy.deepcopy: where it is, and a node, or the index of a leaf.

    A tuple comes after what is in it, because only then does copy.deepcopy look for the copy that code may have made.

    Args:
        root: Of the tree.
        replaced: The copies that code has made of some objects so far, by their identity. It does not look into these.
    """
    seen: set[int] = {id(root)}
    stack: list[tuple[Iterator[tuple[Node, int, Node | int]], tuple[Node, int, Node] | None]]
    stack = [(_children(root), None)]
    while stack:
        children, last = stack[-1]
        for node, slot, child in children:
            new = isinstance(child, Node) and id(child) not in seen
            late = new and isinstance(child, TupleNode) and replaced.get(id(child.source), MISSING) is MISSING
            if not late:
                yield node, slot, child
            if new and isinstance(child, Node) and replaced.get(id(child.source), MISSING) is MISSING:
                seen.add(id(child))
                stack.append((_children(child), (node, slot, child)))
                break
        else:
            stack.pop()
            if last is not None and isinstance(last[2], TupleNode):
                yield last
            elif last is not None and replaced.get(id(last[2].source), MISSING) is not MISSING:
                # copy.deepcopy puts its own copy back, and what came in between has the other.
                raise _replaced(*last[:2], last[2].source, "where its own is not complete.")


def _children(node: Node) -> Iterator[tuple[Node, int, Node | int]]:
    # What is inside an object that copies itself is a matter of its code.
    leaves = () if isinstance(node, GivenNode) else zip(node.leaves, count(node.first_leaf), strict=False)
    children: Iterator[tuple[int, Node | int]] = merge(leaves, node.nested, key=itemgetter(0))
    return ((node, slot, child) for slot, child in children)


_REMEDY = "In a __deepcopy__ of your own, put only the copy of the object itself into memo."
_LATE = "after copy.deepcopy would have copied it."


def _replaced(node: Node, slot: int, source: object, reason: str) -> UnsupportedLeafError:
    return UnsupportedLeafError(
        f"the code of an object puts another copy of this {type(source).__qualname__} into memo, {reason}",
        path=format_path(node.path(slot)),
        remedy=_REMEDY,
    )
