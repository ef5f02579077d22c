"""Copies of tensors that are needed in the last step of the walk, for objects that copy themselves."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch

from aiostage import _private
from aiostage._capture.build import of_class
from aiostage._capture.faithful import Refusal, Spec
from aiostage._capture.leaves import LEAVES_PER_STEP, Leaves

__all__ = ["EarlyCopies", "StorageCopies"]


class StorageCopies(dict[int, torch.UntypedStorage]):
    """Copies of storages by the identity of the source.

    The deepcopy of a storage, and of a tensor that the walk has not met, looks for the copy of the storage here and
    puts it here: it is PyTorch's part of the memo.
    """

    def __setitem__(self, identity: int, copy: torch.UntypedStorage) -> None:
        if copy.device.type != "cpu":
            raise Refusal(
                f"code of an object copies a storage of {copy.nbytes()} bytes on {copy.device}, which only that code "
                "leads to.",
                "Keep the tensors of that storage in attributes or containers of the object, or use passthrough for "
                "the object.",
            )
        super().__setitem__(identity, copy)


class EarlyCopies:
    """Makes copies at once, and ties to them whatever else lies in the same storages.

    Args:
        leaves: Noted and inspected.

    Attributes:
        storages: The copies of whole storages, those included that code of objects has made.
    """

    def __init__(self, leaves: Leaves) -> None:
        self._leaves = leaves
        self.storages = StorageCopies()
        self._made: set[int] = set()

    def made(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor is one of these copies."""
        return id(tensor) in self._made

    def copies(self, start: int, stop: int) -> list[Any]:
        """Return copies of the leaves with some indices, with their values."""
        owners, aliases = self._leaves.positions, self._leaves.tensors
        return [self._copy(owners[id(aliases[index])]) for index in range(start, stop)]

    def _copy(self, index: int) -> torch.Tensor:
        leaves = self._leaves
        if index in leaves.given:
            return leaves.given[index]
        with torch.no_grad(), _private.without_torch_function():
            copy = self._made_of(index)
        self._made.add(id(copy))
        leaves.given[index] = copy
        gradient = leaves.gradients.get(index)
        if gradient is not None:
            copy.grad = self._copy(gradient)
        return copy

    def _made_of(self, index: int) -> torch.Tensor:
        leaves = self._leaves
        if index in leaves.composites:
            composite, parts = leaves.composites[index]
            return composite.assemble([self._copy(part) for part in parts])
        spec, storage = leaves.specs[index], leaves.storages[index]
        assert spec is not None and storage is not None  # noqa: S101, PT018 - what else would have been refused
        if spec.by_value:
            copy = torch.empty_strided(spec.shape, spec.staged_stride, dtype=spec.dtype, device="cpu")
            return of_class([copy.copy_(leaves.tensors[index].detach())], spec)[0]
        identity = _private.storage_identity(storage)
        if identity not in self.storages:
            made = storage.clone() if storage.device.type == "cpu" else storage.cpu()  # type: ignore[no-untyped-call]
            self.storages[identity] = made
        return self._over(self.storages[identity], index, spec)

    def _over(self, copy: torch.UntypedStorage, index: int, spec: Spec) -> torch.Tensor:
        """Return a tensor like a leaf over the copy of its storage."""
        storage = self._leaves.storages[index]
        assert storage is not None  # noqa: S101 - of which there is a copy
        distance = self._leaves.addresses[index] - storage.data_ptr() if spec.extent else 0
        tensor = torch.empty(0, dtype=spec.dtype, device="cpu")
        tensor.set_(copy, distance // spec.dtype.itemsize, spec.shape, spec.stride)
        return of_class([tensor], spec)[0]

    def tie(self) -> Generator[None, None, None]:
        """Give every leaf in a storage that was copied a copy over the same one, yielding between small steps."""
        leaves = self._leaves
        for start in range(0, len(leaves.specs), LEAVES_PER_STEP):
            for index in range(start, min(start + LEAVES_PER_STEP, len(leaves.specs))):
                spec, storage = leaves.specs[index], leaves.storages[index]
                if index in leaves.given:
                    leaves.specs[index] = None
                elif spec is not None and storage is not None and not spec.by_value and self.storages:
                    copy = self.storages.get(_private.storage_identity(storage))
                    if copy is not None:
                        leaves.given[index] = self._over(copy, index, spec)
                        leaves.specs[index] = None
            yield
