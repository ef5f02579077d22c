"""The last step of the walk: objects copy themselves, and get copies of tensors with their values for that."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from heapq import merge
from itertools import chain, count, repeat
from math import inf
from operator import is_, itemgetter
from typing import Any

import torch

from aiostage import _private
from aiostage._capture.build import Memo, built_now, of_class
from aiostage._capture.faithful import Refusal, Spec, copies_itself
from aiostage._capture.leaves import LEAVES_PER_STEP, Leaves, Table
from aiostage._capture.nodes import MISSING, GivenNode, Node, TupleNode
from aiostage._capture.protocol import circles_of, depth_first, failed, objects_within
from aiostage._loop.coroutines import exhausted
from aiostage.errors import UnsupportedLeafError
from aiostage.leaf import format_path

__all__ = ["EarlyCopies", "SelfCopies", "StorageCopies"]


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


class EarlyCopies:
    """Makes copies at once, and ties to them whatever else lies in the same storages.

    Args:
        leaves: Noted and inspected.

    Attributes:
        storages: The copies of whole storages, those included that code of objects has made.
    """

    def __init__(self, leaves: Leaves) -> None:
        self._leaves = leaves
        self.storages = StorageCopies()
        self.memo: Memo | None = None
        """What code has put in the place of such copies."""
        self.replaced: dict[int, Any] = {}
        """What leaves have got of it, by their indices."""
        self._made: set[int] = set()

    def made(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor is one of these copies."""
        return id(tensor) in self._made

    def copies(self, start: int, stop: int) -> list[Any]:
        """Return copies of the leaves with some indices, with their values."""
        found: list[Any] = []
        for index in range(start, stop):
            identity = id(self._leaves.tensors[index])
            if self.memo is not None and dict.__contains__(self.memo, identity):
                self.replaced[index] = dict.__getitem__(self.memo, identity)
                found.append(self.replaced[index])
            else:
                found.append(self._copy(self._leaves.positions[identity]))
        return found

    def _copy(self, index: int) -> torch.Tensor:
        leaves = self._leaves
        if index in leaves.given:
            return leaves.given[index]
        with torch.no_grad(), _private.without_torch_function():
            copy = self._made_of(index)
        self._made.add(id(copy))
        leaves.given[index] = copy
        gradient = leaves.gradients.get(index)
        if gradient is not None:
            copy.grad = self._copy(gradient)
        return copy

    def _made_of(self, index: int) -> torch.Tensor:
        leaves = self._leaves
        if index in leaves.composites:
            composite, parts = leaves.composites[index]
            return composite.assemble([self._copy(part) for part in parts])
        spec, storage = leaves.specs[index], leaves.storages[index]
        assert spec is not None and storage is not None  # noqa: S101, PT018 - what else would have been refused
        if spec.by_value:
            copy = torch.empty_strided(spec.shape, spec.staged_stride, dtype=spec.dtype, device="cpu")
            return of_class([copy.copy_(leaves.tensors[index].detach())], spec)[0]
        # The whole storage, as copy.deepcopy does it: other leaves and the object's own tensors may lie in the same
        # one.
        identity = _private.storage_identity(storage)
        if identity not in self.storages:
            made = storage.clone() if storage.device.type == "cpu" else storage.cpu()  # type: ignore[no-untyped-call]
            self.storages[identity] = made
        return self._over(self.storages[identity], index, spec)

    def _over(self, copy: torch.UntypedStorage, index: int, spec: Spec) -> torch.Tensor:
        """Return a tensor like a leaf over the copy of its storage."""
        storage = self._leaves.storages[index]
        assert storage is not None  # noqa: S101 - of which there is a copy
        # From the noted address, not the tensor's offset: the tensor may have got other memory since it was met.
        distance = self._leaves.addresses[index] - storage.data_ptr() if spec.extent else 0
        tensor = torch.empty(0, dtype=spec.dtype, device="cpu")
        tensor.set_(copy, distance // spec.dtype.itemsize, spec.shape, spec.stride)
        return of_class([tensor], spec)[0]

    def tie(self) -> Generator[None, None, None]:
        """Give every leaf in a storage that was copied a copy over the same one, yielding between small steps."""
        leaves = self._leaves
        # A leaf without a spec is not planned. Its copy is there, and finish_leaves() puts it in its place.
        for start in range(0, len(leaves.specs), LEAVES_PER_STEP):
            for index in range(start, min(start + LEAVES_PER_STEP, len(leaves.specs))):
                spec, storage = leaves.specs[index], leaves.storages[index]
                if index in leaves.given:
                    leaves.specs[index] = None
                elif spec is not None and storage is not None and not spec.by_value and self.storages:
                    copy = self.storages.get(_private.storage_identity(storage))
                    if copy is not None:
                        leaves.given[index] = self._over(copy, index, spec)
                        leaves.specs[index] = None
            yield


class SelfCopies:
    """Objects that copy themselves: what is inside them, and their copies, made in one step.

    Args:
        leaves: Of the walk.
        nodes: What the walk has noted, by the identity of the source.

    Attributes:
        memo: What such objects have made; None before :meth:`make`.
    """

    def __init__(self, leaves: Leaves, nodes: Table[Node]) -> None:
        self._leaves = leaves
        self._nodes = nodes
        self._early = EarlyCopies(leaves)
        self._looked_into: set[int] = set()
        self._seen: dict[int, list[Any]] = {}
        self._memory: set[object] = set()
        self._between: dict[int, Node] = {}
        self._connecting: set[int] = set()
        self._giving = False
        self._order: dict[int, int] = {}
        self._turns: dict[int, int] = {}
        self._replaced: dict[GivenNode, dict[int, Any]] = {}
        self._announced: list[tuple[int, Any]] = []
        self.memo: Memo | None = None

    def has_looked_into(self, node: GivenNode) -> bool:
        """Return whether :meth:`look_into` was called for an object."""
        return id(node) in self._looked_into

    def look_into(self, node: GivenNode) -> list[torch.Tensor]:
        """Find the tensors inside an object, and return those that the walk has not met.

        What several objects lead to is looked at once.
        """
        self._looked_into.add(id(node))
        found = [
            item
            for item in objects_within(node.source, self._seen)
            if isinstance(item, torch.Tensor) and not copies_itself(item, type(item))
        ]
        self._memory.update(map(_memory_of, found))
        exhausted(self._leaves.index())
        return [tensor for tensor in found if id(tensor) not in self._leaves.positions]

    def order(self, root: Node) -> Generator[None, None, None]:
        """Find the order in which copy.deepcopy comes to the objects noted so far, yielding between small steps.

        Args:
            root: Leads to them.
        """
        for number, node in enumerate(depth_first(root, _leads_before)):
            if isinstance(node, GivenNode):
                self._order[id(node)] = number
            if number % LEAVES_PER_STEP == 0:
                yield

    def make(self, opaque: Sequence[GivenNode], root: Node) -> None:
        """Let objects copy themselves.

        Args:
            opaque: All such objects, in the order in which they were met.
            root: Leads to them.

        Raises:
            UnsupportedLeafError: If one cannot be copied.
        """
        exhausted(self._leaves.index())
        early = self._early
        memo = Memo(self._nodes, early.copies, self._leaves.positions, early.storages, self._give, self._leaves.given)
        self.memo = early.memo = memo
        if self._lead_back(opaque):
            memo.circles = circles_of(opaque, self._leads, self._connecting)
        if memo.circles:
            self._copy_around_circles(opaque, root, memo)
        for node in sorted(opaque, key=lambda node: self._order.get(id(node), inf)):
            if not node.done:
                self._give(node)
        # The list may grow meanwhile; a for loop over a list sees what is appended.
        for suspended in memo.suspended:
            if not suspended.done:
                built_now(suspended, memo)

    def check(self, opaque: Sequence[GivenNode]) -> Generator[None, None, None]:
        """Look for tensors of the source in the copies, yielding between small steps.

        Raises:
            UnsupportedLeafError: If there is one, or one on a device.
        """
        seen: dict[int, list[Any]] = {}
        for node in opaque:
            made = [node.copy, *self._replaced.get(node, {}).values()]
            for number, item in enumerate(objects_within(made, seen), 1):
                if (
                    isinstance(item, torch.Tensor)
                    and not self._early.made(item)
                    and (_memory_of(item) in self._memory or item.device.type != "cpu")
                ):
                    raise UnsupportedLeafError(
                        f"the __deepcopy__ of {type(node.source).__qualname__} returned a tensor that is not a copy in "
                        f"host memory ({item.dtype} {tuple(item.shape)} on {item.device}).",
                        path=format_path(node.own_path()),
                        remedy="In a class of your own, copy tensors with copy.deepcopy(tensor, memo). Of another's "
                        "class, stage what the object is made of, such as its to_dict(). passthrough leaves the object "
                        "as it is.",
                    )
                if number % LEAVES_PER_STEP == 0:
                    yield
            yield

    def tie(self) -> Generator[None, None, None]:
        """Give leaves that lie in storages that were copied already copies over these, yielding between small steps."""
        yield from self._early.tie()

    def release(self) -> None:
        """Drop all references."""
        if self.memo is not None:
            self.memo.forget()
        self._seen.clear()
        self._memory.clear()
        self._between.clear()
        self._replaced.clear()
        self._announced.clear()
        self._early.memo = None

    def _copy_around_circles(self, opaque: Sequence[GivenNode], root: Node, memo: Memo) -> None:
        """Let objects copy themselves in the order of copy.deepcopy, which enters each circle at the same node.

        What is made of part of a circle, such as an iterator over a list in it, depends on that.
        """
        with_code = {memo.circles.get(id(node)) for node in opaque}
        for node in depth_first(root, _leads_before):
            # Copying enters a circle at the first of its nodes that the tree leads to; that one is built first, which
            # copies the rest on the way.
            circle = memo.circles.get(id(node))
            if node.done:
                continue
            if isinstance(node, GivenNode):
                self._give(node)
            elif circle is not None and memo.entries.setdefault(circle, node) is node and circle in with_code:
                built_now(node, memo)

    def _lead_back(self, opaque: Sequence[GivenNode]) -> bool:
        """Return whether objects that copy themselves lead to something that the walk has noted."""
        roots = {id(node.source) for node in opaque}
        # Otherwise no circle leads through such an object, and the search for circles, which goes through all of the
        # tree, is spared.
        if any(self._nodes.find(number) is not None for number in self._seen if number not in roots):
            return True
        return any(id(item) in roots for found in self._seen.values() for item in found[1:])

    def _leads(self, node: Node) -> list[Node]:
        """Return the nodes that a node leads to; what the walk has not noted has one that connects others."""
        leads = [child for _, child in node.nested]
        for item in self._seen.get(id(node.source), ())[1:]:
            if id(item) in self._seen and item is not node.source:
                # What the walk has not noted is made a node of its own for the search, kept so that it is one however
                # often it is met.
                met = self._nodes.find(id(item)) or self._between.get(id(item))
                if met is None:
                    met = self._between[id(item)] = Node(item, None, 0)
                    self._connecting.add(id(met))
                leads.append(met)
        return leads

    def _give(self, node: GivenNode) -> None:
        """Let an object copy itself.

        It may compute with the copies of tensors, so they have their values.
        """
        memo = self.memo
        assert memo is not None  # noqa: S101 - made before the first is copied
        source = node.source
        if dict.__contains__(memo, id(source)):
            # Code that came before has put its copy there.
            node.copy, node.done = dict.__getitem__(memo, id(source)), True
            return
        outermost, self._giving = not self._giving, True
        if outermost:
            self._turns[id(node)] = len(self._turns)
        node.active = True
        try:
            result = source.__deepcopy__(memo)
        except Refusal as refusal:
            raise refusal.at(node.own_path()) from None
        except Exception as error:
            raise failed(node, error) from error
        finally:
            node.active = False
            self._giving = not outermost
        node.copy, node.done = result, True
        # Last, and over what the object's code may have put there itself: copy.deepcopy does so too.
        memo[id(source)] = result
        if outermost:
            self._note_replaced(node, memo)

    def _note_replaced(self, giver: GivenNode, memo: Memo) -> None:
        """Note which objects of the tree have another copy in the memo than the walk would give them."""
        for identity in memo.touched:
            node, copy = self._nodes.find(identity), dict.get(memo, identity, MISSING)
            own = node.copy if node is not None else self._leaves.given.get(self._leaves.positions[identity])
            if copy is not MISSING and copy is not own:
                self._replaced.setdefault(giver, {})[identity] = copy
        if memo.announced:
            self._replaced.setdefault(giver, {}).update(memo.announced)
            self._announced += memo.announced
        memo.touched.clear()
        memo.announced.clear()

    def replace(self, root: Node, buffers: Collection[Node]) -> Generator[None, None, None]:
        """Give what comes after the code of an object, in the order of copy.deepcopy, the copies that it put into memo.

        Yields between small steps.

        Args:
            root: Of the tree.
            buffers: Those that were copied because nothing tells of their changes, and not by code of their own.

        Raises:
            UnsupportedLeafError: If copy.deepcopy would give one object two copies, or a tensor something else.
        """
        memo, leaves = self.memo, self._leaves
        if memo is None or not self._replaced:
            return
        announced: dict[int, list[Any]] = {}
        for identity, copy in chain(self._announced, *(found.items() for found in self._replaced.values())):
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
                    if self._early.replaced.get(child, MISSING) is not copy:
                        raise _replaced(node, slot, source, _LATE)
                else:
                    first = wanted.setdefault(id(source), copy)
                    index = leaves.positions[id(source)]
                    if copy is not MISSING:
                        plain = self._nodes.find(id(source)) is None and index not in in_pieces
                        if not (isinstance(copy, torch.Tensor) and plain and (first is copy or child != index)):
                            raise _replaced(node, slot, source, "where only another plain tensor can be.")
                        # What is staged of the leaf itself is what comes first in the tree.
                        (leaves.given if child == index else leaves.replaced)[child] = copy
            if isinstance(child, GivenNode):
                replaced = self._replaced.pop(child, {})
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
        for giver in self._replaced:
            # It is inside something that has another copy, where copy.deepcopy does not come.
            raise UnsupportedLeafError(
                f"the code of this {type(giver.source).__qualname__} puts copies of other objects into memo, and it "
                "lies in an object that has a copy by other code.",
                path=format_path(giver.own_path()),
                remedy=_REMEDY,
            )
        for identity, copy in wanted.items():
            if identity in leaves.positions and copy is not MISSING:
                leaves.given[leaves.positions[identity]] = copy
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


def _leads_before(node: Node) -> list[Node]:
    """Return the nodes that a node leads to, unless it has its copy: then they were dealt with."""
    return [] if node.done else [child for _, child in node.nested]


def _memory_of(tensor: torch.Tensor) -> object:
    """Return what two tensors have in common exactly when they share a storage."""
    with _private.without_torch_function():
        if _private.has_storage(tensor):
            return _private.storage_identity(tensor.untyped_storage())
    return id(tensor)
