"""What has to be done to make a live tree equal a loaded one.

It is collected first and carried out at the end, so that everything that can be refused is refused while the live tree
is unchanged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch

from aiostage._copy.targets import copyable, unexpanded
from aiostage._loop.workers import releasing_gil
from aiostage.errors import CheckpointMismatchError
from aiostage.leaf import LinkedPath, format_path, unlinked

__all__ = ["TensorPair", "Transfer"]

# How much one step of a thread copies. Guesses: a fused copy of many small tensors costs little for each, and the GIL
# is held while PyTorch takes its arguments apart.
_BATCH_BYTES = 32 << 20
_BATCH_LEAVES = 256

TensorPair: TypeAlias = tuple[LinkedPath, torch.Tensor, torch.Tensor]


class Transfer:
    """What has to be done to make a live tree equal a loaded one.

    Attributes:
        pairs: Live tensors, each with the loaded one and the place of both. Loaded ones on the meta device stand for
            elements that have not been read yet.
        assignments: Mutable containers, each with a key or an index and the value to put there; objects, each with the
            name of an attribute.
        found: What was found in the live tree and is changed itself: its place, what it is in, its key there, and it.
        states: Objects with a ``load_state_dict``, each with the state to call it with.
    """

    def __init__(self) -> None:
        self.pairs: list[TensorPair] = []
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
            # The copy would go to the object that was found, which nothing in the tree refers to any more.
            if (now := _get(container, key)) is not value:
                what = "it was removed" if now is _GONE else f"another {type(now).__name__} was put there"
                raise CheckpointMismatchError(
                    mismatched=[f"{format_path(unlinked(place))} ({what} during the load)"],
                    remedy="Do not put other tensors into the live tree while a load is under way.",
                )
        for place, live, loaded in releasing_gil(self.pairs):
            # Otherwise the copy would broadcast or cast, or fail after other tensors have their new values.
            if live.shape != loaded.shape or (live.dtype is not loaded.dtype and not cast):
                now = f"{live.dtype} {tuple(live.shape)}, which it became during the load"
                raise CheckpointMismatchError(
                    mismatched=[f"{format_path(unlinked(place))} ({loaded.dtype} {tuple(loaded.shape)} into {now})"],
                    remedy="Do not resize live tensors while a load is under way.",
                )

    def assign(self) -> None:
        """Put the values that are not tensors into their containers."""
        for container, key, value in self.assignments:
            if isinstance(container, dict):
                container[key] = value
            elif not isinstance(container, (list, deque)):
                # As pickle sets attributes: the class may forbid it, or do more.
                object.__setattr__(container, key, value)
            elif key < len(container):
                # A list that was shortened after the last check: the result is as if it were shortened after the load.
                container[key] = value


_GONE = object()


def _get(container: Any, key: Any) -> Any:
    """Return what is in a container, or an attribute of another object."""
    if isinstance(container, dict):
        # Not container.get(), which a subclass may override, nor an index, for which a defaultdict makes a value.
        return dict.get(container, key, _GONE)
    if isinstance(container, (list, deque)):
        return container[key] if key < len(container) else _GONE
    return getattr(container, key, _GONE)


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
