"""Which tensor goes into which file, where in it, and what the files consist of."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aiostage.checkpoint.blocks import FileTensor
from aiostage.errors import HostMemoryError, shown
from aiostage.snapshot import Snapshot
from aiostage.storage.parts import Content, memory_of
from aiostage.storage.safetensors import Record, header_cost, write_header

__all__ = ["INDEX_NAME", "SINGLE_NAME", "TensorFile", "index_content", "tensor_files"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_MAX_HEADER_COST = 64 << 20
"""Shards also end where their headers would become too large for other programs to read."""

_CHUNK = 256


@dataclass(frozen=True, slots=True)
class TensorFile:
    """One safetensors file to be written.

    Attributes:
        name: In the checkpoint's directory.
        tensors: In the order of their data.
        contents: The whole file, header included.
    """

    name: str
    tensors: Sequence[FileTensor]
    contents: list[Content]


def tensor_files(
    tensors: Sequence[FileTensor], max_shard_bytes: int, snapshot: Snapshot[Any] | None = None
) -> Generator[None, None, list[TensorFile]]:
    """Distribute tensors over files in their order, yielding now and then.

    Args:
        tensors: In the order of the tree.
        max_shard_bytes: How much data one file may have. A tensor larger than that has a file of its own.
        snapshot: That the tensors are of. Its memory was laid out like a file and is filled from its start, so what is
            in it is written in its order, across all files.

    Raises:
        HostMemoryError: If the bytes of the snapshot pass in an order that no file can have.

    Returns:
        The files; at least one.
    """
    if snapshot is not None:
        tensors = yield from _in_order(tensors, snapshot.memory)
        if snapshot.window is not None:
            _check_order(tensors, snapshot.memory)
    shards = yield from _shards(tensors, max_shard_bytes)
    files = []
    for number, shard in enumerate(shards, 1):
        name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        if snapshot is None:
            shard = yield from _in_order(shard)
        header = yield from write_header(_records(shard))
        contents: list[Content] = [torch.frombuffer(header, dtype=torch.uint8)]
        yield from _add_memory(shard, contents)
        files.append(TensorFile(name, shard, contents))
    return files


def _in_order(tensors: Sequence[FileTensor], memory: range | None = None) -> Generator[None, None, list[FileTensor]]:
    """Sort tensors by the size of their elements, and then by their places in memory, if any.

    With the largest elements first, every tensor is aligned to its own, without the gaps that the format forbids.
    """
    by_size = defaultdict[int, list[FileTensor]](list)
    for index, tensor in enumerate(tensors):
        by_size[tensor.element_bytes].append(tensor)
        if index % _CHUNK == 0:
            yield
    ordered: list[FileTensor] = []
    for size in sorted(by_size, reverse=True):
        ordered += by_size[size] if memory is None else (yield from _by_place(by_size[size], memory))
    return ordered


def _by_place(tensors: list[FileTensor], memory: range) -> Generator[None, None, list[FileTensor]]:
    """Sort tensors by their places in memory; those outside are last."""
    places: list[int] = []
    last, sorted_already = 0, True
    for index, tensor in enumerate(tensors):
        address = tensor.address
        place = address - memory.start if address in memory else len(memory)
        sorted_already = sorted_already and last <= place
        last = place
        places.append(place)
        if index % _CHUNK == 0:
            yield
    if sorted_already:
        return tensors
    return [tensors[index] for index in sorted(range(len(places)), key=places.__getitem__)]


def _check_order(tensors: Sequence[FileTensor], memory: range) -> None:
    """Refuse what would have to be written in another order than that of the memory."""
    last = 0
    for tensor in tensors:
        address = tensor.address
        if address in memory:
            if address < last:
                raise HostMemoryError(
                    f"the tensor {shown(tensor.name)} shares memory so that its bytes come too late to be written in "
                    "turn.",
                    remedy="Raise max_host_bytes so that the whole copy fits twice.",
                )
            last = address


def _shards(tensors: Sequence[FileTensor], max_shard_bytes: int) -> Generator[None, None, list[list[FileTensor]]]:
    shards: list[list[FileTensor]] = [[]]
    nbytes = cost = 0
    for index, tensor in enumerate(tensors):
        extra = header_cost(tensor.name, tensor.shape)
        full = nbytes + tensor.nbytes > max_shard_bytes or cost + extra > _MAX_HEADER_COST
        if full and shards[-1]:
            shards.append([])
            nbytes = cost = 0
        shards[-1].append(tensor)
        nbytes += tensor.nbytes
        cost += extra
        if index % _CHUNK == 0:
            yield
    return shards


def _records(tensors: Sequence[FileTensor]) -> Generator[Record, None, None]:
    position = 0
    for tensor in tensors:
        yield Record(tensor.name, tensor.dtype, tensor.shape, position, position + tensor.nbytes)
        position += tensor.nbytes


def _add_memory(tensors: Sequence[FileTensor], contents: list[Content]) -> Generator[None, None, None]:
    """Add the memory of tensors; what follows itself in memory becomes one piece, however many tensors it is."""
    start = stop = 0
    owners: list[object] = []
    for index, tensor in enumerate(tensors):
        if isinstance(tensor.memory, int) and tensor.memory == stop:
            owners.append(tensor.owner)
            stop += tensor.nbytes
        else:
            if stop > start:
                contents.append(memory_of(start, stop - start, owners))
            owners = [tensor.owner]
            if isinstance(tensor.memory, int):
                start, stop = tensor.memory, tensor.memory + tensor.nbytes
            else:
                contents.append(tensor.memory)
                start = stop = 0
        if index % _CHUNK == 0:
            yield
    if stop > start:
        contents.append(memory_of(start, stop - start, owners))


def index_content(files: Sequence[TensorFile]) -> Generator[None, None, list[Content]]:
    """Compose the index of a sharded checkpoint, yielding now and then.

    Args:
        files: All shards.

    Returns:
        The contents of the file :data:`INDEX_NAME`.
    """
    total = sum(tensor.nbytes for file in files for tensor in file.tensors)
    text = bytearray(f'{{"metadata":{{"total_size":{total}}},"weight_map":{{'.encode())
    separator = "\n"
    for file in files:
        for number, tensor in enumerate(file.tensors):
            text += f'{separator}{json.dumps(tensor.name)}:"{file.name}"'.encode()
            separator = ",\n"
            if number % _CHUNK == 0:
                yield
    text += b"\n}}\n"
    return [torch.frombuffer(text, dtype=torch.uint8)]
