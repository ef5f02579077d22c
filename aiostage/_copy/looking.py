"""What a state dict consists of, found out in steps."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch

from aiostage._arguments import shown
from aiostage._capture.faithful import Spec
from aiostage._capture.leaves import Leaves
from aiostage._capture.plan import MixedCast, Plan
from aiostage._capture.walk import Walk
from aiostage._copy.changes import Changes
from aiostage._copy.resources import Resources
from aiostage._copy.timings import Phase, Timings
from aiostage.errors import UnsupportedLeafError
from aiostage.leaf import Path, format_path

__all__ = ["Look"]


class Look:
    """One look at a state dict: the walk over it, its leaves, and where they are to go.

    Args:
        resources: Of the stager.
        timings: Where to note what it takes.

    Attributes:
        walk: Over the containers.
        specs: What each leaf is to become; None for one that others are put together to.
        changes: What is noticed to have changed since.
    """

    def __init__(self, resources: Resources, timings: Timings) -> None:
        self._resources = resources
        self._options = resources.options
        self._timings = timings
        self.walk = Walk(passthrough=resources.options.passthrough)
        self.specs: list[Spec | None] = []
        self.changes = Changes(self.walk, resources.inspection)

    @property
    def leaves(self) -> Leaves:
        """What the walk has found."""
        return self.walk.leaves

    def run(self, source: Any) -> Generator[None, None, None]:
        """Find the leaves, and what each of them is.

        Args:
            source: The state dict.

        Raises:
            UnsupportedLeafError: If a leaf cannot be staged faithfully.
        """
        walk, inspection = self.walk, self._resources.inspection
        with Phase(self._timings, "walk"):
            yield from walk.run(source)
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
                return (yield from self._resources.plan(self.specs, self.leaves.addresses))
            except MixedCast as mixed:
                raise UnsupportedLeafError(
                    "it is to be cast, but shares memory with a leaf of another dtype.",
                    path=format_path(self.walk.path(mixed.index)),
                    remedy="Leave one of the two out, or return None for it from the dtype function.",
                ) from None

    def _cast(self) -> Generator[None, None, list[Spec | None]]:
        """Return the specs with the dtypes that the options ask for."""
        rule, table = self._options.dtype, self._resources.inspection.table
        specs: list[Spec | None] = []
        for index, spec in enumerate(self.leaves.specs):
            if spec is not None and spec.dtype.is_floating_point:
                target = rule if isinstance(rule, torch.dtype) else None
                if target is None and callable(rule):
                    path = self.walk.path(index)
                    target = rule(path, self.leaves.tensors[index])
                    _check_target(target, path)
                if target is not None and target is not spec.dtype:
                    spec = table.cast(spec, target)
            specs.append(spec)
            if index % 64 == 0:
                yield
        return specs


def _check_target(target: object, path: Path) -> None:
    if target is not None and not (isinstance(target, torch.dtype) and target.is_floating_point):
        raise TypeError(
            f"{format_path(path)}: the dtype function must return a floating-point torch.dtype or None, "
            f"not {target if isinstance(target, torch.dtype) else shown(target)}"
        )
