"""A cooperative deep copy of everything that is not a tensor.

The walk follows :func:`copy.deepcopy` object by object, but keeps its own stack, so that nesting is bounded by memory
and not by the recursion limit, and yields between small steps, so that an event loop can interrupt it. Containers are
copied while they are met; what needs a staged tensor before it can be made (a tuple around a tensor, say) is written
down as a program that runs when the tensors are there.
"""

from __future__ import annotations

import copyreg
import types
from collections import OrderedDict
from collections.abc import Callable, Generator
from typing import Any

import torch

from aiostage._capture.containers import copy_list, copy_mapping, copy_method, copy_ordered_dict, copy_tuple
from aiostage._capture.faithful import PLAIN_CLASSES, Refusal
from aiostage._capture.frames import HIDDEN, Frame
from aiostage._capture.leaves import Leaves
from aiostage._capture.memo import ATOMIC, Memo
from aiostage._capture.objects import copy_object
from aiostage._capture.rebuild import Results, perform
from aiostage._capture.versions import Witness
from aiostage.leaf import Attribute, Path

__all__ = ["Walk"]

_MANY = 64
"""Children looked at one by one between two yields."""

_BULK = 512
"""Children taken at once when they are all alike."""


class Walk:
    """One walk over one state dict.

    Args:
        passthrough: Says which objects are put into the staged tree uncopied.
    """

    def __init__(self, *, passthrough: Callable[[Path, object], bool] | None = None) -> None:
        self._memo = Memo()
        self._passthrough = passthrough
        self._root: Any = None
        self._root_reference: int | None = None

    @property
    def leaves(self) -> Leaves:
        """The tensors met."""
        return self._memo.leaves

    @property
    def late(self) -> int:
        """How many objects can only be made once the leaves are there."""
        return self._memo.late_count

    @property
    def witness(self) -> Witness:
        """What the containers held."""
        return self._memo.witness

    @property
    def calls_out(self) -> bool:
        """Whether the program calls other people's code, which may look at the values of tensors."""
        return self._memo.calls_out

    def run(self, state_dict: object) -> Generator[None, None, None]:
        """Walk the tree, yielding between small steps.

        Raises:
            UnsupportedLeafError: If something in the tree cannot be copied.
        """
        stack = self._memo.stack
        self._memo.push(None, 0, [state_dict], (HIDDEN,), self._finish_root)
        while stack:
            frame = stack[-1]
            if frame.position < len(frame.sources):
                self._advance(frame)
            else:
                stack.pop()
                frame.finish(frame)
            yield

    def rebuild(self, results: Results) -> Generator[None, None, Any]:
        """Build what is left to be built around the staged leaves, and return the staged tree."""
        yield from perform(self._memo.program, results)
        return self._root if self._root_reference is None else results[self._root_reference]

    def path(self, leaf: int) -> Path:
        """Return the path of a leaf: the first that led to it."""
        return self._memo.path(leaf)

    def releasing(self) -> Generator[None, None, None]:
        """Do the larger part of :meth:`release`, yielding between small steps."""
        yield from self._memo.releasing()

    def release(self) -> None:
        """Let go of the source and of the copy; only paths can be asked for from now on."""
        self._root = None
        self._memo.release()

    def _finish_root(self, frame: Frame) -> None:
        self._root = frame.copies[0]
        if frame.first_leaf is not None:
            self._root_reference = frame.first_leaf
        elif frame.holes:
            self._root_reference = frame.holes[0][1]

    def _advance(self, frame: Frame) -> None:
        """Look at some of a frame's children, up to the first that needs a frame of its own."""
        begin = frame.position
        if self._take_alike(frame, begin):
            return
        frame.spread()
        depth = len(self._memo.stack)
        for slot in range(begin, min(len(frame.sources), begin + _MANY)):
            frame.position = slot + 1
            child = frame.sources[slot]
            cls = type(child)
            if cls in ATOMIC:
                continue
            self._enter(child, cls, frame, slot)
            if len(self._memo.stack) > depth:
                return

    def _take_alike(self, frame: Frame, begin: int) -> bool:
        """Take many children at once if they are all atomic, or all plain tensors not met before."""
        chunk = frame.sources[begin : begin + _BULK]
        classes = set(map(type, chunk))
        if classes <= ATOMIC:
            frame.spread()
        elif self._passthrough is not None or not classes <= PLAIN_CLASSES:
            return False
        else:
            start = self._memo.leaves.extend(chunk)
            if start is None:
                return False
            self._memo.origins.append((start, frame, begin))
            if begin == 0:
                frame.first_leaf = start
            elif frame.first_leaf is None:
                frame.holes += zip(range(begin, begin + len(chunk)), range(start, start + len(chunk)), strict=True)
        frame.position = begin + len(chunk)
        return True

    def _enter(self, child: Any, cls: type, frame: Frame, slot: int) -> None:
        """Copy one child, or push the frame that will."""
        memo = self._memo
        if memo.already(child, frame, slot):
            return
        if self._passthrough is not None and self._passthrough(frame.path(slot), child):
            return
        if issubclass(cls, torch.Tensor):
            self._tensor(child, frame, slot)
        elif cls is dict:
            copy_mapping(memo, child, {}, frame, slot)
        elif cls is OrderedDict:
            copy_ordered_dict(memo, child, frame, slot)
        elif cls is list:
            copy_list(memo, child, frame, slot)
        elif cls is tuple:
            copy_tuple(memo, child, frame, slot)
        elif cls is types.MethodType:
            copy_method(memo, child, frame, slot)
        elif not issubclass(cls, type):
            copy_object(memo, child, cls, frame, slot)

    def _tensor(self, tensor: torch.Tensor, frame: Frame, slot: int) -> None:
        memo = self._memo
        index, new = memo.leaves.add(tensor)
        frame.holes.append((slot, index))
        if not new:
            return
        memo.origins.append((index, frame, slot))
        try:
            composite = memo.leaves.composite(index)
        except Refusal as refusal:
            raise refusal.at(frame.path(slot)) from None
        owned = composite.owned_attributes if composite is not None else frozenset()
        attributes = {name: value for name, value in vars(tensor).items() if name not in owned}
        if type(tensor) not in PLAIN_CLASSES:
            names = copyreg._slotnames(type(tensor))  # type: ignore[attr-defined]
            attributes |= {name: getattr(tensor, name) for name in names if hasattr(tensor, name)}
        if attributes:
            self._attributes(index, attributes, frame, slot)

    def _attributes(self, index: int, attributes: dict[str, Any], frame: Frame, slot: int) -> None:
        # A bound method on a tensor (a weight loader, say) is code, and the module behind it is no part of the tensor.
        names = [name for name, value in attributes.items() if type(value) is not types.MethodType]

        def finish(done: Frame) -> None:
            def attach(results: Results) -> None:
                values = dict(zip(names, done.filled(results), strict=True))
                for name, value in (attributes | values).items():
                    setattr(results.staged[index], name, value)

            self._memo.program.append(attach)

        # The leaf itself stands between the parent's path and the attribute's.
        self._memo.push(frame, slot, [attributes[name] for name in names], list(map(Attribute, names)), finish)
