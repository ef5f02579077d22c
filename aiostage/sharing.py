"""Opening a staged tree in another process, without copying it."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from aiostage import _private
from aiostage._memory.arena import Arena
from aiostage._memory.shared import SharedHandle
from aiostage.errors import StagingError, said
from aiostage.format.composites import scheme_of

__all__ = ["SharedTree", "share"]


@dataclass(frozen=True)
class SharedTree:
    """Where a staged tree is, small enough to send to any process of the same user on the same machine.

    Picklable. It is valid while the staged tree that it was made from is alive in the process that made it. Tensors
    that were opened stay valid while something refers to them, also after that process has ended.

    Attributes:
        memory: The shared memory, one handle for each arena, whatever the number of tensors.
        structure: The tree without its bytes, pickled. Open it only if you trust its sender.
    """

    memory: tuple[SharedHandle, ...]
    structure: bytes = field(repr=False)

    def open(self) -> Any:
        """Map the memory and rebuild the tree over it.

        Returns:
            The staged tree. Its tensors see the bytes of the owner's; writing to them changes this process's view only.

        Raises:
            HostMemoryError: If the owner or its staged copy is gone, or this process may not look into it.
        """
        return _Unpickler(self.structure, [handle.open() for handle in self.memory]).load()


def share(staged: object, arenas: Sequence[Arena]) -> SharedTree:
    """Describe a staged tree for other processes. Blocks: call it from a worker thread.

    Args:
        staged: A tree over shared arenas.
        arenas: Those that may be meant.

    Returns:
        What another process opens it with.

    Raises:
        StagingError: If no tensor of it is in shared memory, or something in it cannot be pickled.
    """
    stream = io.BytesIO()
    pickler = _Pickler(stream, arenas)
    try:
        pickler.dump(staged)
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise StagingError(
            f"the staged tree cannot be described to another process: {said(error)}.",
            remedy="Share the part of it that can be pickled.",
        ) from error
    if not pickler.used:
        raise StagingError(
            "no tensor of the tree is in shared memory of this stager.",
            remedy="Stage with StagingOptions(use_shared_memory=True) and share what that returned.",
        )
    return SharedTree(tuple(arena.share(arena.nbytes) for arena in pickler.used), stream.getvalue())


class _Pickler(pickle.Pickler):
    """Pickles tensors over shared arenas as places; everything else as it is."""

    def __init__(self, stream: io.BytesIO, arenas: Sequence[Arena]) -> None:
        super().__init__(stream, protocol=5)
        self._arenas = [arena for arena in arenas if arena.kind == "shared"]
        self.used: list[Arena] = []
        # Kept alive: what only code of objects makes for the pickler would leave its identity to the next.
        self._numbers: dict[int, tuple[int, torch.Tensor]] = {}

    def persistent_id(self, item: object) -> object:
        """Return the place of a tensor, or None for what is to be pickled."""
        if type(item) not in (torch.Tensor, torch.nn.Parameter):
            return None
        tensor: Any = item
        if tensor.is_quantized:
            # Without a quantizer torch would end the process when it describes it.
            scheme_of(tensor)
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            return None
        if _private.have_attributes((tensor,)):
            return None
        if tensor.is_conj() or tensor.is_neg():
            # Only code that the pickler calls makes such a view of a staged tensor. Its memory is not its value.
            return None
        storage = tensor.untyped_storage()
        address, nbytes = storage.data_ptr(), storage.nbytes()
        for arena in self._arenas:
            if nbytes and arena.address <= address < arena.address + arena.nbytes:
                if arena not in self.used:
                    self.used.append(arena)
                place = (self.used.index(arena), address - arena.address, nbytes)
                view = (tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
                number, _ = self._numbers.setdefault(id(tensor), (len(self._numbers), tensor))
                return number, place, view, type(tensor) is torch.nn.Parameter, tensor.requires_grad
        return None


class _Unpickler(pickle.Unpickler):
    """Rebuilds tensors over mapped memory, tied as they were."""

    def __init__(self, structure: bytes, memory: Sequence[Any]) -> None:
        super().__init__(io.BytesIO(structure))
        self._memory = memory
        self._storages: dict[object, torch.UntypedStorage] = {}
        self._tensors: dict[int, torch.Tensor] = {}

    def persistent_load(self, key: Any) -> torch.Tensor:
        """Return the tensor at a place."""
        number, place, (dtype, offset, shape, stride), is_parameter, requires_grad = key
        if number in self._tensors:
            return self._tensors[number]
        if place not in self._storages:
            arena, start, nbytes = place
            self._storages[place] = torch.from_numpy(self._memory[arena][start : start + nbytes]).untyped_storage()
        tensor = torch.empty(0, dtype=dtype, device="cpu").set_(self._storages[place], offset, shape, stride)
        made = torch.nn.Parameter(tensor, requires_grad) if is_parameter else tensor.requires_grad_(requires_grad)
        self._tensors[number] = made
        return made
