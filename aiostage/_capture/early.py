"""Copies of tensors that are needed in the last step of the walk, for objects that copy themselves."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch

from aiostage import _private
from aiostage._capture.faithful import Spec
from aiostage._capture.leaves import CHUNK, Leaves
from aiostage._capture.rebuild import of_class

__all__ = ["EarlyCopies"]


class EarlyCopies:
    """Makes copies at once, and ties to them whatever else lies in the same storages.

    Args:
        leaves: Noted and inspected.
    """

    def __init__(self, leaves: Leaves) -> None:
        self._leaves = leaves
        self._storages: dict[int, tuple[torch.UntypedStorage, int]] = {}
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
        if identity not in self._storages:
            made = storage.clone() if storage.device.type == "cpu" else storage.cpu()  # type: ignore[no-untyped-call]
            self._storages[identity] = (made, storage.data_ptr())
        return self._over(identity, index, spec)

    def _over(self, identity: int, index: int, spec: Spec) -> torch.Tensor:
        """Return a tensor like a leaf over the copy of its storage."""
        copy, base = self._storages[identity]
        offset = (self._leaves.addresses[index] - base) // spec.dtype.itemsize if spec.extent else 0
        tensor = torch.empty(0, dtype=spec.dtype, device="cpu").set_(copy, offset, spec.shape, spec.stride)
        return of_class([tensor], spec)[0]

    def tie(self) -> Generator[None, None, None]:
        """Give every leaf in a storage that was copied a copy over the same one, yielding between small steps."""
        leaves = self._leaves
        for start in range(0, len(leaves.specs), CHUNK):
            for index in range(start, min(start + CHUNK, len(leaves.specs))):
                spec, storage = leaves.specs[index], leaves.storages[index]
                if index in leaves.given:
                    leaves.specs[index] = None
                elif spec is not None and storage is not None and not spec.by_value and self._storages:
                    identity = _private.storage_identity(storage)
                    if identity in self._storages:
                        leaves.given[index] = self._over(identity, index, spec)
                        leaves.specs[index] = None
            yield
