"""A cooperative deep copy of everything that is not a tensor.

The walk follows :func:`copy.deepcopy` object by object, but keeps its own stack, so that nesting is bounded by memory
and not by the recursion limit, and yields between small steps, so that an event loop can interrupt it. Containers are
copied while they are met; what needs a staged tensor before it can be made (a tuple around a tensor, say) is written
down as a program that runs when the tensors are there.
"""

from __future__ import annotations

import copyreg
import types
import weakref
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import torch

from aiostage._capture.faithful import PLAIN_CLASSES, Refusal
from aiostage._capture.leaves import Leaves
from aiostage._capture.opaque import tensors_within
from aiostage._capture.rebuild import Holes, Results, Step
from aiostage._capture.versions import Witness
from aiostage.errors import UnsupportedLeafError
from aiostage.leaf import Attribute, Path, format_path

__all__ = ["Walk"]

_ATOMIC = frozenset(
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

_MANY = 64
"""Children looked at one by one between two yields."""

_BULK = 512
"""Children taken at once when they are all alike."""

_Finish = Callable[["_Frame"], None]


class _Inside:
    """A step of a path that does not show."""

    __slots__ = ()


_STATE = _Inside()
"""Leads to an object's state, whose keys are the object's attributes."""

_HIDDEN = _Inside()
"""Leads to what only Python's copy protocol has a name for."""


class _Frame:
    """One container under way: its children, their copies so far, and what to do when all are known."""

    __slots__ = (
        "copies",
        "finish",
        "first_leaf",
        "holes",
        "parent",
        "position",
        "program_start",
        "slot",
        "sources",
        "steps",
    )

    def __init__(
        self,
        parent: _Frame | None,
        slot: int,
        sources: list[Any],
        steps: Sequence[object],
        finish: _Finish,
        program_start: int,
    ) -> None:
        self.parent = parent
        self.slot = slot
        self.sources = sources
        self.steps = steps
        self.finish = finish
        self.program_start = program_start
        self.copies = list(sources)
        self.holes: Holes = []
        self.first_leaf: int | None = None
        self.position = 0

    def depends(self, program: Sequence[Step]) -> bool:
        """Return whether anything below is only made by the program."""
        return bool(self.holes) or self.first_leaf is not None or len(program) > self.program_start

    def spread(self) -> None:
        """Give up that all children are consecutive leaves."""
        if self.first_leaf is not None:
            self.holes += [(slot, self.first_leaf + slot) for slot in range(self.position)]
            self.first_leaf = None

    def filled(self, results: Results) -> list[Any]:
        """Return the copies of all children."""
        if self.first_leaf is not None:
            return results.staged[self.first_leaf : self.first_leaf + len(self.sources)]
        return results.fill(self.copies, self.holes)

    def incomplete(self) -> bool:
        """Return whether some child is only made by the program."""
        return bool(self.holes) or self.first_leaf is not None

    def path(self, slot: int) -> Path:
        """Return the path of a child."""
        steps: list[object] = []
        frame = self
        while True:
            step = frame.steps[slot]
            if not isinstance(step, _Inside):
                steps.append(step)
            if frame.parent is None:
                break
            frame, slot = frame.parent, frame.slot
        return tuple(reversed(steps))


class Walk:
    """One walk over one state dict.

    Args:
        passthrough: Says which objects are put into the staged tree uncopied.

    Attributes:
        leaves: The tensors met.
        program: What is left to do once they are staged.
        witness: What the containers held.
        calls_out: Whether the program calls other people's code, which may look at the values of tensors.
        root: Reference to the result.
    """

    def __init__(self, *, passthrough: Callable[[Path, object], bool] | None = None) -> None:
        self.leaves = Leaves()
        self.program: list[Step] = []
        self.witness = Witness()
        self.calls_out = False
        self._passthrough = passthrough
        self._stack: list[_Frame] = []
        self._memo: dict[int, Any] = {}
        self._late: dict[int, int] = {}
        self._late_count = 0
        self._constructing: set[int] = set()
        self._alive: list[object] = []
        self._origins: list[tuple[int, _Frame, int]] = []
        self._root: Any = None
        self._root_reference: int | None = None

    def run(self, state_dict: object) -> Generator[None, None, None]:
        """Walk the tree, yielding between small steps.

        Raises:
            UnsupportedLeafError: If something in the tree cannot be copied.
        """
        self._push(None, 0, [state_dict], (_HIDDEN,), self._finish_root)
        while self._stack:
            frame = self._stack[-1]
            if frame.position < len(frame.sources):
                self._advance(frame)
            else:
                self._stack.pop()
                frame.finish(frame)
            yield

    def results(self, staged: list[Any]) -> Results:
        """Return what the program's steps work on."""
        return Results(staged, self._late_count)

    def tree(self, results: Results) -> Any:
        """Return the staged tree, once the program has run."""
        return self._root if self._root_reference is None else results[self._root_reference]

    def release(self) -> None:
        """Let go of the source and of the copy; only paths can be asked for from now on.

        Frames, closures and copies refer to each other in circles. Left to the garbage collector they would keep the
        staged tree, and with it the arena, long after its last user.
        """
        self.program.clear()
        self.witness = Witness()
        self.leaves.release()
        for held in (self._memo, self._late, self._alive, self._stack):
            held.clear()
        self._root = None
        for _, origin, _ in self._origins:
            frame: _Frame | None = origin
            while frame is not None and frame.finish is not _released:
                frame.finish = _released
                frame.sources = frame.copies = []
                frame.holes = []
                frame = frame.parent

    def path(self, leaf: int) -> Path:
        """Return the path of a leaf: the first that led to it."""
        while leaf in self.leaves.owners:
            leaf = self.leaves.owners[leaf]
        start, frame, slot = self._origins[bisect_right(self._origins, leaf, key=itemgetter(0)) - 1]
        return frame.path(slot + leaf - start)

    def unsupported(self, path: Path, refusal: Refusal) -> UnsupportedLeafError:
        """Return the error for a refusal at a path."""
        return UnsupportedLeafError(refusal.reason, path=format_path(path), remedy=refusal.remedy)

    # Frames

    def _push(
        self, parent: _Frame | None, slot: int, sources: list[Any], steps: Sequence[object], finish: _Finish
    ) -> None:
        self._stack.append(_Frame(parent, slot, sources, steps, finish, len(self.program)))

    def _finish_root(self, frame: _Frame) -> None:
        self._root = frame.copies[0]
        if frame.first_leaf is not None:
            self._root_reference = frame.first_leaf
        elif frame.holes:
            self._root_reference = frame.holes[0][1]

    def _advance(self, frame: _Frame) -> None:
        """Look at some of a frame's children, up to the first that needs a frame of its own."""
        begin = frame.position
        if self._take_alike(frame, begin):
            return
        frame.spread()
        depth = len(self._stack)
        for slot in range(begin, min(len(frame.sources), begin + _MANY)):
            frame.position = slot + 1
            child = frame.sources[slot]
            cls = type(child)
            if cls in _ATOMIC:
                continue
            self._enter(child, cls, frame, slot)
            if len(self._stack) > depth:
                return

    def _take_alike(self, frame: _Frame, begin: int) -> bool:
        """Take many children at once if they are all atomic, or all plain tensors not met before."""
        chunk = frame.sources[begin : begin + _BULK]
        classes = set(map(type, chunk))
        if classes <= _ATOMIC:
            frame.spread()
        elif self._passthrough is not None or not classes <= PLAIN_CLASSES:
            return False
        else:
            start = self.leaves.extend(chunk)
            if start is None:
                return False
            self._origins.append((start, frame, begin))
            if begin == 0:
                frame.first_leaf = start
            elif frame.first_leaf is None:
                frame.holes += zip(range(begin, begin + len(chunk)), range(start, start + len(chunk)), strict=True)
        frame.position = begin + len(chunk)
        return True

    def _enter(self, child: Any, cls: type, frame: _Frame, slot: int) -> None:
        """Copy one child, or push the frame that will."""
        identity = id(child)
        if identity in self._memo:
            frame.copies[slot] = self._memo[identity]
        elif identity in self._late:
            frame.holes.append((slot, ~self._late[identity]))
        elif self._passthrough is not None and self._passthrough(frame.path(slot), child):
            return
        elif issubclass(cls, torch.Tensor):
            self._tensor(child, frame, slot)
        elif cls is dict:
            self._mapping(child, {}, frame, slot)
        elif cls is OrderedDict:
            self._ordered_dict(child, frame, slot)
        elif cls is list:
            self._list(child, frame, slot)
        elif cls is tuple:
            self._tuple(child, frame, slot)
        elif cls is types.MethodType:
            self._method(child, frame, slot)
        elif not issubclass(cls, type):
            self._object(child, cls, frame, slot)

    # Where a copy goes

    def _made(self, source: object, copy: Any, frame: _Frame, slot: int) -> None:
        """Hand a copy to the parent, and remember it for whoever else refers to the source."""
        frame.copies[slot] = self._memo[id(source)] = copy
        self._alive.append(source)

    def _made_late(self, source: object, frame: _Frame, slot: int) -> int:
        """Reserve a place for a copy that only the program can make, and return its index."""
        index = self._late[id(source)] = self._late_count
        self._late_count += 1
        self._alive.append(source)
        frame.holes.append((slot, ~index))
        return index

    # Tensors

    def _tensor(self, tensor: torch.Tensor, frame: _Frame, slot: int) -> None:
        index, new = self.leaves.add(tensor)
        frame.holes.append((slot, index))
        if not new:
            return
        self._origins.append((index, frame, slot))
        try:
            composite = self.leaves.composite(index)
        except Refusal as refusal:
            raise self.unsupported(frame.path(slot), refusal) from None
        owned = composite.owned_attributes if composite is not None else frozenset()
        attributes = {name: value for name, value in vars(tensor).items() if name not in owned}
        if type(tensor) not in PLAIN_CLASSES:
            names = copyreg._slotnames(type(tensor))  # type: ignore[attr-defined]
            attributes |= {name: getattr(tensor, name) for name in names if hasattr(tensor, name)}
        if attributes:
            self._attributes(index, attributes, frame, slot)

    def _attributes(self, index: int, attributes: dict[str, Any], frame: _Frame, slot: int) -> None:
        # A bound method on a tensor (a weight loader, say) is code, and the module behind it is no part of the tensor.
        names = [name for name, value in attributes.items() if type(value) is not types.MethodType]

        def finish(done: _Frame) -> None:
            def attach(results: Results) -> None:
                values = dict(zip(names, done.filled(results), strict=True))
                for name, value in (attributes | values).items():
                    setattr(results.staged[index], name, value)

            self.program.append(attach)

        # The leaf itself stands between the parent's path and the attribute's.
        self._push(frame, slot, [attributes[name] for name in names], list(map(Attribute, names)), finish)

    # Containers

    def _mapping(self, source: dict[Any, Any], target: dict[Any, Any], frame: _Frame, slot: int) -> None:
        self._made(source, target, frame, slot)
        keys = list(source)
        self.witness.add_mapping(source, keys, list(source.values()), frame, slot)
        self._items(target, keys, list(source.values()), frame, slot)

    def _items(self, target: dict[Any, Any], keys: list[Any], values: list[Any], frame: _Frame, slot: int) -> None:
        """Push a frame for the items of a mapping; keys that are not atomic are children like the values."""
        odd = [] if set(map(type, keys)) <= _ATOMIC else [n for n, key in enumerate(keys) if type(key) not in _ATOMIC]
        count = len(values)

        def insert(children: list[Any]) -> None:
            final = keys
            if odd:
                final = list(keys)
                for position, key in zip(odd, children[count:], strict=True):
                    final[position] = key
            target.update(zip(final, children[:count] if odd else children, strict=True))

        def finish(done: _Frame) -> None:
            if done.first_leaf is not None and not odd:
                self._insert_leaves(target, keys, done.first_leaf)
            # Hashing a key may read what the program has yet to fill in.
            elif done.incomplete() or (odd and done.depends(self.program)):
                self.program.append(lambda results: insert(done.filled(results)))
            else:
                insert(done.copies)

        odd_keys = [keys[n] for n in odd]
        steps: Sequence[object] = [*keys, *odd_keys] if odd else keys
        if frame.steps[slot] is _STATE:
            steps = [Attribute(step) if type(step) is str else step for step in steps]
        self._push(frame, slot, [*values, *odd_keys] if odd else values, steps, finish)

    def _insert_leaves(self, target: dict[Any, Any], keys: list[Any], first: int) -> None:
        """Let the program insert consecutive leaves, in steps that do not hold the event loop."""

        def insert(start: int, results: Results) -> None:
            part = keys[start : start + _BULK]
            target.update(zip(part, results.staged[first + start : first + start + len(part)], strict=True))

        self.program += [partial(insert, start) for start in range(0, len(keys), _BULK)]

    def _ordered_dict(self, source: OrderedDict[Any, Any], frame: _Frame, slot: int) -> None:
        target: OrderedDict[Any, Any] = OrderedDict()
        self._mapping(source, target, frame, slot)
        state = vars(source)
        if state:
            # Module.state_dict() hangs _metadata here.
            names = list(state)
            self.witness.add_mapping(state, names, list(state.values()), frame, slot)

            def finish(done: _Frame) -> None:
                if done.incomplete():
                    self.program.append(
                        lambda results: vars(target).update(zip(names, done.filled(results), strict=True))
                    )
                else:
                    vars(target).update(zip(names, done.copies, strict=True))

            self._push(frame, slot, list(state.values()), list(map(Attribute, names)), finish)

    def _list(self, source: list[Any], frame: _Frame, slot: int) -> None:
        target: list[Any] = []
        self._made(source, target, frame, slot)
        children = list(source)
        self.witness.add_sequence(source, children, frame, slot)

        def finish(done: _Frame) -> None:
            if done.incomplete():
                self.program.append(lambda results: target.extend(done.filled(results)))
            else:
                target.extend(done.copies)

        self._push(frame, slot, children, range(len(children)), finish)

    def _tuple(self, source: tuple[Any, ...], frame: _Frame, slot: int) -> None:
        def finish(done: _Frame) -> None:
            if self._already(source, frame, slot):
                return
            if done.incomplete():
                index = self._made_late(source, frame, slot)
                self.program.append(lambda results: results.put(index, tuple(done.filled(results))))
            else:
                unchanged = all(copy is child for copy, child in zip(done.copies, done.sources, strict=True))
                self._made(source, source if unchanged else tuple(done.copies), frame, slot)

        inside = frame.steps[slot] is _STATE and len(source) == 2
        steps: Sequence[object] = (_STATE, _STATE) if inside else range(len(source))
        self._push(frame, slot, list(source), steps, finish)

    def _already(self, source: object, frame: _Frame, slot: int) -> bool:
        """Return whether a cycle has led to an immutable object again, and made its copy further in."""
        identity = id(source)
        if identity in self._memo:
            frame.copies[slot] = self._memo[identity]
        elif identity in self._late:
            frame.holes.append((slot, ~self._late[identity]))
        else:
            return False
        return True

    def _method(self, source: types.MethodType, frame: _Frame, slot: int) -> None:
        def finish(done: _Frame) -> None:
            if done.incomplete():
                index = self._made_late(source, frame, slot)
                self.program.append(
                    lambda results: results.put(index, types.MethodType(source.__func__, done.filled(results)[0]))
                )
            else:
                self._made(source, types.MethodType(source.__func__, done.copies[0]), frame, slot)

        self._push(frame, slot, [source.__self__], [Attribute("__self__")], finish)

    # Objects

    def _object(self, source: Any, cls: type, frame: _Frame, slot: int) -> None:
        if id(source) in self._constructing:
            raise UnsupportedLeafError(
                f"{cls.__qualname__} contains itself in the arguments that rebuild it.",
                path=format_path(frame.path(slot)),
                remedy="Give it a __deepcopy__ or move the reference into its state.",
            )
        own_copy = getattr(source, "__deepcopy__", None)
        if own_copy is not None:
            self._opaque(source, own_copy, frame, slot)
            return
        reductor = copyreg.dispatch_table.get(cls)
        try:
            reduced = reductor(source) if reductor is not None else source.__reduce_ex__(4)
        except Exception as error:
            raise self._failed(source, error, frame, slot) from error
        if isinstance(reduced, str):
            return
        self._alive.append(reduced)
        self._constructing.add(id(source))
        function, arguments, state, items, pairs = (*reduced, None, None, None)[:5]

        def make(arguments: list[Any]) -> Any:
            try:
                return function(*arguments)
            except Exception as error:
                raise self._failed(source, error, frame, slot) from error

        def finish(done: _Frame) -> None:
            self._constructing.discard(id(source))
            contents = _Contents(state, items, pairs)
            if done.depends(self.program):
                index = self._made_late(source, frame, slot)
                self.calls_out = True
                self.program.append(lambda results: results.put(index, make(done.filled(results))))
                self._fill(source, None, index, contents, frame, slot)
                return
            target = make(done.copies)
            self._made(source, target, frame, slot)
            self._fill(source, target, None, contents, frame, slot)

        self._push(frame, slot, list(arguments), (_HIDDEN,) * len(arguments), finish)

    def _fill(
        self,
        source: object,
        target: Any,
        late: int | None,
        contents: _Contents,
        frame: _Frame,
        slot: int,
    ) -> None:
        """Push the frame that gives a new object, or one yet to be made late, its state and items."""
        contents.witnessed(source, self.witness, frame, slot)
        if not contents.children:
            return

        def apply(target: Any, children: list[Any]) -> None:
            try:
                contents.apply(target, children)
            except Exception as error:
                raise self._failed(source, error, frame, slot) from error

        def finish(done: _Frame) -> None:
            self.calls_out = self.calls_out or late is not None or done.depends(self.program)
            if late is not None:
                self.program.append(lambda results: apply(results.late[late], done.filled(results)))
            elif done.depends(self.program):
                self.program.append(lambda results: apply(target, done.filled(results)))
            else:
                apply(target, done.copies)

        self._push(frame, slot, contents.children, contents.steps, finish)

    def _opaque(self, source: Any, own_copy: Callable[[dict[int, Any]], Any], frame: _Frame, slot: int) -> None:
        """Let an object copy itself, with the tensors in it copied at once and known to it through the memo.

        It may compute with the copies, so they must have their values; staging them later would be wrong silently.
        """
        mine = set()
        memory = set()
        for tensor in tensors_within(source):
            index, new = self.leaves.add(tensor)
            if new:
                self._origins.append((index, frame, slot))
            if index not in self.leaves.given:
                try:
                    self.leaves.given[index] = self.leaves.copy_now(tensor)
                except Exception as error:
                    raise self._failed(source, error, frame, slot) from error
            copy = self._memo[id(tensor)] = self.leaves.given[index]
            mine.add(id(copy))
            memory.add(_memory_of(tensor))
        try:
            result = own_copy(self._memo)
        except Exception as error:
            raise self._failed(source, error, frame, slot) from error
        for tensor in tensors_within(result):
            if id(tensor) not in mine and (_memory_of(tensor) in memory or tensor.device.type != "cpu"):
                raise UnsupportedLeafError(
                    f"the __deepcopy__ of {type(source).__qualname__} returned a tensor that is not a copy in host "
                    f"memory ({tensor.dtype} {tuple(tensor.shape)} on {tensor.device}).",
                    path=format_path(frame.path(slot)),
                    remedy="Copy tensors with copy.deepcopy(tensor, memo) in it, or use passthrough for the object.",
                )
        self._made(source, result, frame, slot)

    def _failed(self, source: object, error: Exception, frame: _Frame, slot: int) -> UnsupportedLeafError:
        if isinstance(error, UnsupportedLeafError):
            return error
        return UnsupportedLeafError(
            f"{type(source).__qualname__} cannot be copied: {type(error).__name__}: {error}.",
            path=format_path(frame.path(slot)),
            remedy="Give it a __deepcopy__ or __reduce__, or leave it out with passthrough.",
        )


def _released(frame: _Frame) -> None:
    """Stand where a frame's end was, once it can no longer come."""


class _Contents:
    """What Python's copy protocol puts into a new object: state, list items and dict items."""

    def __init__(self, state: Any, items: Iterable[Any] | None, pairs: Iterable[tuple[Any, Any]] | None) -> None:
        self.has_state = state is not None
        self.state = state
        self.items = list(items) if items is not None else []
        self.keys: list[Any] = []
        self.values: list[Any] = []
        for key, value in pairs if pairs is not None else ():
            self.keys.append(key)
            self.values.append(value)
        self.children = [*([state] if self.has_state else ()), *self.items, *self.keys, *self.values]
        self.steps = [*([_STATE] if self.has_state else ()), *range(len(self.items)), *self.keys, *self.keys]

    def witnessed(self, source: object, witness: Witness, frame: _Frame, slot: int) -> None:
        """Note what the source holds, where that can be looked at again."""
        if isinstance(source, dict):
            witness.add_mapping(source, self.keys, self.values, frame, slot)
        elif isinstance(source, (list, deque)):
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
