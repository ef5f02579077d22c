"""The table of nodes that a manifest spells: what refers to what, and how its tensors look at the memory of files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress
from typing import Any, TypeVar

import torch

from aiostage._loop.workers import large_lists, release_gil, releasing_gil
from aiostage._warnings import without_warnings
from aiostage.errors import CheckpointCorruptError, HostMemoryError, StagingError, said, shown
from aiostage.format.safetensors import (
    CARRIERS,
    DTYPES,
    MAX_SPREAD,
    TensorRecord,
    checked_sizes,
    contiguous_strides,
    elements_in,
    is_injective,
)
from aiostage.format.values import EXACT_INTEGERS, MAPPINGS, check_hashed, torch_constant

__all__ = [
    "LEFT_OUT",
    "LOOKED_INTO",
    "NodeTable",
    "View",
    "contents_of",
    "path_step",
    "reading",
    "sizes_of",
    "strided_layouts",
    "view_of",
]

T = TypeVar("T")

_NO_HOST_MEMORY = "DefaultCPUAllocator: "
"""What errors of PyTorch's allocator for host memory contain. They are RuntimeErrors, without a class of their own."""

_MAPPINGS = frozenset(MAPPINGS.values())
_INLINE = frozenset((str, int, float, bool, type(None)))
_NOTHING: list[Any] = []
"""The children of all nodes that have none. Never added to."""

LOOKED_INTO = _MAPPINGS | {"list", "tuple"}
"""Kinds of containers that live trees are compared in key by key; others are values, and replaced as a whole."""


class _LeftOut:
    """Placeholder for a child that was not chosen."""

    def __repr__(self) -> str:
        return "<left out>"


LEFT_OUT = _LeftOut()


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn an error about the nodes of a manifest into one that says that the manifest is wrong.

    Errors that no file causes stay: too little memory, a device that has failed, a kernel that PyTorch does not have.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        if isinstance(error, (CheckpointCorruptError, StagingError)):
            raise
        if isinstance(error, (torch.OutOfMemoryError, NotImplementedError)):
            raise
        if isinstance(error, torch.AcceleratorError):
            raise StagingError(
                f"a device has failed while a checkpoint was read: {error}", remedy="The checkpoint may be intact."
            ) from error
        if _NO_HOST_MEMORY in str(error):
            raise HostMemoryError(f"no memory for a tensor: {error}", path=path) from error
        raise CheckpointCorruptError(f"its nodes do not describe a tree: {said(error)}.", path=path) from error


class NodeTable:
    """The nodes of a tree.

    Attributes:
        forms: What describes each node, as JSON.
        children: What each contains: JSON scalars, and references to nodes. Of mappings, keys and values by turns.
        root: The tree, a child like others.
        kinds: The version of the kinds of objects that it may have, as the file says.
        reached: Whether each is part of the tree, once :meth:`tensor_names` has looked.
    """

    def __init__(self) -> None:
        self.forms: list[dict[str, Any]] = []
        self.children: list[list[Any]] = []
        self.root: Any = None
        self.kinds: Any = 0
        self.reached = bytearray()
        self._is_whole = False
        self._highest = -1
        # A table may have millions of nodes, and the cyclic collector visits every dict and list. Forms and references
        # that are alike are therefore one object.
        self._plain: dict[str, dict[str, Any]] = {}
        self._references: dict[int, list[int]] = {}

    def add(self, line: Any) -> None:
        """Add one line of a manifest, and check all of it that can be checked before the others are there.

        Raises:
            ValueError: If it is none. Other exceptions are possible too.
        """
        if type(line) is not dict or self._is_whole:
            raise ValueError(f"{shown(line)} is not a node, or comes after the root")
        if len(line) == 2 and line.get("is") == "tensor" and "name" in line:
            # Most lines are such: all elements of a tensor of a file.
            self.forms.append(line)
            self.children.append(_NOTHING)
            return
        if "root" in line:
            self.root, self.kinds = self._child(line["root"]), line.get("kinds", 0)
            self._is_whole = True
            return
        kind = line.pop("is")
        if type(kind) is not str:
            raise ValueError(f"{shown(kind)} is not a kind of a node")
        # "of" has the children, or, for an object of a class, says as a string what kind of class that is.
        of = line.pop("of") if type(line.get("of", "")) is not str else []
        found: list[Any] = list(map(self._child, _checked(of, list)))
        for key, value in _checked(line.pop("pairs", []), list):
            found += (self._child(key), self._child(value))
        for key, value in _checked(line.pop("items", {}), dict).items():
            found += (key, self._child(value))
        # A large container continues on further lines, so that no line is long.
        if kind == "more":
            if line:
                raise ValueError("a line that adds children has more than these")
            self._extend(found)
            return
        if "attributes" in line:
            attributes = _checked(line["attributes"], dict)
            line["attributes"] = {name: self._child(child) for name, child in attributes.items()}
        self.forms.append({"is": kind, **line} if line else self._plain.setdefault(kind, {"is": kind}))
        self.children.append(found or _NOTHING)

    def containers(self) -> list[list[Any] | dict[Any, Any]]:
        """Return the large containers of a table that is not needed any more, to be emptied."""
        return [self.forms, self._references, *large_lists(self.children), self.children]

    def _extend(self, found: list[Any]) -> None:
        if self.children[-1] is _NOTHING:
            self.children[-1] = []
        self.children[-1] += found

    def _child(self, child: Any) -> Any:
        """Check a child: a JSON scalar, or a list with the number of a node."""
        kind = type(child)
        if kind is list:
            (index,) = child
            if type(index) is not int or index < 0:
                raise ValueError(f"there is no node {shown(index)}")
            self._highest = max(self._highest, index)
            return self._references.setdefault(index, child)
        if kind is int and abs(child) > EXACT_INTEGERS:
            raise ValueError(f"{shown(child)} is larger than numbers in JSON are")
        if kind not in _INLINE:
            raise ValueError(f"{shown(child)} is not a child of a node")
        return child

    def complete(self) -> None:
        """Check what could not be checked before all lines were there.

        Raises:
            ValueError: If a node refers to nothing, or is a mapping with a key and no value; or if something that is
                to be hashed takes too long for it.
        """
        self._references.clear()
        if not self._is_whole:
            raise ValueError("there is no root")
        if self._highest >= len(self.forms):
            raise ValueError(f"there is no node {self._highest}")
        for index, (form, children) in enumerate(releasing_gil(zip(self.forms, self.children, strict=True))):
            if form["is"] in _MAPPINGS and len(children) % 2:
                raise ValueError(f"node {index} is no {shown(form['is'])}")
        check_hashed(self.forms, self.children)

    def node(self, child: Any) -> int | None:
        """Return the number of the node that a child refers to, or None if it is a scalar.

        Raises:
            ValueError: If it refers to nothing.
        """
        if type(child) is not list:
            return None
        (index,) = child
        if type(index) is not int or not 0 <= index < len(self.forms):
            raise ValueError(f"there is no node {shown(index)}")
        return index

    def wanted(self) -> Iterator[dict[str, Any]]:
        """Iterate over what describes the nodes that are reached."""
        return compress(self.forms, self.reached)

    def edges(self, index: int) -> Iterator[tuple[Any, Any]]:
        """Iterate over keys and children of a mapping, list or tuple."""
        children = self.children[index]
        if self.forms[index]["is"] in _MAPPINGS:
            return zip(children[::2], children[1::2], strict=True)
        return iter(enumerate(children))

    def tensor_names(self) -> dict[str, bool]:
        """Find the tensors of files that the tree needs.

        Returns:
            For each name whether all that refers to it are leaves of its elements in index order, without a gradient
            and reached through nothing but dicts, lists and tuples, so that the bytes of the file can go straight into
            a live tensor.
        """
        # 1 for nodes that are reached plainly, 2 for those also reached in another way, and all below them. A node is
        # visited again only if its number grows, so each at most twice, also on circles.
        reached = self.reached = bytearray(len(self.forms))
        pending: list[tuple[int, int]] = []
        root = self.node(self.root)
        if root is not None:
            pending.append((root, 1))
        found: dict[str, bool] = {}
        while pending:
            index, how = pending.pop()
            if reached[index] >= how:
                continue
            reached[index] = how
            form = self.forms[index]
            if form["is"] == "tensor":
                name = form["name"]
                # A gradient has to be on the device of its tensor: both have elements, or neither.
                plain = how == 1 and "offset" not in form and "grad" not in form
                found[name] = found.get(name, True) and plain
            if self.children[index] or "attributes" in form:
                self._add_children(pending, index, how)
            release_gil()
        return found

    def _add_children(self, pending: list[tuple[int, int]], index: int, how: int) -> None:
        form = self.forms[index]
        mapping, plain = form["is"] in _MAPPINGS, form["is"] in LOOKED_INTO
        for place, child in enumerate(releasing_gil(self.children[index])):
            node = self.node(child)
            if node is not None:
                # A key is replaced with its whole mapping, never in place.
                pending.append((node, how if plain and not (mapping and place % 2 == 0) else 2))
        for child in form.get("attributes", {}).values():
            node = self.node(child)
            if node is not None:
                pending.append((node, 2))


def path_step(key: object) -> object:
    """Return a key as part of a path; one that is a node, as tuples are, by its number."""
    return f"<node {key[0]}>" if isinstance(key, list) else key


def _checked(value: Any, cls: type[T]) -> T:
    if type(value) is not cls:
        raise ValueError(f"{shown(value)} is no {cls.__name__} of children")
    return value


_QUANTIZED = frozenset((torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4))


@dataclass(frozen=True, slots=True)
class View:
    """How a leaf looks at memory.

    Attributes:
        dtype: The dtype of its elements.
        shape: As usual.
        stride: As usual.
        offset: The offset of its first element, in elements.
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
        # PyTorch warns whenever a complex32 tensor is made. The code that saved this one has seen the warning.
        with without_warnings():
            return _over(data, self.dtype, self)

    def elements_in(self, data: torch.Tensor) -> torch.Tensor:
        """Return the same elements as a tensor of a dtype that torch can copy, to be filled in index order."""
        return _over(data, CARRIERS[self.dtype.itemsize], self)


def _over(data: torch.Tensor, dtype: torch.dtype, view: View) -> torch.Tensor:
    # set_() and not as_strided(): the leaf must not be a view of another tensor for autograd, nor share its version.
    empty = torch.empty(0, dtype=dtype, device=data.device)
    return empty.set_(data.untyped_storage(), view.offset, view.shape, view.stride)


def view_of(form: dict[str, Any], records: Mapping[str, TensorRecord]) -> View:
    """Return how a leaf looks at the memory of its file's tensor.

    Args:
        form: The form of the node.
        records: The tensors of files, by name.

    Raises:
        ValueError: If it does not fit the tensor. Other exceptions are possible too.
    """
    name = form["name"]
    record = records[name]
    dtype = torch_constant(form["dtype"]) if "dtype" in form else DTYPES[record.dtype]
    shape = checked_sizes(form["shape"]) if "shape" in form else record.shape
    stride = checked_sizes(form["stride"]) if "stride" in form else contiguous_strides(shape)
    # Without a scheme PyTorch makes a tensor that no operation can use.
    if dtype in _QUANTIZED:
        raise ValueError(f"{dtype} needs a quantization scheme")
    if len(stride) != len(shape):
        raise ValueError(f"there are {len(shape)} sizes and {len(stride)} strides")
    if "offset" not in form and elements_in(shape) * dtype.itemsize != record.stop - record.start:
        raise ValueError(f"the elements of {shown(name)} are not {dtype} {shown(shape)}")
    (offset,) = checked_sizes([form.get("offset", 0)])
    return View(dtype, shape, stride, offset)


def strided_layouts(
    table: NodeTable, records: Mapping[str, TensorRecord], positions: Mapping[str, int], *, path: str
) -> dict[str, View]:
    """Find the tensors that lie in files in index order, but did not in memory.

    Args:
        table: The table of the nodes, of which those that are reached count.
        records: The tensors of files, by name.
        positions: Where the data of each begins in its file.
        path: The path of the manifest, for errors.

    Returns:
        By name, how all leaves look at its memory.

    Raises:
        CheckpointCorruptError: If it cannot be laid out like that.
    """
    found: dict[str, View] = {}
    plain: set[str] = set()
    for form, how in releasing_gil(zip(table.forms, table.reached, strict=True)):
        if how and form["is"] == "tensor":
            if "stride" in form and "offset" not in form:
                with reading(path):
                    _add_layout(found, form, records, positions)
            else:
                plain.add(form["name"])
    with reading(path):
        if both := plain.intersection(found):
            raise ValueError(f"leaves have different views of {shown(both.pop())}")
    return found


def _add_layout(
    found: dict[str, View], form: dict[str, Any], records: Mapping[str, TensorRecord], positions: Mapping[str, int]
) -> None:
    name, view = form["name"], view_of(form, records)
    nbytes = records[name].stop - records[name].start
    # One layout for each, or a few nodes could ask for any amount of memory.
    if found.setdefault(name, view) != view:
        raise ValueError(f"leaves have different views of {shown(name)}")
    # A writer does not write such: strides of a hostile file could ask for any amount of memory, or have elements
    # overwrite one another.
    if view.nbytes > MAX_SPREAD * nbytes or (nbytes and not is_injective(view.shape, view.stride)):
        raise ValueError(f"{nbytes} bytes cannot be laid out as {shown(view)}")
    if positions[name] % view.dtype.itemsize:
        raise ValueError(f"the elements of {shown(name)} are cut by the parts of its file")


def sizes_of(
    names: Mapping[str, object], records: Mapping[str, TensorRecord], spread: Mapping[str, View]
) -> dict[str, int]:
    """Return how much memory tensors of files take, in bytes."""
    sizes: dict[str, int] = {}
    for name in releasing_gil(names):
        view = spread.get(name)
        sizes[name] = view.nbytes if view is not None else records[name].stop - records[name].start
    return sizes


def contents_of(data: Mapping[str, torch.Tensor], spread: Mapping[str, View]) -> dict[str, torch.Tensor]:
    """Return where the bytes of files' tensors go in their memory. Nothing goes to ``meta``."""
    contents: dict[str, torch.Tensor] = {}
    for name, memory in releasing_gil(data.items()):
        if not memory.is_meta:
            view = spread.get(name)
            contents[name] = view.elements_in(memory) if view is not None else memory
    return contents
