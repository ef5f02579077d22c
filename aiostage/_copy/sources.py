"""The memory that the copies of one staging read, held until they are done."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch

from aiostage import _private
from aiostage._capture.faithful import Spec
from aiostage._capture.leaves import Leaves

__all__ = ["Sources", "detached_alias"]

_AT_ONCE = 256
"""Aliases made between two yields, at about a microsecond each."""

_data_ptr = torch.UntypedStorage.data_ptr


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
        for start in range(0, len(indices), _AT_ONCE):
            for index in indices[start : start + _AT_ONCE]:
                alias = self.alias(index)
                if alias is not None:
                    found[index] = alias
            yield
        return found

    def is_there(self, index: int) -> bool:
        """Return whether a leaf's storage still has the memory that was noted; if not, note that it is lost."""
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
            storages, addresses = self._storages[part], self.addresses[part]
        else:
            storages = [self._storages[index] for index in indices]
            addresses = [self.addresses[index] for index in indices]
        # Most leaves begin where their storages do. A storage that is resized gets other memory before its own is given
        # back, so that it has another address, and its size, which costs as much again to ask for, need not be asked.
        # One that was resized twice may be back where it was, with fewer bytes: what is read behind them is in the
        # heap, and the capture, which compares sizes, is torn.
        if list(map(_data_ptr, storages)) == addresses:  # type: ignore[arg-type]
            return None
        there = list(map(self.is_there, indices))
        return None if all(there) else there


def detached_alias(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of torch's own class over the same memory, without history and without calling a subclass."""
    with _private.without_torch_function():
        return tensor.detach()
