"""One version of weights as another process gets it: memory with the tensors, and a text that says where they are.

The text has lines of JSON: a head, the storages, and the nodes of the tree as in a manifest. It names no code to run.
The same file has, after the text, the bytes that the staged tree has outside of shared memory: as a rule those of NumPy
arrays.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import numpy.typing
import torch
import xxhash

from aiostage._loop.workers import releasing_gil
from aiostage._memory.arena import Arena
from aiostage._memory.sending import offered
from aiostage._memory.shared import SentMemory, map_memory
from aiostage._platform.memory import memory_file
from aiostage.errors import CheckpointCorruptError, StagingError, shown
from aiostage.format.classes import Classes, declared_safe
from aiostage.format.decode import Memory, TreeDecoder
from aiostage.format.encode import TreeEncoder, TreeNode
from aiostage.format.lines import lines_of, parse_line
from aiostage.format.nodes import NodeTable, reading
from aiostage.format.safetensors import TensorRecord, checked_sizes

__all__ = ["Described", "describe", "open_described"]

_FORMAT = "aiostage-weights"
_VERSION = 1
_STORAGES_PER_LINE = 256
"""So that a thread that writes or reads the lines can release the GIL between two of them."""

_ALIGNMENT = 64
"""Bytes, for what comes after the text. No element of a tensor is larger."""

MAX_TEXT_BYTES = 256 << 20
MAX_EXTRA_BYTES = 64 << 20
"""Guesses, against mistakes such as a data set in the tree: each publication copies these bytes."""

_SHARED, _EXTRA = 0, 1


@dataclass(frozen=True, slots=True)
class Described:
    """One version of weights, as it is sent.

    Attributes:
        nbytes: Size of its tensors' memory, in bytes.
        text: The file with the text, and with the bytes behind it.
        text_bytes: How long the text is.
        digest: The digest of the whole file.
        memory: The memory of the tensors; None if there are none.
    """

    nbytes: int
    text: SentMemory
    text_bytes: int
    digest: str
    memory: SentMemory | None

    @property
    def descriptors(self) -> Sequence[int]:
        """The descriptors that are sent with the message."""
        return [self.text.descriptor] if self.memory is None else [self.text.descriptor, self.memory.descriptor]

    def message(self) -> dict[str, Any]:
        """Return what the message says of it."""
        return {
            "nbytes": self.nbytes,
            "text_bytes": self.text_bytes,
            "file_bytes": self.text.nbytes,
            "memory_bytes": self.memory.nbytes if self.memory is not None else 0,
            "digest": self.digest,
        }


def describe(staged: object) -> Described:
    """Describe a staged tree. Blocks: call it from a worker thread.

    Args:
        staged: Over memory of a stager with ``use_shared_memory=True``, and referred to until this returns.

    Raises:
        UnsupportedLeafError: If something in it cannot be carried.
        StagingError: If too much of it is not in shared memory, or is not a tensor.
        OSError: If the system refuses memory for the text.
    """
    encoder = TreeEncoder()
    encoder.walk(staged)
    places = _Places()
    for node in releasing_gil(encoder.tensors):
        places.add(node)
    head = {"format": _FORMAT, "version": _VERSION, "extra": sum(part.nbytes for part in places.extra)}
    text = bytearray(_dump(head))
    for start in releasing_gil(range(0, len(places.storages), _STORAGES_PER_LINE)):
        text += _dump(places.storages[start : start + _STORAGES_PER_LINE])
    for line in releasing_gil(encoder.lines()):
        text += line.encode("ascii") + b"\n"
        if len(text) > MAX_TEXT_BYTES:
            raise StagingError(
                f"values other than tensors take more than {MAX_TEXT_BYTES >> 20} MiB.",
                remedy="Publish the weights alone, or put bulk data into tensors.",
            )
    text += b"\n" * (-len(text) % _ALIGNMENT)
    memory = places.arena.send() if places.arena is not None else None
    if places.arena is not None and memory is None:
        raise StagingError("the shared memory of the staged tree was closed.", remedy="Publish before you close it.")
    text_bytes = len(text)
    for part in places.extra:
        text += part.data
    return Described(places.nbytes, _written(text), text_bytes, xxhash.xxh3_64_hexdigest(text), memory)


class _Places:
    """Where the storages of a tree are: in the shared arena, or in the extra bytes."""

    def __init__(self) -> None:
        self.arena: Arena | None = None
        self.storages: list[tuple[int, int, int]] = []
        self.extra: list[numpy.typing.NDArray[numpy.uint8]] = []
        self.nbytes = 0
        self._arenas = offered()
        self._numbers: dict[tuple[int, int], int] = {}
        self._extra_bytes = 0

    def add(self, node: TreeNode) -> None:
        """Put into the node of a tensor where its elements are."""
        tensor: torch.Tensor = node.value
        storage = tensor.untyped_storage()
        # One number for each storage, so that tied leaves stay tied.
        key = (storage.data_ptr(), storage.nbytes())
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self.storages)
            self.storages.append(self._place(storage, *key))
        node.form = {
            "name": str(number),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
            "offset": tensor.storage_offset(),
            **node.form,
        }

    def _place(self, storage: torch.UntypedStorage, address: int, nbytes: int) -> tuple[int, int, int]:
        self.nbytes += nbytes
        # All tensors of one staging lie in one arena, so there is one descriptor to send.
        arenas = self._arenas if self.arena is None else [self.arena]
        for arena in arenas:
            if nbytes and arena.address <= address and address + nbytes <= arena.address + arena.nbytes:
                self.arena = arena
                return _SHARED, address - arena.address, nbytes
        start = self._extra_bytes
        data = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage).numpy()
        padding = numpy.zeros(-nbytes % _ALIGNMENT, numpy.uint8)
        self.extra += (data, padding)
        self._extra_bytes += nbytes + padding.nbytes
        if self._extra_bytes > MAX_EXTRA_BYTES:
            raise StagingError(
                f"more than {MAX_EXTRA_BYTES >> 20} MiB of the staged tree are not in shared memory.",
                remedy="Stage with StagingOptions(use_shared_memory=True), and publish tensors, not NumPy arrays.",
            )
        return _EXTRA, start, nbytes


def _written(text: bytearray) -> SentMemory:
    """Return a file in memory with a text."""
    descriptor = memory_file("aiostage-weights")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(text)
        return SentMemory(f"/proc/self/fd/{descriptor}", len(text))
    finally:
        os.close(descriptor)


def open_described(
    message: dict[str, Any], descriptors: Sequence[int], classes: Iterable[type], *, path: str
) -> tuple[Any, numpy.typing.NDArray[numpy.uint8] | None]:
    """Open what :func:`describe` has described in another process. Blocks: call it from a worker thread.

    Args:
        message: The message that came with it.
        descriptors: That came with it. They stay open.
        classes: Classes whose objects are made again.
        path: The publisher, for errors.

    Returns:
        The tree, and the memory that its tensors are over; None if it has none. Writing to it changes this
        process's view only.

    Raises:
        CheckpointCorruptError: If it describes no tree.
        HostMemoryError: If memory cannot be had.
    """
    with reading(path):
        text_bytes, file_bytes, memory_bytes = checked_sizes(
            [message.get(key) for key in ("text_bytes", "file_bytes", "memory_bytes")]
        )
        # Everything in the message is checked before it is used: the other end may be of another version.
        if len(descriptors) != (2 if memory_bytes else 1):
            raise ValueError(f"it came with {len(descriptors)} descriptors")
        if not text_bytes <= file_bytes <= MAX_TEXT_BYTES + MAX_EXTRA_BYTES + _ALIGNMENT:
            raise ValueError(f"its text has {text_bytes} of {file_bytes} bytes")
        text = _read(descriptors[0], file_bytes)
        if xxhash.xxh3_64_hexdigest(text) != message.get("digest"):
            raise ValueError("its text does not match its digest")
        # There is no digest of the memory, which would read all of it. The lock on its file keeps it unchanged as long
        # as any process maps it.
        shared = map_memory(descriptors[1], memory_bytes) if memory_bytes else None
        tree = _tree(text, text_bytes, shared, Classes(classes, declared_safe()), path)
    return tree, shared


def _tree(
    text: bytearray,
    text_bytes: int,
    shared: numpy.typing.NDArray[numpy.uint8] | None,
    classes: Classes,
    path: str,
) -> Any:
    lines = lines_of(memoryview(text)[:text_bytes])
    head = parse_line(next(lines))
    if head["format"] != _FORMAT or head["version"] != _VERSION:
        raise CheckpointCorruptError(
            f"it is {shown(head['format'])} of version {shown(head['version'])}, and only version {_VERSION} is known.",
            path=path,
            remedy="Run publisher and subscribers with the same aiostage.",
        )
    extra = numpy.frombuffer(text, numpy.uint8)[text_bytes:]
    memories = {_SHARED: shared, _EXTRA: extra}
    records: dict[str, TensorRecord] = {}
    data: dict[str, torch.Tensor] = {}
    table = NodeTable()
    for line in releasing_gil(lines):
        value = parse_line(line)
        if type(value) is list:
            for kind, start, nbytes in value:
                name, memory = str(len(records)), memories[kind]
                start, nbytes = checked_sizes([start, nbytes])
                if memory is None or start + nbytes > memory.nbytes:
                    raise ValueError(f"storage {name} exceeds its memory")
                records[name] = TensorRecord(name, "U8", (nbytes,), 0, nbytes)
                data[name] = torch.from_numpy(memory[start : start + nbytes])
        else:
            table.add(value)
    # Before a tensor is made: this refuses nodes that refer to missing ones, or to themselves.
    table.complete()
    table.tensor_names()
    return TreeDecoder(table, Memory(records, data), path=path, classes=classes).build()


def _read(descriptor: int, nbytes: int) -> bytearray:
    """Return the contents of a file, which has to have the expected length."""
    if os.fstat(descriptor).st_size != nbytes:
        raise ValueError(f"expected a text of {nbytes} bytes, got {os.fstat(descriptor).st_size}")
    text = bytearray(nbytes)
    view, position = memoryview(text), 0
    while position < nbytes:
        count = os.preadv(descriptor, [view[position:]], position)
        if not count:
            raise ValueError(f"its text ends after {position} bytes")
        position += count
    return text


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"
