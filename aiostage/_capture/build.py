"""Building the copy of a tree from what a walk noted: object by object in the order of copy.deepcopy."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from aiostage._capture.leaves import Table
from aiostage._capture.nodes import MISSING, Fetch, GivenNode, Node, TupleNode
from aiostage.errors import UnsupportedLeafError
from aiostage.leaf import format_path

__all__ = ["Memo", "build", "built_now"]

_AT_ONCE = 512
"""Children put into a container at once."""

_NODE_COST = 8
"""What opening or closing a node costs in terms of children."""


class Memo(dict[Any, Any]):
    """What ``memo`` is to :func:`copy.deepcopy`, for objects that copy themselves.

    Whatever the walk has noted is copied when it is asked for, with its values, so that code which computes with
    copies sees what it would see under :func:`copy.deepcopy`. What such code puts in here is the copy from then on.

    Args:
        nodes: What was noted, by the identity of the source.
        fetch: Returns copies of leaves that have their values.
        leaf_of: Indices of noted tensors by their identity.
        storages: Copies of storages by the identity of the source, where PyTorch's code looks for them and puts them.
        give: Makes the copy of an object that copies itself.

    Attributes:
        suspended: What was built only in part, because it contains an object that was copying itself.
    """

    def __init__(
        self,
        nodes: Table[Node],
        fetch: Fetch,
        leaf_of: dict[int, int],
        storages: dict[int, Any],
        give: Callable[[GivenNode], None],
    ) -> None:
        super().__init__(torch=storages)
        self.nodes = nodes
        self.fetch = fetch
        self.leaf_of = leaf_of
        self.give = give
        self.suspended: list[Node] = []

    def get(self, key: Any, default: Any = None) -> Any:
        """Return the copy of what has an identity, made now if need be."""
        if dict.__contains__(self, key):
            return dict.__getitem__(self, key)
        # Code of objects may ask for keys of its own, which are no identities.
        node = self.nodes.find(key) if isinstance(key, int) else None
        if node is not None:
            if not node.done and not node.active:
                if isinstance(node, GivenNode):
                    self.give(node)
                else:
                    built_now(node, self)
            return default if node.copy is MISSING else node.copy
        leaf = self.leaf_of.get(key)
        return default if leaf is None else self.fetch(leaf, leaf + 1)[0]

    def forget(self) -> None:
        """Drop all references; the memo may live on in objects that keep theirs."""
        self.clear()
        self.suspended.clear()
        self.nodes, self.leaf_of = Table(dict), {}
        self.fetch, self.give = _nothing, _no_copy

    def __contains__(self, key: object) -> bool:
        return isinstance(key, int) and self.get(key, MISSING) is not MISSING

    def __getitem__(self, key: Any) -> Any:
        found = self.get(key, MISSING)
        if found is MISSING:
            raise KeyError(key)
        return found


def _nothing(start: int, stop: int) -> list[Any]:
    raise KeyError(start)


def _no_copy(node: GivenNode) -> None:
    raise KeyError(id(node.source))


def built_now(node: Node, memo: Memo) -> None:
    """Build one object at once, as far as what is under way below it lets that be."""
    for _ in build(node, memo.fetch, memo):
        pass


def build(root: Node, fetch: Fetch, memo: Memo | None) -> Generator[None, None, None]:
    """Build one object and what it leads to, yielding between small steps.

    Args:
        root: Not built yet, or not completely.
        fetch: Returns the copies of leaves.
        memo: What objects that copy themselves have made, and how; None if there are none.

    Raises:
        UnsupportedLeafError: If an object contains itself in what it is made of.
    """
    stack: list[Node] = []
    originals: dict[int, Node] = {}
    suspended: set[int] = set()
    _enter(root, stack, fetch)
    cost = 0
    while stack:
        node = stack[-1]
        child, upto = _next(node, memo, suspended)
        while node.filled < upto:
            stop = min(upto, node.filled + _AT_ONCE)
            start, node.filled = node.filled, stop
            node.put(start, node.part(start, stop, fetch))
            cost += stop - start
            if cost >= _AT_ONCE:
                yield
                cost = 0
        cost += _NODE_COST
        if cost >= _AT_ONCE:
            yield
            cost = 0
        if child is None:
            if upto < len(node.children) or node.position < len(node.nested):
                continue
            if memo and isinstance(node, TupleNode) and dict.__contains__(memo, id(node.source)):
                # Code that was called for something inside has copied it.
                node.copy = dict.__getitem__(memo, id(node.source))
            node.finish()
            node.done, node.active = True, False
            stack.pop()
            original = originals.pop(id(node), None)
            if original is not None and original.copy is MISSING:
                original.copy = node.copy
        elif isinstance(child, GivenNode):
            if memo is not None and not child.active:
                memo.give(child)
            elif node.copy is not MISSING and memo is not None:
                # The object that is copying itself has asked for what contains it: it sees what there is so far.
                stack.pop()
                node.active = False
                suspended.add(id(node))
                memo.suspended.append(node)
            else:
                raise _contains_itself(child)
        elif not child.active:
            _enter(child, stack, fetch)
        elif child.entered_again:
            raise _contains_itself(child)
        else:
            # A cycle leads back to what is made of its children: it is made here, of those that it has by now.
            child.entered_again = True
            other = child.again()
            originals[id(other)] = child
            _enter(other, stack, fetch)


def _next(node: Node, memo: Memo | None, suspended: set[int]) -> tuple[Node | None, int]:
    """Return the next nested node that has to be built first, and up to which slot the others have their copies."""
    nested = node.nested
    limit = min(len(nested), node.position + _AT_ONCE)
    while node.position < limit:
        slot, child = nested[node.position]
        if not child.done:
            if memo and not child.active and dict.__contains__(memo, id(child.source)):
                child.copy = dict.__getitem__(memo, id(child.source))
                child.done = True
            elif child.copy is MISSING or not (child.active or id(child) in suspended):
                return child, slot
        node.position += 1
    return None, len(node.children) if limit == len(nested) else nested[limit][0]


def _enter(node: Node, stack: list[Node], fetch: Fetch) -> None:
    node.active = True
    stack.append(node)
    if node.copy is MISSING:
        node.begin(fetch)


def _contains_itself(node: Node) -> UnsupportedLeafError:
    return UnsupportedLeafError(
        f"{type(node.source).__qualname__} contains itself in what it is made of.",
        path=format_path(node.own_path()),
        remedy="Give it a __deepcopy__ that registers the copy in memo first, or move the reference into its state.",
    )
