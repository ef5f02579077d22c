"""What a walk has met and made so far."""

from __future__ import annotations

import types
import weakref
from bisect import bisect_right
from collections.abc import Generator, Sequence
from operator import itemgetter
from typing import Any

import torch

from aiostage._capture.frames import Finish, Frame, released
from aiostage._capture.leaves import Leaves
from aiostage._capture.rebuild import Step
from aiostage._capture.versions import Witness
from aiostage.leaf import Attribute, Path

__all__ = ["ATOMIC", "Memo"]

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

_AT_ONCE = 128
"""Frames emptied between two yields."""


class Memo:
    """What ``memo`` is to :func:`copy.deepcopy`, and what is under way.

    Attributes:
        leaves: The tensors met.
        program: What is left to do once they are staged.
        witness: What the containers held.
        calls_out: Whether the program calls other people's code, which may look at the values of tensors.
        stack: The containers under way, the innermost last.
        copies: What has been copied, by the identity of its source, as ``__deepcopy__`` expects it.
        late: What the program will make, by the identity of its source: the index of its place in the results.
        alive: Keeps sources whose identity is a key, so that no other object comes by it.
        constructing: Identities of the objects whose constructor's arguments are under way.
        origins: Of each run of leaves: the index of the first, and where it was met.
    """

    def __init__(self) -> None:
        self.leaves = Leaves()
        self.program: list[Step] = []
        self.witness = Witness()
        self.calls_out = False
        self.stack: list[Frame] = []
        self.copies: dict[int, Any] = {}
        self.late: dict[int, int] = {}
        self.late_count = 0
        self.alive: list[object] = []
        self.constructing: set[int] = set()
        self.origins: list[tuple[int, Frame, int]] = []

    def push(
        self, parent: Frame | None, slot: int, sources: list[Any], steps: Sequence[object], finish: Finish
    ) -> None:
        """Begin a container: its children come next."""
        self.stack.append(Frame(parent, slot, sources, steps, finish, len(self.program)))

    def made(self, source: object, copy: Any, frame: Frame, slot: int) -> None:
        """Hand a copy to the parent, and remember it for whoever else refers to the source."""
        frame.copies[slot] = self.copies[id(source)] = copy
        self.alive.append(source)

    def made_late(self, source: object, frame: Frame, slot: int) -> int:
        """Reserve a place for a copy that only the program can make, and return its index."""
        index = self.late[id(source)] = self.late_count
        self.late_count += 1
        self.alive.append(source)
        frame.holes.append((slot, ~index))
        return index

    def already(self, source: object, frame: Frame, slot: int) -> bool:
        """Hand the copy of something met before to the parent; return False if it was not."""
        identity = id(source)
        if identity in self.copies:
            frame.copies[slot] = self.copies[identity]
        elif identity in self.late:
            frame.holes.append((slot, ~self.late[identity]))
        else:
            return False
        return True

    def path(self, leaf: int) -> Path:
        """Return the path of a leaf: the first that led to it."""
        while leaf in self.leaves.owners:
            leaf = self.leaves.owners[leaf]
        start, frame, slot = self.origins[bisect_right(self.origins, leaf, key=itemgetter(0)) - 1]
        return frame.path(slot + leaf - start)

    def release(self) -> None:
        """Let go of the source and of the copy; only paths can be asked for from now on.

        Frames, closures and copies refer to each other in circles. Left to the garbage collector they would keep the
        staged tree, and with it the arena, long after its last user.
        """
        self.program.clear()
        self.witness = Witness()
        self.leaves.release()
        for held in (self.copies, self.late, self.alive, self.stack):
            held.clear()
        for _ in self.releasing():
            pass

    def releasing(self) -> Generator[None, None, None]:
        """Let go of what the frames hold, yielding between small steps."""
        for number, (_, origin, _) in enumerate(self.origins):
            frame: Frame | None = origin
            while frame is not None and frame.finish is not released:
                frame.finish = released
                frame.sources = frame.copies = []
                frame.holes = []
                frame = frame.parent
            if number % _AT_ONCE == 0:
                yield
