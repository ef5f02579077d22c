"""Copying Python's containers; what can only be made around staged tensors is left to the program."""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

from aiostage._capture.frames import STATE, Frame
from aiostage._capture.memo import ATOMIC, Memo
from aiostage._capture.rebuild import Results
from aiostage.leaf import Attribute

__all__ = ["copy_list", "copy_mapping", "copy_method", "copy_ordered_dict", "copy_tuple"]

_BULK = 512
"""Leaves inserted at once."""


def copy_mapping(memo: Memo, source: dict[Any, Any], target: dict[Any, Any], frame: Frame, slot: int) -> None:
    """Begin the copy of a dict, or of what is filled like one."""
    memo.made(source, target, frame, slot)
    keys = list(source)
    values = list(source.values())
    if frame.steps[slot] is STATE:
        memo.witness.add_attributes(source, values, frame, slot)
    else:
        memo.witness.add_mapping(source, keys, values, frame, slot)
    _copy_items(memo, target, keys, values, frame, slot)


def _copy_items(
    memo: Memo, target: dict[Any, Any], keys: list[Any], values: list[Any], frame: Frame, slot: int
) -> None:
    """Push a frame for the items of a mapping; keys that are not atomic are children like the values."""
    odd = [] if set(map(type, keys)) <= ATOMIC else [n for n, key in enumerate(keys) if type(key) not in ATOMIC]
    count = len(values)

    def insert(children: list[Any]) -> None:
        final = keys
        if odd:
            final = list(keys)
            for position, key in zip(odd, children[count:], strict=True):
                final[position] = key
        target.update(zip(final, children[:count] if odd else children, strict=True))

    def finish(done: Frame) -> None:
        if done.first_leaf is not None and not odd:
            _insert_leaves(memo, target, keys, done.first_leaf)
        # Hashing a key may read what the program has yet to fill in.
        elif done.incomplete() or (odd and done.depends(memo.program)):
            memo.program.append(lambda results: insert(done.filled(results)))
        else:
            insert(done.copies)

    odd_keys = [keys[n] for n in odd]
    steps: Sequence[object] = [*keys, *odd_keys] if odd else keys
    if frame.steps[slot] is STATE:
        steps = [Attribute(step) if type(step) is str else step for step in steps]
    memo.push(frame, slot, [*values, *odd_keys] if odd else values, steps, finish)


def _insert_leaves(memo: Memo, target: dict[Any, Any], keys: list[Any], first: int) -> None:
    """Let the program insert consecutive leaves, in steps that do not hold the event loop."""

    def insert(start: int, results: Results) -> None:
        part = keys[start : start + _BULK]
        target.update(zip(part, results.staged[first + start : first + start + len(part)], strict=True))

    memo.program += [partial(insert, start) for start in range(0, len(keys), _BULK)]


def copy_ordered_dict(memo: Memo, source: OrderedDict[Any, Any], frame: Frame, slot: int) -> None:
    """Begin the copy of an OrderedDict and of its attributes."""
    target: OrderedDict[Any, Any] = OrderedDict()
    copy_mapping(memo, source, target, frame, slot)
    state = vars(source)
    if state:
        # Module.state_dict() hangs _metadata here.
        names = list(state)
        memo.witness.add_attributes(state, list(state.values()), frame, slot)

        def finish(done: Frame) -> None:
            if done.incomplete():
                memo.program.append(lambda results: vars(target).update(zip(names, done.filled(results), strict=True)))
            else:
                vars(target).update(zip(names, done.copies, strict=True))

        memo.push(frame, slot, list(state.values()), list(map(Attribute, names)), finish)


def copy_list(memo: Memo, source: list[Any], frame: Frame, slot: int) -> None:
    """Begin the copy of a list."""
    target: list[Any] = []
    memo.made(source, target, frame, slot)
    children = list(source)
    memo.witness.add_sequence(source, children, frame, slot)

    def finish(done: Frame) -> None:
        if done.incomplete():
            memo.program.append(lambda results: target.extend(done.filled(results)))
        else:
            target.extend(done.copies)

    memo.push(frame, slot, children, range(len(children)), finish)


def copy_tuple(memo: Memo, source: tuple[Any, ...], frame: Frame, slot: int) -> None:
    """Begin the copy of a tuple; one whose children are all themselves again is kept, as copy.deepcopy does."""

    def finish(done: Frame) -> None:
        if memo.already(source, frame, slot):
            return
        if done.incomplete():
            index = memo.made_late(source, frame, slot)
            memo.program.append(lambda results: results.put(index, tuple(done.filled(results))))
        else:
            unchanged = all(copy is child for copy, child in zip(done.copies, done.sources, strict=True))
            memo.made(source, source if unchanged else tuple(done.copies), frame, slot)

    inside = frame.steps[slot] is STATE and len(source) == 2
    steps: Sequence[object] = (STATE, STATE) if inside else range(len(source))
    memo.push(frame, slot, list(source), steps, finish)


def copy_method(memo: Memo, source: types.MethodType, frame: Frame, slot: int) -> None:
    """Begin the copy of a bound method: the same function, bound to the copy of its object."""

    def finish(done: Frame) -> None:
        if done.incomplete():
            index = memo.made_late(source, frame, slot)
            memo.program.append(
                lambda results: results.put(index, types.MethodType(source.__func__, done.filled(results)[0]))
            )
        else:
            memo.made(source, types.MethodType(source.__func__, done.copies[0]), frame, slot)

    memo.push(frame, slot, [source.__self__], [Attribute("__self__")], finish)
