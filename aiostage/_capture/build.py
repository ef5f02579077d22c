"""Building the copy of a tree: its leaves in bulk over their memory, its objects in the order of copy.deepcopy."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from aiostage import _private
from aiostage._capture.faithful import Spec
from aiostage._capture.leaves import Leaves
from aiostage._capture.memo import Memo
from aiostage._capture.nodes import MISSING, Fetch, GivenNode, Node, TupleNode
from aiostage._capture.plan import Batch, LeafRun, OverlapGroup
from aiostage.errors import UnsupportedLeafError
from aiostage.leaf import format_path

__all__ = [
    "build",
    "build_batch",
    "build_destinations",
    "build_empty",
    "build_overlap_group",
    "build_run",
    "built_now",
    "finish_leaves",
    "keep_freed_memory",
    "of_class",
]

_CHILDREN_PER_STEP = 512
"""Children put into a container at once."""

_NODE_COST = 8
"""What opening or closing a node costs in terms of children."""


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
    # Its own stack and not recursion, as in the walk. originals: of a node that was entered again, the first one, which
    # gets the copy of the second. suspended: identities of nodes that wait for an object that is copying itself.
    stack: list[Node] = []
    originals: dict[int, Node] = {}
    suspended: set[int] = set()
    _enter(root, stack, fetch)
    cost = 0
    while stack:
        node = stack[-1]
        child, upto = _next(node, memo, suspended)
        while node.filled < upto:
            stop = min(upto, node.filled + _CHILDREN_PER_STEP)
            start, node.filled = node.filled, stop
            node.put(start, node.part(start, stop, fetch))
            cost += stop - start
            if cost >= _CHILDREN_PER_STEP:
                yield
                cost = 0
        cost += _NODE_COST
        if cost >= _CHILDREN_PER_STEP:
            yield
            cost = 0
        if child is None:
            if upto < len(node.children) or node.position < len(node.nested):
                continue
            if memo and isinstance(node, TupleNode) and dict.__contains__(memo, id(node.source)):
                # Code that was called for something inside has copied it.
                node.copy = dict.__getitem__(memo, id(node.source))
            node.finish()
            # active: it is on a stack, this one or one further out that called an object's code. done: its copy has all
            # of its contents. A copy that is there and not done can be referred to, and not be looked into.
            node.done, node.active = True, False
            stack.pop()
            original = originals.pop(id(node), None)
            if original is not None and original.copy is MISSING:
                original.copy = node.copy
        elif id(child) in suspended:
            assert memo is not None  # noqa: S101 - without one nothing is suspended
            state = node.nested[node.position][1].copy
            if not hasattr(node.copy, "__setstate__"):
                # What there is so far; all of it is put again when it is complete.
                node.put(upto, [state])
            _suspend(stack, suspended, memo)
        elif isinstance(child, GivenNode):
            if memo is not None and not child.active:
                memo.give(child)
            elif node.copy is not MISSING and memo is not None:
                # The object that is copying itself has asked for what contains it: it sees what there is so far.
                _suspend(stack, suspended, memo)
            else:
                raise _contains_itself(child)
        elif not child.active:
            # copy.deepcopy enters a circle where the tree leads to it first, and what is made on the way depends on it.
            entry = memo.entry_before(child) if memo is not None else None
            _enter(entry or child, stack, fetch)
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
    limit = min(len(nested), node.position + _CHILDREN_PER_STEP)
    while node.position < limit:
        slot, child = nested[node.position]
        if not child.done:
            # An object that is copying itself may have noted its copy, and is not done.
            noted = (
                MISSING if memo is None or (child.active and not isinstance(child, GivenNode)) else memo.noted(child)
            )
            if noted is not MISSING:
                child.copy = noted
                child.done = not child.active
            elif child.copy is MISSING or not (child.active or id(child) in suspended):
                return child, slot
        if memo is not None and memo.suspended and node.takes_contents(slot):
            for unfinished in _unfinished(child):
                if not unfinished.active:
                    return unfinished, slot
        node.position += 1
    return None, len(node.children) if limit == len(nested) else nested[limit][0]


def _unfinished(state: Node) -> Iterator[Node]:
    """Yield what a state consists of, itself or the parts of a tuple, as far as it has not all of its contents."""
    if isinstance(state, TupleNode):
        for _, part in state.nested:
            yield from _unfinished(part)
    elif not state.done:
        yield state


def _suspend(stack: list[Node], suspended: set[int], memo: Memo) -> None:
    """Leave the last node of a stack as it is, to be built on when what it contains has copied itself."""
    node = stack.pop()
    node.active = False
    # The node is in memo.suspended as well, which keeps it, and so its identity.
    suspended.add(id(node))
    memo.suspended.append(node)


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


_LEAVES_AT_ONCE = 128
"""Leaves made one by one, or put in place, between two yields; making one takes about two microseconds."""

_NUMPY_DTYPES: dict[torch.dtype, Any] = {
    torch.bool: np.bool_,
    torch.uint8: np.uint8,
    torch.int8: np.int8,
    torch.int16: np.int16,
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.uint16: np.uint16,
    torch.uint32: np.uint32,
    torch.uint64: np.uint64,
    torch.float16: np.float16,
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.complex64: np.complex64,
    torch.complex128: np.complex128,
}


def build_run(memory: np.ndarray[Any, Any], run: LeafRun) -> list[torch.Tensor]:
    """Make the staged leaves of a run, each with a storage of exactly its own size.

    Args:
        memory: One-dimensional uint8, the run's slots. Every leaf keeps the array that it is a view of alive.
        run: Leaves of one spec in consecutive slots.

    Returns:
        One tensor for each leaf, its contents not copied yet.
    """
    spec, count = run.spec, len(run.indices)
    dtype = _NUMPY_DTYPES.get(spec.target)
    if spec.extent == 0:
        tensors = [
            torch.empty_strided(spec.shape, spec.staged_stride, dtype=spec.target, device="cpu") for _ in range(count)
        ]
    elif spec.dense and spec.shape and dtype is not None:
        # One array of all slots, whose rows become the leaves without a Python step for each.
        # Each row is an array with memory as its base, which the tensor keeps, and its storage is exactly the row:
        # saved alone it writes that and no more.
        tensors = list(map(torch.from_numpy, memory.view(dtype).reshape(count, *spec.shape)))
        if tensors[0].stride() != spec.staged_stride:
            # NumPy has strides of its own for dimensions of size 1, by which a memory format is told.
            tensors = [tensor.as_strided(spec.shape, spec.staged_stride) for tensor in tensors]
    # Scalars have no row in a reshaped array, so an array of no dimensions is made for each.
    elif not spec.shape and dtype is not None:
        size = spec.staged_nbytes
        scalars = (np.ndarray((), dtype, memory, start) for start in range(0, count * size, size))
        tensors = list(map(torch.from_numpy, scalars))
    else:
        size = spec.staged_nbytes
        tensors = [
            torch.empty(0, dtype=spec.target, device="cpu").set_(
                # The same for dtypes and strides that NumPy does not have: a storage of the leaf's size, and the tensor
                # set over it.
                torch.from_numpy(memory[start : start + size]).untyped_storage(),
                0,
                spec.shape,
                spec.staged_stride,
            )
            for start in range(0, count * size, size)
        ]
    return of_class(tensors, spec)


def build_overlap_group(
    memory: np.ndarray[Any, Any], group: OverlapGroup, specs: Sequence[Spec | None]
) -> Generator[tuple[Sequence[int], list[torch.Tensor]], None, None]:
    """Make the staged leaves of a group, all over one storage of the group's size, yielding some at a time.

    Args:
        memory: One-dimensional uint8, the group's slot.
        group: Leaves whose memory overlaps.
        specs: The specs of all leaves.

    Yields:
        Some leaves' indices, and the tensors for them, tied as the sources are.
    """
    storage = torch.from_numpy(memory).untyped_storage()
    for start in range(0, len(group.indices), _LEAVES_AT_ONCE):
        indices, tensors = group.indices[start : start + _LEAVES_AT_ONCE], list[torch.Tensor]()
        for index, offset in zip(indices, group.offsets[start : start + _LEAVES_AT_ONCE], strict=True):
            spec = specs[index]
            assert spec is not None  # noqa: S101 - a plan places leaves with memory only
            tensor = torch.empty(0, dtype=spec.target, device="cpu")
            # One storage for the group: its leaves are tied in the copy as they are in the source.
            tensor.set_(storage, offset // spec.target.itemsize, spec.shape, spec.staged_stride)
            tensors += of_class([tensor], spec)
        yield indices, tensors


def of_class(tensors: list[torch.Tensor], spec: Spec) -> list[torch.Tensor]:
    """Return tensors of the class of a leaf, over the same memory."""
    if spec.cls is torch.nn.Parameter:
        return [_private.make_parameter(tensor, spec.requires_grad) for tensor in tensors]
    if spec.cls is not torch.Tensor:
        tensors = [tensor.as_subclass(spec.cls) for tensor in tensors]
    if spec.requires_grad:
        for tensor in tensors:
            tensor.requires_grad_()
    return tensors


def finish_leaves(leaves: Leaves, staged: list[Any]) -> Generator[None, None, None]:
    """Put the leaves together that were taken apart, attach gradients, and give tensors met again their copy.

    Yields between small steps.
    """
    for index, tensor in leaves.given.items():
        staged[index] = tensor
    # Parts were found after what they are parts of, so the innermost composites come last.
    for index, (composite, parts) in reversed(leaves.composites.items()):
        if index not in leaves.given:
            staged[index] = composite.assemble([staged[part] for part in parts])
            yield
    for number, (index, gradient) in enumerate(leaves.gradients.items()):
        if staged[index].grad is None:
            staged[index].grad = staged[gradient]
        if number % _LEAVES_AT_ONCE == 0:
            yield
    for aliases in leaves.aliases.values():
        for number, (index, first) in enumerate(aliases.items()):
            staged[index] = staged[first]
            if number % _LEAVES_AT_ONCE == 0:
                yield
    for index, tensor in leaves.replaced.items():
        staged[index] = tensor


_NOTHING = np.empty(0, dtype=np.uint8)

_LARGEST_BLOCK = 32 * 2**20 - 2**16
"""Just below the largest block whose release glibc learns from."""


@cache
def keep_freed_memory() -> None:
    """Let malloc keep what the leaves of one staging give back for those of the next.

    Objects for 50,000 leaves take 20 MiB, which glibc returns to the kernel when the last staged copy is dropped, so
    that building the next one takes 5,000 page faults, a tenth of its time. Once a process has freed a block of this
    size it keeps up to twice as much: the dynamic threshold of mallopt(3). Other allocators just free the block.
    """
    # Freed at once, which is all that it is for. No page of it is touched.
    np.empty(_LARGEST_BLOCK, dtype=np.uint8)


def build_empty(runs: Sequence[LeafRun], staged: list[Any]) -> Generator[None, None, None]:
    """Make the leaves that have no elements, yielding now and then.

    Args:
        runs: The runs of empty leaves.
        staged: Where to put them, by their indices.
    """
    for run in runs:
        _place(staged, run.indices, build_run(_NOTHING, run))
        yield


def build_batch(
    batch: Batch, memory: np.ndarray[Any, Any], staged: list[Any], specs: Sequence[Spec | None]
) -> Generator[None, None, None]:
    """Make the leaves that begin in a batch, yielding now and then.

    Args:
        batch: Whose leaves to make.
        memory: One-dimensional uint8, the whole arena.
        staged: Where to put them, by their indices.
        specs: The specs of all leaves.
    """
    for run in batch.runs:
        _place(staged, run.indices, build_run(memory[run.offset : run.offset + run.nbytes], run))
        yield
    for group in batch.overlap_groups:
        part = memory[group.offset : group.offset + group.nbytes]
        for indices, tensors in build_overlap_group(part, group, specs):
            _place(staged, indices, tensors)
            yield


def build_destinations(batch: Batch, memory: np.ndarray[Any, Any]) -> dict[int, torch.Tensor]:
    """Return what copying a batch writes to as leaves, by their indices; the rest it finds in the memory."""
    made: dict[int, torch.Tensor] = {}
    for run in batch.runs:
        if run.is_whole:
            # Leaves in pieces are written as flat memory, and need none.
            leaves = build_run(memory[run.offset : run.offset + run.nbytes], run)
            made.update(zip(run.indices, leaves, strict=True))
    return made


def _place(staged: list[Any], indices: Sequence[int], tensors: Sequence[torch.Tensor]) -> None:
    """Put tensors where their leaves' indices say."""
    if isinstance(indices, range):
        staged[indices.start : indices.stop] = tensors
        return
    for index, tensor in zip(indices, tensors, strict=True):
        staged[index] = tensor
