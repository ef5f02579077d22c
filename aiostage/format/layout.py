"""From the tensors of a tree to files: one tensor for each piece of memory, in which file, and where in it.

Three steps: `measure` finds the addresses of leaves, `file_tensors` decides what is written for each, and
`tensor_files` distributes that over files. Nothing is copied: files are described by addresses, and keep the tensors
alive.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aiostage._loop.workers import releasing_gil
from aiostage.errors import HostMemoryError, UnsupportedLeafError, shown
from aiostage.format.encode import TreeNode, path_of
from aiostage.format.parts import Content, extent_of, memory_of
from aiostage.format.safetensors import (
    CARRIERS,
    DTYPE_NAMES,
    MAX_SPREAD,
    MAX_TENSOR_NAME,
    TensorRecord,
    contiguous_strides,
    header_cost,
    is_injective,
    write_header,
)
from aiostage.leaf import format_path

__all__ = [
    "INDEX_NAME",
    "SINGLE_NAME",
    "FileTensor",
    "Leaf",
    "TensorFile",
    "file_tensors",
    "index_content",
    "measure",
    "tensor_files",
]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_MAX_HEADER_COST = 64 << 20
"""A shard also ends where its header would become too large for other programs, which read up to 100 MB."""

_LARGEST_ELEMENT = 16
"""Bytes of complex128, the largest element of torch. All smaller sizes divide it."""


@dataclass(slots=True)
class Leaf:
    """A tensor of the tree and the memory it looks at.

    Attributes:
        node: The node in the tree.
        tensor: In host memory, its elements being what they look like (no conjugate or negative view).
        address: The address of its first element.
        stop: One past the last address.
        contiguous: Whether its elements lie in index order without gaps.
    """

    node: TreeNode
    tensor: torch.Tensor
    address: int
    stop: int
    contiguous: bool


@dataclass(slots=True)
class FileTensor:
    """A tensor of a file.

    Attributes:
        name: Unique in the checkpoint.
        dtype: The format's name.
        shape: In the file.
        nbytes: Size of its elements.
        element_bytes: A power of two that divides ``nbytes``: what its elements really are, at most.
        memory: Its bytes: an address, or a tensor whose elements in index order they are.
        owner: Keeps the memory alive.
        is_copy: Whether another one has these bytes too, and the tree refers to that one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    element_bytes: int
    memory: int | torch.Tensor
    owner: object
    is_copy: bool = False

    @property
    def address(self) -> int:
        """Of the first byte; 0 without any."""
        return self.memory if isinstance(self.memory, int) else self.memory.data_ptr()


def measure(nodes: Sequence[TreeNode]) -> tuple[list[Leaf], list[int], list[int]]:
    """Look at the memory of tensors.

    Returns:
        The leaves, and for each the addresses where its memory starts and where it ends.

    Raises:
        UnsupportedLeafError: If a tensor has no memory that can be written.
    """
    leaves: list[Leaf] = []
    starts: list[int] = []
    stops: list[int] = []
    for node in releasing_gil(nodes):
        tensor = node.value
        if tensor.is_conj() or tensor.is_neg():
            # Copies, since the memory has other values than the elements. The leaf keeps the copy alive.
            tensor = tensor.detach().resolve_conj().resolve_neg()
        contiguous = tensor.is_contiguous()
        address = stop = 0
        if count := tensor.numel():
            nbytes = (count if contiguous else extent_of(tensor.shape, tensor.stride())) * tensor.element_size()
            address = _address(node, tensor, nbytes)
            stop = address + nbytes
        leaves.append(Leaf(node, tensor, address, stop, contiguous))
        starts.append(address)
        stops.append(stop)
    return leaves, starts, stops


def _address(node: TreeNode, tensor: torch.Tensor, nbytes: int) -> int:
    """Return where the memory of a tensor starts, if it has all that it needs."""
    try:
        address = tensor.data_ptr()
        available = tensor.untyped_storage().nbytes()
    except RuntimeError as error:
        raise _refused(node, f"its memory cannot be read: {error}") from error
    # A storage that was resized to less (FSDP frees parameters like that) leaves tensors over memory that is gone.
    if address == 0 or tensor.storage_offset() * tensor.element_size() + nbytes > available:
        raise _refused(node, "its storage is smaller than its elements")
    return address


def _refused(node: TreeNode, reason: str) -> UnsupportedLeafError:
    return UnsupportedLeafError(f"{reason}.", path=format_path(path_of(node)), remedy="Stage it first.")


def file_tensors(
    leaves: Sequence[Leaf], overlapping: Iterable[Sequence[int]], other_places: Sequence[TreeNode] | None = None
) -> list[FileTensor]:
    """Decide what is written for each leaf, and say so in the leaf's node.

    A leaf alone in its memory is written as its elements, under its own name. Leaves that share memory in the same
    way are written once. Leaves that share it in different ways are written as that memory: under the name of a
    leaf that covers it all in index order, or else under a name of its own.

    Args:
        leaves: In the order of the tree.
        overlapping: Groups of indices: the leaves whose memory overlaps.
        other_places: Where tensors of leaves are met again, as nodes that are not in the tree. With these, leaves that
            share memory are written once more for each name, for readers that know no ties. None: once for all.

    Returns:
        The tensors of the files, in the order of the tree.

    Raises:
        UnsupportedLeafError: If leaves share memory in a way that cannot come back.
    """
    names = _TensorNames()
    group_of = {index: group for group in overlapping for index in group}
    done: set[int] = set()
    found = []
    for index, leaf in enumerate(releasing_gil(leaves)):
        if index not in done:
            group = group_of.get(index)
            if group is None:
                found.append(_plain(leaf, names) or _alone(leaf, [leaf], names))
            else:
                done.update(group)
                found.append(_shared([leaves[member] for member in sorted(group)], names))
    if other_places is not None:
        found += _copies(leaves, other_places, names)
    return found


def _copies(leaves: Sequence[Leaf], other_places: Iterable[TreeNode], names: _TensorNames) -> list[FileTensor]:
    """Write leaves under the names that no tensor of a file has yet."""
    named = set(names.nodes())
    found = [_elements(leaf, names.name(leaf.node), is_copy=True) for leaf in leaves if leaf.node not in named]
    leaf_of = {id(leaf.node.value): leaf for leaf in leaves}
    for node in releasing_gil(other_places):
        leaf = leaf_of.get(id(node.value))
        if leaf is not None:
            found.append(_elements(leaf, names.name(node), is_copy=True))
    return found


def _plain(leaf: Leaf, names: _TensorNames) -> FileTensor | None:
    """Write a leaf that its name alone describes, as most are, in the fewest steps; None if it is not such."""
    node, tensor = leaf.node, leaf.tensor
    dtype = _name_in_format(tensor)
    if dtype is None or node.form or not leaf.contiguous:
        return None
    name = names.name(node)
    shape, nbytes = tuple(tensor.shape), leaf.stop - leaf.address
    node.form = {"name": name}
    if 1 in shape:
        node.form |= _unusual_strides(tensor)
    return FileTensor(name, dtype, shape, nbytes, tensor.element_size(), leaf.address, tensor)


def _alone(leaf: Leaf, sharers: Sequence[Leaf], names: _TensorNames) -> FileTensor:
    """Write the elements of a leaf, or its memory if its elements overlap or are too far apart."""
    tensor = leaf.tensor
    count = tensor.numel()
    # Elements are preferred: other programs can read them, and a large gap between rows takes no space. Strides that
    # have elements overlap, as expand() makes them, must come back as such, so their memory is written.
    if (
        not leaf.contiguous
        and count
        and (
            leaf.stop - leaf.address > MAX_SPREAD * count * tensor.element_size()
            or not is_injective(tensor.shape, tensor.stride())
        )
    ):
        return _memory(sharers, names)
    name = names.name(leaf.node)
    for sharer in sharers:
        form: dict[str, Any] = {"name": name}
        if leaf.contiguous:
            form |= _unusual_strides(tensor)
        else:
            form["stride"] = list(tensor.stride())
        if _name_in_format(tensor) is None:
            form |= {"dtype": _dtype_name(tensor), "shape": list(tensor.shape)}
        sharer.node.form = {**form, **sharer.node.form}
    return _elements(leaf, name)


def _elements(leaf: Leaf, name: str, *, is_copy: bool = False) -> FileTensor:
    """Write the elements of a leaf."""
    tensor = leaf.tensor
    count = tensor.numel()
    memory: int | torch.Tensor = leaf.address
    if not leaf.contiguous and count:
        # As integers of the same size, because torch cannot copy every dtype.
        memory = torch.empty(0, dtype=CARRIERS[tensor.element_size()], device="cpu")
        memory.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    dtype, shape = _in_file(tensor)
    element_bytes = tensor.element_size()
    return FileTensor(name, dtype, shape, count * element_bytes, element_bytes, memory, tensor, is_copy)


def _shared(group: Sequence[Leaf], names: _TensorNames) -> FileTensor:
    """Write what several leaves look at, once."""
    first = group[0]
    alike = all(
        leaf.address == first.address
        and leaf.tensor.dtype is first.tensor.dtype
        and leaf.tensor.shape == first.tensor.shape
        and leaf.tensor.stride() == first.tensor.stride()
        for leaf in group
    )
    return _alone(first, group, names) if alike else _memory(group, names)


def _memory(group: Sequence[Leaf], names: _TensorNames) -> FileTensor:
    """Write the memory that leaves look at."""
    first = group[0]
    start, stop = min(leaf.address for leaf in group), max(leaf.stop for leaf in group)
    cover = next((leaf for leaf in group if leaf.contiguous and (leaf.address, leaf.stop) == (start, stop)), None)
    storage = first.tensor.untyped_storage().data_ptr()
    # Elements must lie at multiples of their size, also in the memory that the file is read into. That begins at a
    # multiple of 16, so the range is extended down to one, counted from the storage, whose own start is aligned.
    if any((leaf.address - start) % leaf.tensor.element_size() for leaf in group):
        start -= (start - storage) % _LARGEST_ELEMENT
        cover = None
    name = names.name(cover.node) if cover is not None else names.name(first.node, "storage")
    dtypes = {leaf.tensor.dtype for leaf in group}
    itemsize = max(leaf.tensor.element_size() for leaf in group)
    if cover is not None:
        dtype, shape = _in_file(cover.tensor)
    elif len(dtypes) == 1 and first.tensor.dtype in DTYPE_NAMES:
        dtype, shape = DTYPE_NAMES[first.tensor.dtype], ((stop - start) // itemsize,)
    else:
        dtype, shape = "U8", (stop - start,)
    for leaf in group:
        offset, rest = divmod(leaf.address - start, leaf.tensor.element_size())
        # Still possible if two storages overlap, as those of two NumPy arrays over one buffer. And the extended range
        # must not begin before the memory that is known to exist.
        if rest or start < min(storage, first.address):
            raise _refused(leaf.node, "it shares memory with another leaf at an address that is not aligned")
        leaf.node.form = {
            "name": name,
            "dtype": _dtype_name(leaf.tensor),
            "shape": list(leaf.tensor.shape),
            "stride": list(leaf.tensor.stride()),
            "offset": offset,
            **leaf.node.form,
        }
    element_bytes = math.gcd(stop - start, itemsize)
    return FileTensor(name, dtype, shape, stop - start, element_bytes, start, [leaf.tensor for leaf in group])


def _unusual_strides(tensor: torch.Tensor) -> dict[str, Any]:
    """Return what a node says of a contiguous tensor whose dimensions of size 1 have strides of their own.

    They say nothing of where elements lie, but are the memory format: that of a channels_last weight, for one.
    """
    shape, stride = tensor.shape, tensor.stride()
    if 1 not in shape or 0 in shape or stride == contiguous_strides(shape):
        return {}
    # With an offset the node describes a view of the memory. With strides alone it would say that the elements lie in
    # another order in the file than in memory.
    return {"stride": list(stride), "offset": 0}


def _in_file(tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    """Return the dtype and the shape under which contiguous memory is written; bytes, if the format has no name."""
    dtype = _name_in_format(tensor)
    if dtype is None:
        return "U8", (tensor.numel() * tensor.element_size(),)
    return dtype, tuple(tensor.shape)


def _name_in_format(tensor: torch.Tensor) -> str | None:
    """Return the name that the format has for a tensor's dtype; None without one, and for a single pair of elements."""
    # The format doubles the last dimension of this dtype, which a tensor without dimensions lacks.
    if tensor.dtype is torch.float4_e2m1fn_x2 and tensor.dim() == 0:
        return None
    return DTYPE_NAMES.get(tensor.dtype)


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


class _TensorNames:
    """Gives tensors names that other programs can read: the keys that lead to them, with dots between."""

    def __init__(self) -> None:
        self._used: dict[str, TreeNode | None] = {"__metadata__": None}
        # By container, how the names of all that it contains begin; None if that is too long.
        self._prefixes: dict[TreeNode, str | None] = {}

    def name(self, node: TreeNode, suffix: str | None = None) -> str:
        """Return a name that no other tensor has."""
        parent = node.parent
        name: str | None = ""
        if parent is not None:
            if parent not in self._prefixes:
                self._prefixes[parent] = _prefix(parent)
            prefix = self._prefixes[parent]
            name = prefix + _step(node) if prefix is not None else None
        if name is None or len(name) >= MAX_TENSOR_NAME:
            name = f"tensor.{len(self._used)}"
        elif suffix is not None:
            name = f"{name}.{suffix}" if name else suffix
        name = name or "tensor"
        # Keys 1 and "1" have the same name, and so have the paths "a.b" and "a", "b".
        unique, number = name, 2
        while unique in self._used:
            unique, number = f"{name}~{number}", number + 1
        self._used[unique] = node if suffix is None else None
        return unique

    def nodes(self) -> Iterator[TreeNode]:
        """Iterate over the nodes that have a name of their own, without a suffix."""
        return (node for node in self._used.values() if node is not None)


def _prefix(node: TreeNode) -> str | None:
    """Return the keys that lead to a node, each with a dot behind it; None if that is too long."""
    steps: list[str] = []
    length = 0
    at = node
    while (parent := at.parent) is not None:
        steps.append(_step(at))
        length += len(steps[-1]) + 1
        if length > MAX_TENSOR_NAME:
            return None
        at = parent
    return "".join(f"{step}." for step in reversed(steps))


def _step(node: TreeNode) -> str:
    """Return a node's key as it stands in names."""
    key = node.key
    step = str(key) if isinstance(key, (str, int)) else repr(key)[:MAX_TENSOR_NAME]
    return step if step.isascii() else step.encode("utf-8", "backslashreplace").decode()


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
    tensors: Sequence[FileTensor], max_shard_bytes: int, memory: range | None = None, *, in_order: bool = False
) -> list[TensorFile]:
    """Distribute tensors over files in their order.

    Args:
        tensors: In the order of the tree.
        max_shard_bytes: How much data one file may have. A tensor larger than that has a file of its own.
        memory: Addresses that were laid out like a file and are filled from the start, so what is in it is written in
            its order, across all files. None: in any order.
        in_order: Whether bytes must be written in the order of the memory, since the memory is used again.

    Raises:
        HostMemoryError: If the bytes come ``in_order``, and in one that no file can have.

    Returns:
        The files; at least one.
    """
    if memory is not None:
        tensors = _in_order(tensors, memory)
        if in_order:
            _check_order(tensors, memory)
    shards = _shards(tensors, max_shard_bytes)
    files = []
    for number, shard in enumerate(shards, 1):
        name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        # With memory, they are sorted already, across all files.
        if memory is None:
            shard = _in_order(shard)
        header = write_header(_records(shard))
        contents: list[Content] = [torch.frombuffer(header, dtype=torch.uint8)]
        _add_memory(shard, contents)
        files.append(TensorFile(name, shard, contents))
    return files


def _in_order(tensors: Sequence[FileTensor], memory: range | None = None) -> list[FileTensor]:
    """Sort tensors by the size of their elements, and then by their places in memory, if any.

    With the largest elements first, every tensor is aligned to its own, without the gaps that the format forbids.
    """
    by_size = defaultdict[int, list[FileTensor]](list)
    for tensor in releasing_gil(tensors):
        by_size[tensor.element_bytes].append(tensor)
    ordered: list[FileTensor] = []
    for size in sorted(by_size, reverse=True):
        ordered += by_size[size] if memory is None else _by_place(by_size[size], memory)
    return ordered


def _by_place(tensors: list[FileTensor], memory: range) -> list[FileTensor]:
    """Sort tensors by their places in memory; those outside are last."""
    places: list[int] = []
    last, sorted_already = 0, True
    for tensor in releasing_gil(tensors):
        address = tensor.address
        place = address - memory.start if address in memory else len(memory)
        sorted_already = sorted_already and last <= place
        last = place
        places.append(place)
    if sorted_already:
        return tensors
    return [tensors[index] for index in sorted(range(len(places)), key=places.__getitem__)]


def _check_order(tensors: Sequence[FileTensor], memory: range) -> None:
    """Refuse what would have to be written in another order than that of the memory."""
    stop = 0
    for tensor in tensors:
        address = tensor.address
        if address in memory:
            if address < stop:
                raise HostMemoryError(
                    f"the tensor {shown(tensor.name)} shares memory so that its bytes come too late to be written in "
                    "turn.",
                    remedy="Raise max_host_bytes so that the whole copy fits twice.",
                )
            stop = address + tensor.nbytes


def _shards(tensors: Sequence[FileTensor], max_shard_bytes: int) -> list[list[FileTensor]]:
    shards: list[list[FileTensor]] = [[]]
    nbytes = cost = 0
    for tensor in releasing_gil(tensors):
        extra = header_cost(tensor.name, tensor.shape)
        full = nbytes + tensor.nbytes > max_shard_bytes or cost + extra > _MAX_HEADER_COST
        if full and shards[-1]:
            shards.append([])
            nbytes = cost = 0
        shards[-1].append(tensor)
        nbytes += tensor.nbytes
        cost += extra
    return shards


def _records(tensors: Sequence[FileTensor]) -> Generator[TensorRecord, None, None]:
    position = 0
    for tensor in tensors:
        yield TensorRecord(tensor.name, tensor.dtype, tensor.shape, position, position + tensor.nbytes)
        position += tensor.nbytes


def _add_memory(tensors: Sequence[FileTensor], contents: list[Content]) -> None:
    """Add the memory of tensors. Tensors that lie one after the other in memory become one piece.

    Thousands of small tensors in one arena are then written without a copy, in a few large parts.
    """
    start = stop = 0
    owners: list[object] = []
    for tensor in releasing_gil(tensors):
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
    if stop > start:
        contents.append(memory_of(start, stop - start, owners))


def index_content(files: Sequence[TensorFile]) -> list[Content]:
    """Compose the index of a sharded checkpoint.

    Args:
        files: All shards.

    Returns:
        The contents of the file :data:`INDEX_NAME`.
    """
    total = sum(tensor.nbytes for file in files for tensor in file.tensors)
    text = bytearray(f'{{"metadata":{{"total_size":{total}}},"weight_map":{{'.encode())
    separator = "\n"
    for file in files:
        for tensor in releasing_gil(file.tensors):
            text += f'{separator}{json.dumps(tensor.name)}:"{file.name}"'.encode()
            separator = ",\n"
    text += b"\n}}\n"
    return [torch.frombuffer(text, dtype=torch.uint8)]
