"""How well a checkpoint has to fit a live tree."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from aiostage._copy.targets import Pair, shared_unlike, unexpanded, unwritable
from aiostage._loop.workers import releasing_gil
from aiostage.errors import SHOWN_PATHS, CheckpointMismatchError, listed
from aiostage.format.classes import PlainObject, slots_of
from aiostage.format.nodes import LEFT_OUT
from aiostage.format.safetensors import CARRIERS, DTYPE_NAMES
from aiostage.format.tensors import extra_attributes
from aiostage.leaf import Attribute, LinkedPath, Path, format_path, unlinked

__all__ = ["STRICT", "Fit", "StrictOption", "Transfer", "compare", "copyable", "is_rounded"]

_logger = logging.getLogger("aiostage")

_NOT_ROUNDED = frozenset({torch.float4_e2m1fn_x2, torch.float8_e8m0fnu})
"""Two numbers to an element, and scales, which are powers of two."""

StrictOption: TypeAlias = bool | Callable[[list[str], list[str]], object]
"""Whether the same leaves are needed; or what is called with the paths of those missing and of those unexpected."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How well a checkpoint has to fit a live tree.

    Attributes:
        strict: Whether it needs the same leaves.
        cast: Whether floating-point tensors take values of another floating-point dtype.
        name: Of the checkpoint, for warnings.
    """

    strict: StrictOption = True
    cast: bool = False
    name: str = ""

    def report(self, missing: list[str], unexpected: list[str]) -> None:
        """Tell of leaves that only one of the two has, when that is no error."""
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


def is_rounded(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has floating-point numbers that torch can round to others."""
    return tensor.dtype.is_floating_point and tensor.dtype not in _NOT_ROUNDED


_YIELD_EVERY = 64
_BATCH_BYTES = 32 << 20
_BATCH_LEAVES = 256

_TensorPair: TypeAlias = tuple[LinkedPath, torch.Tensor, torch.Tensor]


class Transfer:
    """What has to be done to make a live tree equal a loaded one.

    Attributes:
        pairs: Live tensors, each with the loaded one and the place of both. Loaded ones on the meta device stand for
            elements that have not been read yet.
        assignments: Mutable containers, each with a key or an index and the value to put there; tensors, each with the
            name of an attribute.
        found: What was found in the live tree and is changed itself: its place, what it is in, its key there, and it.
        states: Objects with a ``load_state_dict``, each with the state to call it with.
    """

    def __init__(self) -> None:
        self.pairs: list[_TensorPair] = []
        self.assignments: list[tuple[Any, Any, Any]] = []
        self.found: list[tuple[LinkedPath, Any, Any, Any]] = []
        self.states: list[tuple[Any, Any]] = []
        self._batches: list[_InPlaceBatch] = []

    def add(self, live: torch.Tensor, loaded: torch.Tensor, device: torch.device | None) -> None:
        """Have one tensor copied into another.

        Args:
            live: Any tensor.
            loaded: In host memory.
            device: That the live one is on, None for host memory.
        """
        if live.numel() == 0:
            return
        live, loaded = unexpanded(copyable(live), copyable(loaded))
        last = self._batches[-1] if self._batches else None
        if last is None or not last.takes(live, device):
            last = _InPlaceBatch(device)
            self._batches.append(last)
        last.add(live, loaded)

    def batches(self) -> Iterator[tuple[torch.device | None, list[torch.Tensor], list[torch.Tensor]]]:
        """Iterate over what can be copied in one go: device, live tensors, and what is copied into them."""
        return ((batch.device, batch.live, batch.loaded) for batch in self._batches)

    def check_live(self, *, cast: bool) -> None:
        """Check that live tensors still are as, and where, they were compared. Blocks.

        Args:
            cast: Whether floating-point tensors take values of another dtype.

        Raises:
            CheckpointMismatchError: If one has another shape or dtype by now, or something else is in its place.
        """
        for place, container, key, value in releasing_gil(self.found):
            # What is in the tree now would keep its value.
            if (now := _get(container, key)) is not value:
                what = "it was removed" if now is _GONE else f"another {type(now).__name__} was put there"
                raise CheckpointMismatchError(
                    mismatched=[f"{format_path(unlinked(place))} ({what} during the load)"],
                    remedy="Do not put other tensors into the live tree while a load is under way.",
                )
        for place, live, loaded in releasing_gil(self.pairs):
            # A copy would broadcast, cast, or fail when other tensors have their new values.
            if live.shape != loaded.shape or (live.dtype is not loaded.dtype and not cast):
                now = f"{live.dtype} {tuple(live.shape)}, which it became during the load"
                raise CheckpointMismatchError(
                    mismatched=[f"{format_path(unlinked(place))} ({loaded.dtype} {tuple(loaded.shape)} into {now})"],
                    remedy="Do not resize live tensors while a load is under way.",
                )

    def assign(self) -> None:
        """Put the values that are not tensors into their containers."""
        for container, key, value in self.assignments:
            if isinstance(container, torch.Tensor):
                setattr(container, key, value)
            elif not isinstance(container, list) or key < len(container):
                # A list that has become shorter since it was checked is as if that came after the load.
                container[key] = value


_GONE = object()


def _get(container: Any, key: Any) -> Any:
    """Return what is in a container, or an attribute of a tensor."""
    if isinstance(container, torch.Tensor):
        return getattr(container, key, _GONE)
    if isinstance(container, dict):
        # Not to have a defaultdict make a value.
        return dict.get(container, key, _GONE)
    return container[key] if key < len(container) else _GONE


class _InPlaceBatch:
    """Live tensors of one device, with their values."""

    def __init__(self, device: torch.device | None) -> None:
        self.device = device
        self.live: list[torch.Tensor] = []
        self.loaded: list[torch.Tensor] = []
        self._budget = _BATCH_BYTES

    def takes(self, live: torch.Tensor, device: torch.device | None) -> bool:
        return device == self.device and live.nbytes <= self._budget and len(self.live) < _BATCH_LEAVES

    def add(self, live: torch.Tensor, loaded: torch.Tensor) -> None:
        self.live.append(live)
        self.loaded.append(loaded)
        self._budget -= live.nbytes


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

    Dicts, lists and tuples are compared key by key. A tensor fits a tensor of the same shape and dtype; anything else
    is a value, and the loaded one takes the live one's place.

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
    if comparison.mismatched or (differ and fit.strict is True):
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
        self.pairs: list[_TensorPair] = []
        self.assignments: list[tuple[Any, Any, Any]] = []
        self.found: list[tuple[LinkedPath, Any, Any, Any]] = []
        self._seen: set[tuple[int, int]] = set()
        self._todo: list[tuple[LinkedPath, Any, Any, tuple[Any, Any] | None]] = []

    def run(self, live: Any, loaded: Any) -> Generator[None, None, None]:
        """Walk both trees; where a value is to be put is None inside what cannot be changed."""
        self._todo.append((None, live, loaded, None))
        count = 0
        while self._todo:
            place, mine, theirs, where = self._todo.pop()
            yield from self._visit(place, mine, theirs, where)
            count += 1
            if count % _YIELD_EVERY == 0:
                yield

    def _visit(
        self, place: LinkedPath, live: Any, loaded: Any, where: tuple[Any, Any] | None
    ) -> Generator[None, None, None]:
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
        if _are_wrappers(live, loaded):
            names = live.__tensor_flatten__()[0]
            for name in names:
                self._todo.append(((Attribute(name), place), getattr(live, name), getattr(loaded, name), None))
            self._find(place, live, where)
            self._visit_gradient(place, live, loaded)
            self._visit_attributes(place, live, loaded, names)
            return
        if isinstance(live, torch.Tensor) or isinstance(loaded, torch.Tensor):
            reason = _why_not(live, loaded, inference=self._inference, cast=self._cast)
            if reason is None:
                self.pairs.append((place, live, loaded))
                self._find(place, live, where)
                self._visit_gradient(place, live, loaded)
                self._visit_attributes(place, live, loaded)
            else:
                self._mismatch(place, reason)
        elif isinstance(live, (dict, list, tuple)) and _same_kind(live, loaded):
            if isinstance(live, tuple) and where is not None and not _has_state(live) and not _has_state(loaded):
                merged = _merged(live, loaded)
                if merged is None:
                    self._mismatch(place, f"{len(loaded)} places, some of them left out, instead of {len(live)}")
                else:
                    self.assignments.append((*where, merged))
            elif (id(live), id(loaded)) not in self._seen:
                self._seen.add((id(live), id(loaded)))
                self._find(place, live, where)
                yield from self._descend(place, live, loaded)
        elif _has_state(live) or _has_state(loaded):
            self._mismatch(place, f"a {type(loaded).__name__} into a {type(live).__name__}")
        elif where is not None:
            self.assignments.append((*where, loaded))
        elif not _equal(live, loaded):
            self._mismatch(place, f"{loaded!r:.100} instead of {live!r:.100} in a tuple, which cannot be changed")

    def _descend(self, place: LinkedPath, live: Any, loaded: Any) -> Generator[None, None, None]:
        mutable = not isinstance(live, tuple)
        if isinstance(live, dict):
            mine, theirs = live, loaded
        else:
            mine, theirs = dict(enumerate(live)), dict(enumerate(loaded))
        found = []
        for count, (key, value) in enumerate(mine.items()):
            here = (key, place)
            if key in theirs:
                found.append((here, value, theirs[key], (live, key) if mutable else None))
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

    def _find(self, place: LinkedPath, live: Any, where: tuple[Any, Any] | None) -> None:
        """Note what has to be in its place still when it is changed. From a tuple nothing can be taken."""
        if where is not None:
            self.found.append((place, *where, live))

    def _visit_gradient(self, place: LinkedPath, live: torch.Tensor, loaded: torch.Tensor) -> None:
        """Compare a gradient that was loaded; as with attributes, one that only the live tensor has is left alone."""
        # Of a tensor with a history, asking for it would warn.
        gradient = loaded.grad if loaded.is_leaf else None
        if gradient is None or not self._is_wanted_whole(place):
            return
        here = (Attribute("grad"), place)
        if not live.is_leaf:
            self._mismatch(here, "the live tensor is no leaf of the autograd graph and has no gradient of its own")
        elif live.grad is not None:
            self._todo.append((here, live.grad, gradient, (live, "grad")))
        else:
            new = torch.empty_like(live, requires_grad=False)
            self._todo.append((here, new, gradient, None))
            self.assignments.append((live, "grad", new))

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
                if _has_tensors(value) and hasattr(live, name):
                    self._todo.append((here, getattr(live, name), value, (live, name)))
                else:
                    self.assignments.append((live, name, value))
            elif mine is None:
                if _has_tensors(value):
                    self._mismatch(here, f"a {type(live).__name__} has no attributes")
            elif name in mine and (_has_tensors(value) or _has_tensors(mine[name])):
                self._todo.append((here, mine[name], value, (mine, name)))
            else:
                self.assignments.append((mine, name, value))

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


def copyable(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor over the same memory of a dtype that torch can copy."""
    if (tensor.dtype in DTYPE_NAMES or tensor.dtype.is_complex) and tensor.dtype is not torch.float4_e2m1fn_x2:
        return tensor.detach()
    carrier = torch.empty(0, dtype=CARRIERS[tensor.element_size()], device=tensor.device)
    return carrier.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _and_above(place: LinkedPath) -> Iterator[LinkedPath]:
    """Iterate over a place and those above it, but not the root."""
    while place is not None:
        yield place
        place = place[1]


def _same_kind(live: Any, loaded: Any) -> bool:
    return any(isinstance(live, kind) and isinstance(loaded, kind) for kind in (dict, list, tuple))


def _has_state(value: Any) -> bool:
    """Return whether a value is, or is a tuple around, something that is changed in place."""
    pending = deque([value])
    while pending:
        item = pending.popleft()
        if isinstance(item, (torch.Tensor, dict, list)):
            return True
        if isinstance(item, tuple):
            pending.extend(item)
    return False


def _are_wrappers(live: Any, loaded: Any) -> bool:
    """Return whether two values are tensors of one class around others, and alike but for what those hold."""
    if type(live) is not type(loaded) or not hasattr(live, "__tensor_flatten__"):
        return False
    (names, context), (others, other_context) = live.__tensor_flatten__(), loaded.__tensor_flatten__()
    shapes = live.shape == loaded.shape and live.stride() == loaded.stride() and live.dtype is loaded.dtype
    return bool(list(names) == list(others) and shapes and context == other_context)


def _has_tensors(value: Any) -> bool:
    """Return whether a value is, or is a container around, a tensor."""
    pending, seen = deque([value]), set[int]()
    while pending:
        item = pending.popleft()
        if isinstance(item, torch.Tensor):
            return True
        if isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            pending.extend(item.values() if isinstance(item, dict) else item)
    return False


def _merged(live: tuple[Any, ...], loaded: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Return a loaded tuple with live values where something was left out of it; None if it has other places."""
    if not any(theirs is LEFT_OUT or isinstance(theirs, tuple) for theirs in loaded):
        return loaded
    merged: list[Any] = []
    for place, theirs in enumerate(loaded):
        mine = live[place] if place < len(live) else None
        if theirs is LEFT_OUT and len(live) != len(loaded):
            return None
        if isinstance(theirs, tuple) and isinstance(mine, tuple):
            theirs = _merged(mine, theirs)
            if theirs is None:
                return None
        merged.append(mine if theirs is LEFT_OUT else theirs)
    return tuple(merged) if type(loaded) is tuple else loaded


def _equal(live: Any, loaded: Any) -> bool:
    same = live is loaded or live == loaded
    # NaN equals itself here, and an array equals another if all of it does.
    return bool(np.all(same)) or (live != live and loaded != loaded)


def _why_not(live: Any, loaded: Any, *, inference: bool, cast: bool) -> str | None:
    """Return why a loaded value cannot be copied into a live tensor, or None if it can."""
    if not isinstance(live, torch.Tensor) or not isinstance(loaded, torch.Tensor):
        return f"a {type(loaded).__name__} into a {type(live).__name__}"
    for tensor, which in ((live, "live"), (loaded, "loaded")):
        # It has no shape that could be compared.
        if tensor.is_nested:
            return f"the {which} tensor is nested"
    castable = live.dtype is loaded.dtype or (cast and is_rounded(live) and is_rounded(loaded))
    if live.shape != loaded.shape or not castable:
        hint = ", which cast=True would allow" if is_rounded(live) and is_rounded(loaded) and not cast else ""
        hint = hint if live.shape == loaded.shape else ""
        return f"{loaded.dtype} {tuple(loaded.shape)} into {live.dtype} {tuple(live.shape)}{hint}"
    if hasattr(live, "__tensor_flatten__"):
        return f"the live tensor is a {type(live).__name__}"
    for tensor, which in ((live, "live"), (loaded, "loaded")):
        if tensor.is_quantized:
            return f"the {which} tensor is quantized"
        if tensor.layout is not torch.strided:
            return f"the {which} tensor is {tensor.layout}"
    return unwritable(live, loaded, inference=inference)
