"""Making the staged tree: leaves in bulk over an arena, then the program that a walk has written."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from aiostage._capture.faithful import Spec
from aiostage._capture.leaves import Leaves
from aiostage._capture.plan import Block, Run
from aiostage._loop.collection import untrack_all

__all__ = ["Holes", "Results", "Step", "build_block", "build_run", "finish_leaves", "perform"]

Holes: TypeAlias = list[tuple[int, int]]
"""Positions in a list of children that are not known yet, each with a reference: a leaf's index, or the complement
(``~index``) of an object that is made late."""

_NUMPY_DTYPES: dict[torch.dtype, Any] = {
    torch.bool: np.bool_,
    torch.uint8: np.uint8,
    torch.int8: np.int8,
    torch.int16: np.int16,
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.uint16: np.uint16,
    torch.uint32: np.uint32,
    torch.uint64: np.uint64,
    torch.float16: np.float16,
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.complex64: np.complex64,
    torch.complex128: np.complex128,
}


class Results:
    """What references refer to: staged leaves, and objects that could only be made after them."""

    __slots__ = ("late", "staged")

    def __init__(self, staged: list[Any], late: int = 0) -> None:
        self.staged = staged
        self.late: list[Any] = [None] * late

    def fill(self, children: list[Any], holes: Holes) -> list[Any]:
        """Return the children with every hole filled."""
        filled = list(children)
        for position, reference in holes:
            filled[position] = self[reference]
        return filled

    def put(self, index: int, made: Any) -> None:
        """Take an object that was made late."""
        self.late[index] = made

    def __getitem__(self, reference: int) -> Any:
        return self.staged[reference] if reference >= 0 else self.late[~reference]


Step: TypeAlias = Callable[[Results], None]
"""One step of the program that rebuilds the tree."""


def build_run(memory: np.ndarray[Any, Any], run: Run) -> list[torch.Tensor]:
    """Make the staged leaves of a run, each with a storage of exactly its own size.

    Args:
        memory: One-dimensional uint8, the run's slots. Every leaf keeps the array that it is a view of alive.
        run: Leaves of one spec in consecutive slots.

    Returns:
        One tensor for each leaf, its contents not copied yet.
    """
    spec, count = run.spec, len(run.indices)
    dtype = _NUMPY_DTYPES.get(spec.target)
    if spec.extent == 0:
        tensors = [torch.empty_strided(spec.shape, spec.stride, dtype=spec.target, device="cpu") for _ in range(count)]
    elif spec.dense and spec.shape and dtype is not None:
        # One array of all slots, whose rows become the leaves without a Python step for each.
        tensors = list(map(torch.from_numpy, memory.view(dtype).reshape(count, *spec.shape)))
        # A staged leaf refers to nothing but its memory, so no circle can go through it (unless somebody hangs an
        # attribute on it that leads back).
        untrack_all(tensors)
    elif not spec.shape and dtype is not None:
        size = spec.staged_nbytes
        scalars = (np.ndarray((), dtype, memory, start) for start in range(0, count * size, size))
        tensors = list(map(torch.from_numpy, scalars))
        untrack_all(tensors)
    else:
        size = spec.staged_nbytes
        tensors = [
            torch.empty(0, dtype=spec.target, device="cpu").set_(
                torch.from_numpy(memory[start : start + size]).untyped_storage(), 0, spec.shape, spec.stride
            )
            for start in range(0, count * size, size)
        ]
    return _of_class(tensors, spec)


def build_block(memory: np.ndarray[Any, Any], block: Block, specs: Sequence[Spec]) -> list[torch.Tensor]:
    """Make the staged leaves of a block, all over one storage of the block's size.

    Args:
        memory: One-dimensional uint8, the block's slot.
        block: Leaves whose memory overlaps.
        specs: One for each leaf of the block.

    Returns:
        One tensor for each leaf of the block, tied as the sources are.
    """
    storage = torch.from_numpy(memory).untyped_storage()
    tensors: list[torch.Tensor] = []
    for offset, spec in zip(block.offsets, specs, strict=True):
        tensor = torch.empty(0, dtype=spec.target, device="cpu")
        tensor.set_(storage, offset // spec.target.itemsize, spec.shape, spec.stride)
        tensors += _of_class([tensor], spec)
    return tensors


def _of_class(tensors: list[torch.Tensor], spec: Spec) -> list[torch.Tensor]:
    if spec.cls is torch.nn.Parameter:
        make = torch.Tensor._make_subclass
        return [make(torch.nn.Parameter, tensor, spec.requires_grad) for tensor in tensors]
    if spec.cls is not torch.Tensor:
        tensors = [tensor.as_subclass(spec.cls) for tensor in tensors]
    if spec.requires_grad:
        for tensor in tensors:
            tensor.requires_grad_()
    return tensors


def finish_leaves(leaves: Leaves, staged: list[Any]) -> None:
    """Put the leaves together that were taken apart, and attach gradients."""
    for index, tensor in leaves.given.items():
        staged[index] = tensor
    # Parts were found after what they are parts of, so the innermost composites come last.
    for index, (composite, parts) in reversed(leaves.composites.items()):
        staged[index] = composite.assemble([staged[part] for part in parts])
    for index, gradient in leaves.gradients:
        staged[index].grad = staged[gradient]


def perform(program: Sequence[Step], results: Results) -> Generator[None, None, None]:
    """Run the program of a walk, yielding between steps."""
    for step in program:
        step(results)
        yield
