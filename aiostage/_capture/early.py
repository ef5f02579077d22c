"""The last step of the walk: objects copy themselves, and get copies of tensors with their values for that."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from math import inf
from typing import Any

import torch

from aiostage import _private
from aiostage._capture.build import built_now, of_class
from aiostage._capture.faithful import Refusal, Spec, copies_itself
from aiostage._capture.leaves import LEAVES_PER_STEP, Leaves, Table
from aiostage._capture.memo import Memo, ReplacedCopies, StorageCopies
from aiostage._capture.nodes import GivenNode, Node
from aiostage._capture.protocol import circles_of, depth_first, failed, objects_within
from aiostage._loop.coroutines import exhausted
from aiostage.errors import UnsupportedLeafError
from aiostage.leaf import format_path

__all__ = ["EarlyCopies", "SelfCopies"]


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
                found.append(self._copy(self._leaves.index_of(identity)))
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


_LAST = (inf,)
"""The place of an object in the order of copying that only the code of others leads to."""


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
        self._order: dict[int, tuple[float, ...]] = {}
        self._replaced = ReplacedCopies(leaves, nodes)
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
        return [tensor for tensor in found if self._leaves.positions.find(id(tensor)) is None]

    def order(self, root: Node, reduced_last: Collection[Node]) -> Generator[None, None, None]:
        """Find the order in which copy.deepcopy comes to the objects noted so far, yielding between small steps.

        Args:
            root: Leads to them.
            reduced_last: Objects of which it is not known yet what they lead to.
        """
        late = {id(node) for node in reduced_last}
        for number, node in enumerate(depth_first(root, _leads_before)):
            if isinstance(node, GivenNode) or id(node) in late:
                self._order[id(node)] = (number,)
            if number % LEAVES_PER_STEP == 0:
                yield

    def order_within(self, reduced: Sequence[Node]) -> None:
        """Put what objects lead to that were reduced since :meth:`order` in their places."""
        # In the order of copying, with one set of what was seen: what two of them lead to has the place that the first
        # gives it, and is gone through once. It is one step, and 1,000 objects may share what they lead to.
        seen: set[int] = set()
        for outer in sorted(reduced, key=lambda node: self._order.get(id(node), _LAST)):
            place = self._order.get(id(outer))
            if place is None:
                break
            for number, node in enumerate(depth_first(outer, _leads_before, seen)):
                # What the tree leads to before that has its place.
                if isinstance(node, GivenNode):
                    self._order[id(node)] = min(self._order.get(id(node), _LAST), (*place, number))

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
        positions, given = self._leaves.positions, self._leaves.given
        replaced = self._replaced
        replaced.follow(root)
        memo = Memo(
            self._nodes, early.copies, positions, early.storages, self._give, built_now, given, replaced.has_reached
        )
        self.memo = early.memo = memo
        if self._lead_back(opaque):
            memo.circles = circles_of(opaque, self._leads, self._connecting)
        if memo.circles:
            self._copy_around_circles(opaque, root, memo)
        for node in sorted(opaque, key=lambda node: self._order.get(id(node), _LAST)):
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
            made = [node.copy, *self._replaced.by(node)]
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
            self._replaced.begin(node)
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
            self._replaced.note(node, memo)

    def replace(self, root: Node, buffers: Collection[Node]) -> Generator[None, None, None]:
        """Give what comes after the code of an object the copies that it put into memo, yielding between small steps.

        Args:
            root: Of the tree.
            buffers: Those that were copied because nothing tells of their changes, and not by code of their own.

        Raises:
            UnsupportedLeafError: If copy.deepcopy would give one object two copies, or a tensor something else.
        """
        if self.memo is not None:
            yield from self._replaced.give(root, buffers, self.memo, self._early.replaced)


def _leads_before(node: Node) -> list[Node]:
    """Return the nodes that a node leads to, unless it has its copy: then they were dealt with."""
    return [] if node.done else [child for _, child in node.nested]


def _memory_of(tensor: torch.Tensor) -> object:
    """Return what two tensors have in common exactly when they share a storage."""
    with _private.without_torch_function():
        if _private.has_storage(tensor):
            return _private.storage_identity(tensor.untyped_storage())
    return id(tensor)
