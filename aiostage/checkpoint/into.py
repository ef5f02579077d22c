"""Compares a live tree with a loaded one, and finds what has to be done to make the live one equal.

Tensors, dicts and lists of the live tree stay the same objects and take new values, since optimizers and other code
refer to them. Everything else is a value, which is replaced. A tuple in which a value is replaced is made anew, around
the same tensors. Nothing is changed here.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.nn.parameter import is_lazy

from aiostage._copy.targets import Pair, shared_unlike
from aiostage.checkpoint.live_tuples import LiveTuple, Where, is_around, made_anew, merged
from aiostage.checkpoint.live_values import (
    SIMPLE,
    are_equal,
    are_wrappers,
    has_state,
    has_tensors,
    is_own,
    is_state,
    parts_of,
    why_not,
)
from aiostage.checkpoint.transfer import TensorPair, Transfer
from aiostage.errors import SHOWN_PATHS, CheckpointMismatchError, listed, shown
from aiostage.format.classes import PlainObject, slots_of
from aiostage.format.nodes import LEFT_OUT
from aiostage.format.tensors import extra_attributes
from aiostage.leaf import Attribute, LinkedPath, Path, format_path, unlinked

__all__ = ["Fit", "StrictOption", "compare"]

_logger = logging.getLogger("aiostage")

StrictOption: TypeAlias = bool | Callable[[list[str], list[str]], object]
"""Whether the same leaves are needed; or what is called with the paths of those missing and of those unexpected."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How well a checkpoint has to fit a live tree.

    Attributes:
        strict: Whether it needs the same leaves.
        cast: Whether floating-point tensors take values of another floating-point dtype.
        name: The name of the checkpoint, for warnings.
    """

    strict: StrictOption = True
    cast: bool = False
    name: str = ""

    def report(self, missing: list[str], unexpected: list[str]) -> None:
        """Tell of leaves that only one of the two has, when that is not an error."""
        if callable(self.strict):
            self.strict(missing, unexpected)
            return
        for paths, what in ((missing, "missing from"), (unexpected, "unexpected in")):
            if paths:
                _logger.warning(
                    "%d leaves are %s %s and were left out: %s",
                    len(paths),
                    what,
                    self.name,
                    listed(paths[:SHOWN_PATHS]),
                )


STRICT = Fit()
"""The same leaves, of the same dtypes."""


_YIELD_EVERY = 64
"""Values between two yields. A guess: comparing one takes some microseconds."""


def compare(
    live: Any,
    loaded: Any,
    wanted: Callable[[Path], bool] | None = None,
    *,
    inference: bool = False,
    fit: Fit = STRICT,
    stateful: Collection[int] = (),
) -> Generator[None, None, Transfer]:
    """Compare two trees without changing either, yielding now and then.

    Dicts, lists and tuples are compared key by key, and so are other objects whose live ones have tensors in them. A
    tensor fits a tensor of the same shape and dtype; anything else is a value, and the loaded one takes the live one's
    place. A tuple in which it does is made anew.

    Args:
        live: The tree that is to be changed.
        loaded: The tree with the new values, which the live one will own in part. What is left out of it is left alone.
        wanted: Whether what is at a path is wanted, with all below it; only that can be missing. None: everything is.
        inference: Whether the caller is in inference mode, and may change tensors that were made in it.
        fit: How well the two have to fit.
        stateful: The ids of live objects that take a loaded value as their state.

    Returns:
        What has to be done, without copies.

    Raises:
        CheckpointMismatchError: If the trees do not fit, with every place where they do not.
    """
    comparison = _Comparison(wanted, inference=inference, cast=fit.cast, stateful=stateful)
    yield from comparison.run(live, loaded)
    yield from comparison.check_ties()
    differ = bool(comparison.missing or comparison.unexpected)
    if comparison.mismatched or (differ and fit.strict and not callable(fit.strict)):
        raise CheckpointMismatchError(
            missing=comparison.missing, unexpected=comparison.unexpected, mismatched=comparison.mismatched
        )
    if differ:
        fit.report(comparison.missing, comparison.unexpected)
    transfer = Transfer()
    transfer.states = comparison.states
    transfer.assignments = comparison.assignments
    transfer.found = comparison.found
    transfer.pairs = comparison.pairs
    return transfer


class _Comparison:
    """A walk through two trees side by side."""

    def __init__(
        self, wanted: Callable[[Path], bool] | None, *, inference: bool, cast: bool, stateful: Collection[int]
    ) -> None:
        self._wanted = wanted
        self._inference = inference
        self._cast = cast
        self._stateful = stateful
        self.states: list[tuple[Any, Any]] = []
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.mismatched: list[str] = []
        self.pairs: list[TensorPair] = []
        self.assignments: list[tuple[Any, Any, Any]] = []
        self.found: list[tuple[LinkedPath, Any, Any, Any]] = []
        self._seen: set[tuple[int, int]] = set()
        # By the id of a live tensor without a gradient, the new one that it gets.
        self._gradients: dict[int, torch.Tensor] = {}
        # By the id of a container and a key, what is put there.
        self._assigned: dict[tuple[int, Any], Any] = {}
        self._todo: list[tuple[LinkedPath, Any, Any, Where]] = []
        # Whether tuples have something in them that stays, by their ids.
        self._live_tuples: dict[int, bool] = {}
        self._loaded_tuples: dict[int, bool] = {}
        # By the ids of a live tuple and the loaded one.
        self._tuples: dict[tuple[int, int], LiveTuple] = {}
        self._first_pairs: dict[int, LiveTuple] = {}
        self._changed_tuples: list[LiveTuple] = []

    def run(self, live: Any, loaded: Any) -> Generator[None, None, None]:
        """Walk both trees."""
        # A stack of its own, because trees may be deeper than Python's. Each entry has the path, both values, and the
        # container and key where the live one is: None where no value can be put, at the root and in frozen objects.
        self._todo.append((None, live, loaded, None))
        count = 0
        while self._todo:
            place, mine, theirs, where = self._todo.pop()
            yield from self._visit(place, mine, theirs, where)
            count += 1
            if count % _YIELD_EVERY == 0:
                yield
        put, refused = yield from made_anew(self._changed_tuples)
        self.assignments += put
        for place, reason in refused:
            self._mismatch(place, f"{reason} in what cannot be changed")

    def _visit(self, place: LinkedPath, live: Any, loaded: Any, where: Where) -> Generator[None, None, None]:
        if loaded is LEFT_OUT:
            return
        if id(live) in self._stateful:
            if not self._is_wanted_whole(place):
                self._mismatch(place, f"only a part was chosen of the state of a {type(live).__name__}")
            else:
                self.states.append((live, loaded))
                self._find(place, live, where)
            return
        if type(loaded) is PlainObject and type(live) is not PlainObject:
            self._mismatch(
                place, f"a {loaded.class_name} that was loaded without its class: pass classes=[{type(live).__name__}]"
            )
            return
        if are_wrappers(live, loaded):
            names = live.__tensor_flatten__()[0]
            for name in names:
                self._todo.append(((Attribute(name), place), getattr(live, name), getattr(loaded, name), None))
            self._find(place, live, where)
            self._visit_gradient(place, live, loaded)
            self._visit_attributes(place, live, loaded, names)
            return
        if isinstance(live, torch.Tensor) and isinstance(loaded, torch.Tensor) and is_lazy(live) and is_lazy(loaded):
            # Neither has a value yet.
            self._find(place, live, where)
            self._visit_attributes(place, live, loaded)
        elif isinstance(live, torch.Tensor) or isinstance(loaded, torch.Tensor):
            reason = why_not(live, loaded, inference=self._inference, cast=self._cast)
            if reason is None:
                self.pairs.append((place, live, loaded))
                self._find(place, live, where)
                self._visit_gradient(place, live, loaded)
                self._visit_attributes(place, live, loaded)
            else:
                self._mismatch(place, reason)
        elif isinstance(live, (dict, list, tuple)) and _same_kind(live, loaded):
            # A tuple without tensors and containers is a value and replaced as a whole, as betas of an optimizer are.
            # What is in any other tuple is compared, also one with objects that have tensors in them; it stays, unless
            # a value in it is another.
            if (
                isinstance(live, tuple)
                and where is not None
                and not is_around(live, _is_kept, self._live_tuples)
                and not is_around(loaded, is_state, self._loaded_tuples)
            ):
                filled = merged(live, loaded)
                if filled is None:
                    self._mismatch(place, f"{len(loaded)} places, some of them left out, instead of {len(live)}")
                else:
                    self._assign(place, where, filled)
            else:
                pair = (id(live), id(loaded))
                if isinstance(live, tuple):
                    # In every place, because a new one takes its place in each.
                    known = self._tuples.get(pair)
                    if known is None:
                        known = self._tuples[pair] = LiveTuple(live)
                    known.wheres.append(where)
                    other = self._first_pairs.setdefault(id(live), known)
                    if other is not known:
                        # Several loaded ones for one live tuple: only what is in it already can be had in all places.
                        known.wheres.append(None)
                        other.wheres.append(None)
                if isinstance(live, tuple) or pair not in self._seen:
                    self._find(place, live, where)
                if pair not in self._seen:
                    self._seen.add(pair)
                    yield from self._descend(place, live, loaded)
        elif has_state(live) or has_state(loaded):
            self._mismatch(place, f"a {type(loaded).__name__} into a {type(live).__name__}")
        elif has_tensors(live):
            if (id(live), id(loaded)) not in self._seen:
                self._seen.add((id(live), id(loaded)))
                self._find(place, live, where)
                yield from self._visit_object(place, live, loaded)
        elif where is not None:
            self._assign(place, where, loaded)
        elif not are_equal(live, loaded):
            self._mismatch(place, f"{_instead(live, loaded)} in what cannot be changed")

    def _descend(self, place: LinkedPath, live: Any, loaded: Any) -> Generator[None, None, None]:
        container = self._tuples[id(live), id(loaded)] if isinstance(live, tuple) else live
        if isinstance(live, dict):
            mine, theirs = live, loaded
        else:
            mine, theirs = dict(enumerate(live)), dict(enumerate(loaded))
        found = []
        for count, (key, value) in enumerate(mine.items()):
            here = (key, place)
            if key in theirs:
                found.append((here, value, theirs[key], (container, key)))
            elif (yield from self._misses(here, value)):
                self.missing.append(format_path(unlinked(here)))
            if count % _YIELD_EVERY == 0:
                yield
        for count, key in enumerate(theirs):
            if key not in mine:
                self.unexpected.append(format_path(unlinked((key, place))))
            if count % _YIELD_EVERY == 0:
                yield
        self._todo += reversed(found)
        self._visit_attributes(place, live, loaded)

    def _visit_object(self, place: LinkedPath, live: Any, loaded: Any) -> Generator[None, None, None]:
        """Compare two objects, the live one of which has tensors in it: with another object these would be lost."""
        mine, theirs = parts_of(live), parts_of(loaded)
        if type(live) is not type(loaded):
            self._mismatch(place, f"a {type(loaded).__name__} into a {type(live).__name__} that has tensors in it")
        elif isinstance(live, deque):
            yield from self._descend(place, live, loaded)
        elif mine is None or theirs is None:
            self._mismatch(place, f"a {type(live).__name__} has tensors in it that cannot be told from one another")
        elif mine.form != theirs.form or mine.children.keys() != theirs.children.keys():
            self._mismatch(place, f"the {type(live).__name__} was made of other things")
        else:
            self._visit_children(place, live, mine.children, theirs.children)
            owner: Any = live.fields if type(live) is PlainObject else live
            frozen = getattr(getattr(type(live), "__dataclass_params__", None), "frozen", False)
            for name, value in mine.attributes.items():
                here = (Attribute(name), place)
                if name in theirs.attributes:
                    self._todo.append((here, value, theirs.attributes[name], None if frozen else (owner, name)))
                elif (yield from self._misses(here, value)):
                    self.missing.append(format_path(unlinked(here)))
            for name in theirs.attributes.keys() - mine.attributes.keys():
                self.unexpected.append(format_path(unlinked((Attribute(name), place))))

    def _visit_children(self, place: LinkedPath, live: Any, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
        """Compare what a function of a registered class takes an object apart into."""
        # Taken apart a second time: a tensor that is another one now was made by the function, and copying into it
        # would not change the object.
        again = parts_of(live)
        for name, value in mine.items():
            here = (Attribute(name), place)
            if again is not None and is_own(value, again.children[name]):
                self._todo.append((here, value, theirs[name], None))
            elif has_tensors(value):
                self._mismatch(here, f"the {type(live).__name__} is taken apart into copies of its tensors")
            elif has_tensors(theirs[name]) or not are_equal(value, theirs[name]):
                self._mismatch(here, f"{_instead(value, theirs[name])} in a {type(live).__name__}")

    def _assign(self, place: LinkedPath, where: tuple[Any, Any], value: Any) -> None:
        """Note what is put into the live tree. A container that is met in several places can take one value only."""
        container, key = where
        if isinstance(container, LiveTuple):
            live = container.items[key]
            if not are_equal(live, value):
                if not container.changes:
                    self._changed_tuples.append(container)
                container.replace(key, value, place, _instead(live, value))
            return
        before = self._assigned.setdefault((id(container), key), value)
        if before is not value and not (type(before) is type(value) in SIMPLE and are_equal(before, value)):
            self._mismatch(place, "what it is in is one object in several places, and not so in the checkpoint")
        self.assignments.append((container, key, value))

    def _find(self, place: LinkedPath, live: Any, where: Where) -> None:
        """Note what must still be in its place when it is changed. Nothing can be taken out of a tuple."""
        if where is not None and not isinstance(where[0], LiveTuple):
            self.found.append((place, *where, live))

    def _visit_gradient(self, place: LinkedPath, live: torch.Tensor, loaded: torch.Tensor) -> None:
        """Compare a gradient that was loaded; as with attributes, one that only the live tensor has is left alone."""
        # PyTorch warns if grad of a tensor that is not a leaf is asked for.
        gradient = loaded.grad if loaded.is_leaf else None
        if gradient is None or not self._is_wanted_whole(place):
            return
        here = (Attribute("grad"), place)
        if not live.is_leaf:
            self._mismatch(here, "the live tensor is not a leaf of the autograd graph and has no gradient of its own")
        elif live.grad is not None:
            self._todo.append((here, live.grad, gradient, (live, "grad")))
        else:
            # One for the tensor, in however many places it is.
            new = self._gradients.get(id(live))
            if new is None:
                new = self._gradients[id(live)] = torch.empty_like(live, requires_grad=False)
                self.assignments.append((live, "grad", new))
            self._todo.append((here, new, gradient, None))

    def _visit_attributes(self, place: LinkedPath, live: Any, loaded: Any, inner: Collection[str] = ()) -> None:
        """Compare what hangs on an object besides its contents, as ``_metadata`` does on a state dict.

        What only the live object has is left alone; it is set from outside and not part of every checkpoint.
        """
        is_subclass = isinstance(loaded, torch.Tensor) and type(loaded) not in (torch.Tensor, torch.nn.Parameter)
        theirs = extra_attributes(loaded, inner) if is_subclass else getattr(loaded, "__dict__", None)
        if not theirs or not self._is_wanted_whole(place):
            return
        mine = getattr(live, "__dict__", None)
        for name, value in theirs.items():
            here = (Attribute(name), place)
            if is_subclass and name in slots_of(type(live)):
                if has_tensors(value) and hasattr(live, name):
                    self._todo.append((here, getattr(live, name), value, (live, name)))
                else:
                    self._assign(here, (live, name), value)
            elif mine is None:
                if has_tensors(value):
                    self._mismatch(here, f"a {type(live).__name__} has no attributes")
            elif name in mine and (has_tensors(value) or has_tensors(mine[name])):
                self._todo.append((here, mine[name], value, (mine, name)))
            else:
                self._assign(here, (mine, name), value)

    def _is_wanted_whole(self, place: LinkedPath) -> bool:
        """Return whether all that is at a place was asked for, and not only some of what it contains."""
        return self._wanted is None or any(self._wanted(unlinked(at)) for at in _and_above(place))

    def _misses(self, place: LinkedPath, live: Any) -> Generator[None, None, bool]:
        """Return whether the checkpoint should have what is at a place, or something below it."""
        if self._wanted is None or self._is_wanted_whole(place):
            return True
        pending: list[tuple[LinkedPath, Any]] = [(place, live)]
        seen: set[int] = set()
        while pending:
            at, value = pending.pop()
            if not isinstance(value, (dict, list, tuple)) or id(value) in seen:
                continue
            seen.add(id(value))
            for count, (key, item) in enumerate(value.items() if isinstance(value, dict) else enumerate(value)):
                here = (key, at)
                if self._wanted(unlinked(here)):
                    return True
                pending.append((here, item))
                if count % _YIELD_EVERY == 0:
                    yield
        return False

    def _mismatch(self, place: LinkedPath, reason: str) -> None:
        self.mismatched.append(f"{format_path(unlinked(place))} ({reason})")

    def check_ties(self) -> Generator[None, None, None]:
        """Find live tensors that share memory which loaded ones do not: both values cannot be had."""
        unlike = yield from shared_unlike([Pair(live, loaded) for _, live, loaded in self.pairs])
        for first, *others in unlike:
            place = format_path(unlinked(self.pairs[first][0]))
            for other in others:
                self._mismatch(self.pairs[other][0], f"it shares memory with {place}, but not so in the checkpoint")


def _and_above(place: LinkedPath) -> Iterator[LinkedPath]:
    """Iterate over a place and those above it, but not the root."""
    while place is not None:
        yield place
        place = place[1]


def _is_kept(live: Any) -> bool:
    return is_state(live) or has_tensors(live)


def _same_kind(live: Any, loaded: Any) -> bool:
    return any(isinstance(live, kind) and isinstance(loaded, kind) for kind in (dict, list, tuple))


def _instead(live: Any, loaded: Any) -> str:
    expected, found = shown(live), shown(loaded)
    return f"{found} instead of {expected}" if found != expected else f"another {found}"
