"""How leaves look at the memory of files' tensors, and how that memory has to be laid out for them."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from aiostage.checkpoint.blocks import CARRIERS, MAX_SPREAD, contiguous_strides, is_injective
from aiostage.checkpoint.nodes import NodeTable, reading
from aiostage.checkpoint.values import torch_constant
from aiostage.errors import shown
from aiostage.storage.safetensors import DTYPES, Record
from aiostage.storage.sizes import checked_sizes, elements_in

__all__ = ["View", "contents_of", "sizes_of", "spread_views", "view_of"]

_CHUNK = 64
_QUANTIZED = frozenset((torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4))


@dataclass(frozen=True, slots=True)
class View:
    """How a leaf looks at memory.

    Attributes:
        dtype: Of its elements.
        shape: As usual.
        stride: As usual.
        offset: Of its first element, in elements.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """How much memory it needs, from its beginning to the end of the view."""
        if 0 in self.shape:
            return self.offset * self.dtype.itemsize
        reach = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (self.offset + 1 + reach) * self.dtype.itemsize

    def over(self, data: torch.Tensor) -> torch.Tensor:
        """Return the leaf over one-dimensional uint8 memory, on any device.

        Raises:
            ValueError: If it does not fit.
        """
        if self.nbytes > data.numel():
            raise ValueError(f"{shown(self)} exceeds {data.numel()} bytes")
        if self.dtype is not torch.complex32:
            return _over(data, self.dtype, self)
        with warnings.catch_warnings():
            # They are called experimental whenever one is made; PyTorch has warned the code that saved it.
            warnings.simplefilter("ignore", UserWarning)
            return _over(data, self.dtype, self)

    def elements_in(self, data: torch.Tensor) -> torch.Tensor:
        """Return the same elements as a tensor of a dtype that torch can copy, to be filled in index order."""
        return _over(data, CARRIERS[self.dtype.itemsize], self)


def _over(data: torch.Tensor, dtype: torch.dtype, view: View) -> torch.Tensor:
    empty = torch.empty(0, dtype=dtype, device=data.device)
    return empty.set_(data.untyped_storage(), view.offset, view.shape, view.stride)


def view_of(form: dict[str, Any], records: Mapping[str, Record]) -> View:
    """Return how a leaf looks at the memory of its file's tensor.

    Args:
        form: Of the node.
        records: The tensors of files, by name.

    Raises:
        ValueError: If it does not fit the tensor. Other exceptions are possible too.
    """
    name = form["name"]
    record = records[name]
    dtype = torch_constant(form["dtype"]) if "dtype" in form else DTYPES[record.dtype]
    shape = checked_sizes(form["shape"]) if "shape" in form else record.shape
    stride = checked_sizes(form["stride"]) if "stride" in form else contiguous_strides(shape)
    if dtype in _QUANTIZED:
        raise ValueError(f"{dtype} needs a quantization scheme")
    if len(stride) != len(shape):
        raise ValueError(f"there are {len(shape)} sizes and {len(stride)} strides")
    if "offset" not in form and elements_in(shape) * dtype.itemsize != record.stop - record.start:
        raise ValueError(f"the elements of {shown(name)} are not {dtype} {shown(shape)}")
    (offset,) = checked_sizes([form.get("offset", 0)])
    return View(dtype, shape, stride, offset)


def spread_views(
    table: NodeTable, records: Mapping[str, Record], positions: Mapping[str, int], *, path: str
) -> Generator[None, None, dict[str, View]]:
    """Find the tensors that lie in files in index order, but did not in memory, yielding now and then.

    Args:
        table: Of the nodes, of which those that are reached count.
        records: The tensors of files, by name.
        positions: Where the data of each begins in its file.
        path: Of the manifest, for errors.

    Returns:
        By name, how all leaves look at its memory.

    Raises:
        CheckpointCorruptError: If it cannot be laid out like that.
    """
    found: dict[str, View] = {}
    plain: set[str] = set()
    for index, (form, how) in enumerate(zip(table.forms, table.reached, strict=True)):
        if how and form["is"] == "tensor":
            if "stride" in form and "offset" not in form:
                with reading(path):
                    _add_spread(found, form, records, positions)
            else:
                plain.add(form["name"])
        if index % _CHUNK == 0:
            yield
    with reading(path):
        if both := plain.intersection(found):
            raise ValueError(f"leaves look at {shown(both.pop())} in different ways")
    return found


def _add_spread(
    found: dict[str, View], form: dict[str, Any], records: Mapping[str, Record], positions: Mapping[str, int]
) -> None:
    name, view = form["name"], view_of(form, records)
    nbytes = records[name].stop - records[name].start
    # One layout for each, or a few nodes could ask for any amount of memory.
    if found.setdefault(name, view) != view:
        raise ValueError(f"leaves look at {shown(name)} in different ways")
    if view.nbytes > MAX_SPREAD * nbytes or (nbytes and not is_injective(view.shape, view.stride)):
        raise ValueError(f"{nbytes} bytes cannot be laid out as {shown(view)}")
    if positions[name] % view.dtype.itemsize:
        raise ValueError(f"the elements of {shown(name)} are cut by the parts of its file")


def sizes_of(
    names: Mapping[str, object], records: Mapping[str, Record], spread: Mapping[str, View]
) -> Generator[None, None, dict[str, int]]:
    """Return how much memory tensors of files take, in bytes, yielding now and then."""
    sizes: dict[str, int] = {}
    for count, name in enumerate(names):
        view = spread.get(name)
        sizes[name] = view.nbytes if view is not None else records[name].stop - records[name].start
        if count % _CHUNK == 0:
            yield
    return sizes


def contents_of(
    data: Mapping[str, torch.Tensor], spread: Mapping[str, View]
) -> Generator[None, None, dict[str, torch.Tensor]]:
    """Return where the bytes of files' tensors go in their memory, yielding now and then. Nothing goes to ``meta``."""
    contents: dict[str, torch.Tensor] = {}
    for count, (name, memory) in enumerate(data.items()):
        if not memory.is_meta:
            view = spread.get(name)
            contents[name] = view.elements_in(memory) if view is not None else memory
        if count % _CHUNK == 0:
            yield
    return contents
