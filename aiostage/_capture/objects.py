"""Copying objects: as they say themselves, or through Python's copy protocol."""

from __future__ import annotations

import copyreg
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch

from aiostage._capture.frames import HIDDEN, STATE, Frame
from aiostage._capture.memo import Memo
from aiostage._capture.opaque import tensors_within
from aiostage._capture.versions import Witness
from aiostage.errors import UnsupportedLeafError
from aiostage.leaf import format_path

__all__ = ["copy_object"]


def copy_object(memo: Memo, source: Any, cls: type, frame: Frame, slot: int) -> None:
    """Copy an object through its ``__deepcopy__``, or begin to through what it reduces to.

    Raises:
        UnsupportedLeafError: If it cannot be copied.
    """
    if id(source) in memo.constructing:
        raise UnsupportedLeafError(
            f"{cls.__qualname__} contains itself in the arguments that rebuild it.",
            path=format_path(frame.path(slot)),
            remedy="Give it a __deepcopy__ or move the reference into its state.",
        )
    own_copy = getattr(source, "__deepcopy__", None)
    if own_copy is not None:
        _copy_opaque(memo, source, own_copy, frame, slot)
        return
    reductor = copyreg.dispatch_table.get(cls)
    try:
        reduced = reductor(source) if reductor is not None else source.__reduce_ex__(4)
    except Exception as error:
        raise _failed(memo, source, error, frame, slot) from error
    if isinstance(reduced, str):
        return
    memo.alive.append(reduced)
    memo.constructing.add(id(source))
    function, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
    # A Counter, for one, has its items in the arguments. The walk may be interrupted before those are copied.
    if isinstance(source, dict) and pairs is None:
        memo.witness.add_mapping(source, list(dict.keys(source)), list(dict.values(source)), frame, slot)
    elif isinstance(source, (list, deque)) and items is None:
        memo.witness.add_sequence(source, list(source), frame, slot)

    def make(arguments: list[Any]) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            raise _failed(memo, source, error, frame, slot) from error

    def finish(done: Frame) -> None:
        memo.constructing.discard(id(source))
        contents = _Contents(state, items, pairs)
        if done.depends(memo.program):
            index = memo.made_late(source, frame, slot)
            memo.calls_out = True
            memo.program.append(lambda results: results.put(index, make(done.filled(results))))
            _fill(memo, source, None, index, contents, frame, slot)
            return
        target = make(done.copies)
        memo.made(source, target, frame, slot)
        _fill(memo, source, target, None, contents, frame, slot)

    memo.push(frame, slot, list(arguments), (HIDDEN,) * len(arguments), finish)


def _fill(
    memo: Memo,
    source: object,
    target: Any,
    late: int | None,
    contents: _Contents,
    frame: Frame,
    slot: int,
) -> None:
    """Push the frame that gives a new object, or one yet to be made late, its state and items."""
    contents.witnessed(source, memo.witness, frame, slot)
    if not contents.children:
        return

    def apply(target: Any, children: list[Any]) -> None:
        try:
            contents.apply(target, children)
        except Exception as error:
            raise _failed(memo, source, error, frame, slot) from error

    def finish(done: Frame) -> None:
        memo.calls_out = memo.calls_out or late is not None or done.depends(memo.program)
        if late is not None:
            memo.program.append(lambda results: apply(results.late[late], done.filled(results)))
        elif done.depends(memo.program):
            memo.program.append(lambda results: apply(target, done.filled(results)))
        else:
            apply(target, done.copies)

    memo.push(frame, slot, contents.children, contents.steps, finish)


def _copy_opaque(memo: Memo, source: Any, own_copy: Callable[[dict[int, Any]], Any], frame: Frame, slot: int) -> None:
    """Let an object copy itself, with the tensors in it copied at once and known to it through the memo.

    It may compute with the copies, so they must have their values; staging them later would be wrong silently.
    """
    mine = set()
    memory = set()
    for tensor in tensors_within(source):
        index, new = memo.leaves.add(tensor)
        if new:
            memo.origins.append((index, frame, slot))
        if index not in memo.leaves.given:
            try:
                memo.leaves.given[index] = memo.leaves.copy_now(tensor)
            except Exception as error:
                raise _failed(memo, source, error, frame, slot) from error
        copy = memo.copies[id(tensor)] = memo.leaves.given[index]
        mine.add(id(copy))
        memory.add(_memory_of(tensor))
    try:
        result = own_copy(memo.copies)
    except Exception as error:
        raise _failed(memo, source, error, frame, slot) from error
    for tensor in tensors_within(result):
        if id(tensor) not in mine and (_memory_of(tensor) in memory or tensor.device.type != "cpu"):
            raise UnsupportedLeafError(
                f"the __deepcopy__ of {type(source).__qualname__} returned a tensor that is not a copy in host "
                f"memory ({tensor.dtype} {tuple(tensor.shape)} on {tensor.device}).",
                path=format_path(frame.path(slot)),
                remedy="Copy tensors with copy.deepcopy(tensor, memo) in it, or use passthrough for the object.",
            )
    memo.made(source, result, frame, slot)


def _failed(memo: Memo, source: object, error: Exception, frame: Frame, slot: int) -> UnsupportedLeafError:
    if isinstance(error, UnsupportedLeafError):
        return error
    return UnsupportedLeafError(
        f"{type(source).__qualname__} cannot be copied: {type(error).__name__}: {error}.",
        path=format_path(frame.path(slot)),
        remedy="Give it a __deepcopy__ or __reduce__, or leave it out with passthrough.",
    )


class _Contents:
    """What Python's copy protocol puts into a new object: state, list items and dict items."""

    def __init__(self, state: Any, items: Iterable[Any] | None, pairs: Iterable[tuple[Any, Any]] | None) -> None:
        self.has_state = state is not None
        self.state = state
        self.has_items = items is not None
        self.has_pairs = pairs is not None
        self.items = list(items) if items is not None else []
        self.keys: list[Any] = []
        self.values: list[Any] = []
        for key, value in pairs if pairs is not None else ():
            self.keys.append(key)
            self.values.append(value)
        self.children = [*([state] if self.has_state else ()), *self.items, *self.keys, *self.values]
        self.steps = [*([STATE] if self.has_state else ()), *range(len(self.items)), *self.keys, *self.keys]

    def witnessed(self, source: object, witness: Witness, frame: Frame, slot: int) -> None:
        """Note what the source holds, where that can be looked at again."""
        if isinstance(source, dict) and self.has_pairs:
            witness.add_mapping(source, self.keys, self.values, frame, slot)
        elif isinstance(source, (list, deque)) and self.has_items:
            witness.add_sequence(source, self.items, frame, slot)
        elif isinstance(source, set):
            witness.add_set(source, frame, slot)
        if isinstance(self.state, tuple) and len(self.state) == 2 and isinstance(self.state[1], dict):
            witness.add_slots(source, self.state[1], frame, slot)

    def apply(self, target: Any, children: list[Any]) -> None:
        """Put copies into an object, as :func:`copy.deepcopy` does."""
        position = 0
        if self.has_state:
            position = 1
            _set_state(target, children[0])
        for item in children[position : position + len(self.items)]:
            target.append(item)
        position += len(self.items)
        keys = children[position : position + len(self.keys)]
        for key, value in zip(keys, children[position + len(self.keys) :], strict=True):
            target[key] = value


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


def _memory_of(tensor: torch.Tensor) -> object:
    """Return what two tensors have in common exactly when they share a storage."""
    return tensor.untyped_storage()._cdata if torch._C._has_storage(tensor) else id(tensor)
