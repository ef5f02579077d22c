"""Where the elements of a checkpoint go that is loaded into a live tree: straight there, or beside it first."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field

import torch

from aiostage.checkpoint.devices import host_memory
from aiostage.checkpoint.into import Transfer, copyable
from aiostage.format.decode import Memory
from aiostage.format.nodes import sizes_of
from aiostage.format.safetensors import Record

__all__ = ["Placement", "place"]

_CHUNK = 64


@dataclass(slots=True)
class Placement:
    """Where elements are to be read to.

    Attributes:
        contents: For names of tensors in files, live tensors and new host memory.
        direct: The live tensors among them.
    """

    contents: dict[str, torch.Tensor] = field(default_factory=dict)
    direct: list[torch.Tensor] = field(default_factory=list)


def place(
    transfer: Transfer,
    memory: Memory,
    positions: Mapping[str, int],
    device_of: Callable[[torch.Tensor], torch.device | None],
    *,
    in_place: bool,
    path: str,
) -> Generator[None, None, Placement]:
    """Decide where elements that have not been read yet go, and have those copied that do not go straight.

    Args:
        transfer: Of the two trees; gets the copies.
        memory: Of the loaded tree.
        positions: Where the data of each tensor begins in its file.
        device_of: Returns the device that a tensor is on, or None for host memory.
        in_place: Whether elements may go straight into live tensors.
        path: Of the manifest, for errors.

    Raises:
        HostMemoryError: If there is no memory for what does not go straight.
    """
    placement = Placement()
    waiting: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    records: dict[str, Record] = {}
    for count, (_, live, loaded) in enumerate(transfer.pairs):
        if not loaded.is_meta:
            transfer.add(live, loaded, device_of(live))
        elif live.numel():
            record = memory.origin(loaded)
            records[record.name] = record
            waiting.setdefault(record.name, []).append((live, loaded))
        if count % _CHUNK == 0:
            yield
    beside: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for count, (name, targets) in enumerate(waiting.items()):
        first = targets[0][0]
        is_cast = any(live.dtype is not loaded.dtype for live, loaded in targets)
        if in_place and not is_cast and _is_one([live for live, _ in targets]) and _takes(first, positions[name]):
            placement.contents[name] = copyable(first)
            placement.direct.append(first)
        else:
            beside[name] = targets
        if count % _CHUNK == 0:
            yield
    new = yield from host_memory((yield from sizes_of(beside, records, {})), path=path)
    placement.contents |= new
    for count, (name, targets) in enumerate(beside.items()):
        for live, loaded in targets:
            transfer.add(live, _elements(new[name], loaded), device_of(live))
        if count % _CHUNK == 0:
            yield
    return placement


def _is_one(targets: list[torch.Tensor]) -> bool:
    """Return whether several live tensors are the same memory, looked at in the same way."""
    first = targets[0]
    return all(
        live is first or (live.data_ptr() == first.data_ptr() and live.stride() == first.stride()) for live in targets
    )


def _takes(live: torch.Tensor, position: int) -> bool:
    """Return whether bytes of a file can be put into a live tensor a part at a time."""
    if live.is_conj() or live.is_neg():
        return False
    if live.is_contiguous():
        return True
    if any(size > 1 and stride == 0 for size, stride in zip(live.shape, live.stride(), strict=True)):
        return False
    # Parts begin at multiples of any element's size, and so do the elements in them, or else one might be cut in two.
    return position % live.element_size() == 0


def _elements(data: torch.Tensor, loaded: torch.Tensor) -> torch.Tensor:
    """Return memory that has elements in index order as a tensor like a loaded one, which has none."""
    dtype = copyable(loaded).dtype
    return data.view(dtype).view(loaded.shape)
