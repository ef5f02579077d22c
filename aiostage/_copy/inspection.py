"""What a state dict consists of, found out in steps, what of it has changed since, and the memory that copies read.

Every phase of a staging notes its time here.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from time import perf_counter
from types import TracebackType
from typing import Any

import torch

from aiostage import _private
from aiostage._capture.faithful import Spec
from aiostage._capture.leaves import Inspection, Leaves, changed
from aiostage._capture.plan import Batch, MixedCast, Plan
from aiostage._capture.walk import Walk
from aiostage._copy.resources import Resources
from aiostage._device.streams import CallerStreams
from aiostage.errors import UnsupportedLeafError, shown
from aiostage.leaf import Path, format_path
from aiostage.observe import OpenSpan

__all__ = ["Phase", "SourceInspection", "Sources", "Timings", "detached_alias", "leaves_within"]


@dataclass(kw_only=True)
class Timings:
    """Where the time of one staging went, in seconds. Phases that overlap count for themselves.

    Attributes:
        walk: Copying containers and finding the leaves.
        inspect: Looking at the leaves.
        plan: Laying out the arena, or recognizing the layout.
        memory: Waiting for an arena.
        build: Making the staged leaves, while the copies already run.
        launch: Telling devices what to copy.
        copy: Waiting for the copies after everything was built.
        check: Looking for changes of the source.
        rebuild: Making the staged tree.
        yields: How often the event loop got its turn.
    """

    walk: float = 0.0
    inspect: float = 0.0
    plan: float = 0.0
    memory: float = 0.0
    build: float = 0.0
    launch: float = 0.0
    copy: float = 0.0
    check: float = 0.0
    rebuild: float = 0.0
    yields: int = 0

    def __post_init__(self) -> None:
        """Start without a span; the caller sets one. It is not a field, because it is not a figure."""
        self.span: OpenSpan | None = None


class Phase:
    """Adds the time that a section takes to a field of the timings, and tells observers of it.

    A section may be cut into slices and go on in another task, so its span is not the current one of any context.
    """

    __slots__ = ("_name", "_span", "_start", "_timings")

    def __init__(self, timings: Timings, name: str) -> None:
        self._timings = timings
        self._name = name

    def __enter__(self) -> None:
        within = self._timings.span
        self._span = within.child(self._name) if within is not None else None
        self._start = perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Added and not set: a phase that is cut in two, or repeated for each chunk, is the sum.
        spent = getattr(self._timings, self._name) + perf_counter() - self._start
        setattr(self._timings, self._name, spent)
        if self._span is not None:
            self._span.end(error)


_MOST_SPECS = 1 << 14
"""Kinds of leaves that are remembered, at about a kilobyte each. A tree of more is never recognized."""


class Changes:
    """The changes that make a capture torn.

    Before later work is ordered behind the copies of some leaves, these are compared: what was changed until then is
    torn, and what is changed afterwards is that work, which the copies do not see.

    Args:
        walk: Which met the leaves and containers.
        inspection: The inspection of the leaves.
    """

    def __init__(self, walk: Walk, inspection: Inspection) -> None:
        self._walk = walk
        self._inspection = inspection
        self._torn: dict[Path, None] = {}
        self._settled: set[int] = set()
        self._over = False

    @property
    def paths(self) -> Collection[Path]:
        """Where the changes found so far are."""
        return self._torn.keys()

    def compare(self, leaves: Collection[int] | None = None) -> Generator[None, None, None]:
        """Look for changes, for the last time where it looks, yielding between small steps.

        Args:
            leaves: Where to look, by their numbers; None for all of them and for the containers.
        """
        # The last comparison has been made: the source may change since.
        if self._over:
            return
        for index in (yield from changed(self._walk.leaves, self._inspection)):
            # A leaf that has been settled may have been changed since by work that waits for its copy.
            if index not in self._settled and (leaves is None or index in leaves):
                self._torn[self._walk.path(index)] = None
        if leaves is not None:
            self._settled.update(leaves)
            return
        self._torn |= dict.fromkeys((yield from self._walk.changes.changed()))
        self._over = True


class SourceInspection:
    """Inspects one state dict: the walk over it, its leaves, and where they are to go.

    Args:
        resources: The resources of the stager.
        timings: Where to note what it takes.
        caller: Whose streams the code of objects follows; None without an accelerator.

    Attributes:
        walk: Over the containers.
        specs: What each leaf is to become; None for one that others are put together to.
        changes: What is noticed to have changed since.
    """

    def __init__(self, resources: Resources, timings: Timings, caller: CallerStreams | None) -> None:
        self._resources = resources
        self._options = resources.options
        self._timings = timings
        before_code = caller.order_code if caller is not None else None
        self.walk = Walk(passthrough=resources.options.passthrough, before_code=before_code)
        self.specs: list[Spec | None] = []
        self.changes = Changes(self.walk, resources.inspection)

    @property
    def leaves(self) -> Leaves:
        """What the walk has found."""
        return self.walk.leaves

    @property
    def whole_leaves(self) -> int:
        """How many leaves the tree has; a tensor that is reached by several paths counts once."""
        return len(self.leaves) - sum(map(len, self.leaves.owners.values()))

    def whole(self, indices: Iterable[int]) -> Iterator[int]:
        """Return those that are leaves of the tree, and not only parts of one."""
        return (index for index in indices if self.leaves.owners.find(index) is None)

    def without_bytes(self) -> list[int]:
        """Return the leaves that no batch completes: those without memory of their own, or without elements."""
        return [index for index, spec in enumerate(self.specs) if spec is None or spec.extent == 0]

    def torn(self, lost: Collection[int]) -> list[Path]:
        """Return where the source has changed.

        Args:
            lost: The leaves that could not be copied, because their memory had been replaced by then.
        """
        return list(dict.fromkeys((*self.changes.paths, *map(self.walk.path, sorted(lost)))))

    def run(self, source: Any) -> Generator[None, None, None]:
        """Find the leaves, and what each of them is.

        Args:
            source: The state dict.

        Raises:
            UnsupportedLeafError: If a leaf cannot be staged faithfully.
        """
        walk, inspection = self.walk, self._resources.inspection
        if len(inspection.table.known) > _MOST_SPECS:
            inspection.forget()
        with Phase(self._timings, "walk"):
            yield from walk.run(source, inspection)
        with Phase(self._timings, "inspect"):
            yield from walk.inspect(inspection)
            # Everything else has been noted: now comes the moment of the copy.
            yield from walk.settle(inspection)
            self.specs = walk.leaves.specs
            if self._options.dtype is not None:
                self.specs = yield from self._cast()

    def plan(self) -> Generator[None, None, Plan]:
        """Return where the leaves are to go.

        Raises:
            UnsupportedLeafError: If a leaf cannot be cast apart from what it shares memory with.
        """
        with Phase(self._timings, "plan"):
            try:
                return (yield from self._resources.plans.plan(self.specs, self.leaves.addresses))
            except MixedCast as mixed:
                raise UnsupportedLeafError(
                    "it is to be cast, but shares memory with a leaf of another dtype.",
                    path=format_path(self.walk.path(mixed.index)),
                    remedy="Leave one of the two out, or return None for it from the dtype function.",
                ) from None

    def _cast(self) -> Generator[None, None, list[Spec | None]]:
        """Return the specs with the dtypes that the options ask for."""
        table, leaves = self._resources.inspection.table, self.leaves
        specs: list[Spec | None] = []
        for index, spec in enumerate(leaves.specs):
            if spec is not None and spec.dtype.is_floating_point and self._is_value(index, spec.dtype):
                target = self._target(index)
                if target is not None and target is not spec.dtype:
                    if not _can_cast(spec.dtype, target):
                        raise UnsupportedLeafError(
                            f"PyTorch cannot cast {spec.dtype} to {target}.",
                            path=format_path(self.walk.path(index)),
                            remedy="Return None for it from the dtype function.",
                        )
                    spec = table.cast(spec, target)
            specs.append(spec)
            # A call of the user's function each, of unknown length: some dozens between two turns.
            if index % 64 == 0:
                yield
        # PyTorch lets no gradient have another dtype than its tensor.
        for index, gradient in leaves.gradients.items():
            spec, of_gradient = specs[index], specs[gradient]
            target = spec.target if spec is not None else None
            if index in leaves.given:
                target = leaves.given[index].dtype
            if gradient in leaves.given and spec is not None:
                # What code of objects has copied keeps its dtype, and what belongs to it.
                specs[index] = leaves.specs[index]
            if target is None or of_gradient is None or target is of_gradient.target:
                continue
            if leaves.owners.find(gradient) != index:
                raise UnsupportedLeafError(
                    f"it is to be {of_gradient.target}, and is the gradient of a tensor that is to be {target}.",
                    path=format_path(self.walk.path(gradient)),
                    remedy="Return the same dtype for both from the dtype function.",
                )
            specs[gradient] = table.cast(of_gradient, target)
        return specs

    def _is_value(self, index: int, dtype: torch.dtype) -> bool:
        """Return whether the elements of a leaf are values: what scales those of a quantized tensor is not."""
        owner = self.leaves.owners.find(index)
        if owner is None or owner not in self.leaves.composites or self.leaves.gradients.get(owner) == index:
            return True
        with _private.without_torch_function():
            return self.leaves.tensors[owner].dtype is dtype

    def _target(self, index: int) -> torch.dtype | None:
        """Return the dtype that the options ask for."""
        rule = self._options.dtype
        if rule is None or isinstance(rule, torch.dtype):
            return rule
        path = self.walk.path(index)
        target = rule(path, self.leaves.tensors[index])
        _check_target(target, path)
        return target


@cache
def _can_cast(dtype: torch.dtype, target: torch.dtype) -> bool:
    try:
        torch.empty(1, dtype=target, device="cpu").copy_(torch.empty(1, dtype=dtype, device="cpu"))
    except RuntimeError:
        return False
    return True


def leaves_within(
    parts: Collection[Path], walk: Walk, batches: Sequence[Batch]
) -> Generator[None, None, tuple[set[int], set[int]]]:
    """Find what lies in some parts of a tree, yielding between small steps.

    Args:
        parts: Paths that lead to the parts; the empty one is everything.
        walk: Which met the leaves.
        batches: Which copy them.

    Returns:
        The numbers of the leaves, and of the batches that copy them.

    Raises:
        KeyError: If one of the parts has no tensor in it that is copied.
    """
    lengths = sorted(set(map(len, parts)))
    missing = set(parts) - {()}
    leaves: set[int] = set()
    numbers: set[int] = set()
    for number, batch in enumerate(batches):
        for index in batch.completes:
            path = walk.path(index)
            heads = {path[:length] for length in lengths if length <= len(path)}
            if not heads.isdisjoint(parts):
                missing -= heads
                leaves.add(index)
                numbers.add(number)
            yield
    for number in tuple(numbers):
        # A large leaf is cut into several batches, and only the last of them completes it. The part is free once the
        # earlier ones are copied too.
        while batches[number].continues:
            number -= 1
            numbers.add(number)
    if missing:
        raise KeyError(f"{format_path(min(missing, key=str))} does not lead to a tensor that is copied")
    return leaves, numbers


def _check_target(target: object, path: Path) -> None:
    if target is not None and not (isinstance(target, torch.dtype) and target.is_floating_point):
        raise TypeError(
            f"{format_path(path)}: the dtype function must return a floating-point torch.dtype or None, "
            f"not {target if isinstance(target, torch.dtype) else shown(target)}"
        )


_ALIASES_PER_STEP = 256
"""Aliases made between two yields, at about a microsecond each."""

_data_ptr = torch.UntypedStorage.data_ptr
_nbytes = torch.UntypedStorage.nbytes


class Sources:
    """The leaves that are copied, with the storages that they had when they were met.

    Another coroutine may give a tensor other memory at any time, so no copy reads through the caller's tensor objects:
    it reads at the address that was noted, in the storage that was noted and that is referred to here. What remains is
    ``resize_`` of that storage itself. It is looked for before each piece of a copy; in the middle of one nothing in
    Python can keep it away.

    Args:
        leaves: Inspected. Its lists are kept, not copied; releasing the leaves gives those other ones.
        specs: What each leaf is to become.

    Attributes:
        addresses: Where the leaves begin.
        lost: The numbers of leaves that could not be read because their memory had been replaced. Added to by any
            thread.
    """

    def __init__(self, leaves: Leaves, specs: Sequence[Spec | None]) -> None:
        # The lists of the leaves themselves, without a copy. A staging that is dropped while threads still copy
        # replaces them (Leaves.release) and does not empty them; they are emptied once no copy runs (Leaves.releasing).
        self.addresses = leaves.addresses
        self.lost: set[int] = set()
        self._specs = specs
        self._tensors = leaves.tensors
        self._storages = leaves.storages
        self._sizes = leaves.storage_sizes

    def spec(self, index: int) -> Spec:
        """Return the spec of a leaf that has memory."""
        spec = self._specs[index]
        assert spec is not None  # noqa: S101 - a plan places leaves with memory only
        return spec

    def alias(self, index: int) -> torch.Tensor | None:
        """Return a plain tensor over the noted memory of a leaf, or None, and note it, if the leaf has another now.

        Called on the event loop, where no coroutine can change the leaf meanwhile.
        """
        alias = detached_alias(self._tensors[index])
        spec = self.spec(index)
        if (
            alias.untyped_storage() is not self._storages[index]
            or alias.data_ptr() != self.addresses[index]
            or alias.dtype is not spec.dtype
            or alias.shape != spec.shape
            or alias.stride() != spec.stride
            or not self.is_there(index)
        ):
            self.lost.add(index)
            return None
        return alias

    def aliases(self, indices: Sequence[int]) -> Generator[None, None, dict[int, torch.Tensor]]:
        """Return the aliases of leaves by their numbers, without the lost ones, yielding between small steps."""
        found: dict[int, torch.Tensor] = {}
        for start in range(0, len(indices), _ALIASES_PER_STEP):
            for index in indices[start : start + _ALIASES_PER_STEP]:
                alias = self.alias(index)
                if alias is not None:
                    found[index] = alias
            yield
        return found

    def is_there(self, index: int) -> bool:
        """Return whether a leaf's storage still has the memory that was noted; if not, note that it is lost."""
        # Called in threads right before each piece is read. Between this and the read Python code may still resize the
        # storage; that is the rest of which the class speaks.
        storage, size = self._storages[index], self._sizes[index]
        # Memory can go away, or move, only together with the storage's pointer or size.
        if storage is not None and storage.nbytes() == size and 0 <= self.addresses[index] - storage.data_ptr() <= size:
            return True
        self.lost.add(index)
        return False

    def are_there(self, indices: Sequence[int]) -> list[bool] | None:
        """Return which small leaves' storages still have the memory that was noted; None if all of them have."""
        if isinstance(indices, range):
            part = slice(indices.start, indices.stop)
            storages, sizes, addresses = self._storages[part], self._sizes[part], self.addresses[part]
        else:
            storages = [self._storages[index] for index in indices]
            sizes = [self._sizes[index] for index in indices]
            addresses = [self.addresses[index] for index in indices]
        # Most leaves begin where their storages do. Both are asked: a storage that was resized twice may be back at its
        # address with fewer bytes.
        if list(map(_data_ptr, storages)) == addresses and list(map(_nbytes, storages)) == sizes:  # type: ignore[arg-type]
            return None
        there = list(map(self.is_there, indices))
        return None if all(there) else there


def detached_alias(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of torch's own class over the same memory, without history and without calling a subclass."""
    with _private.without_torch_function():
        return tensor.detach()
