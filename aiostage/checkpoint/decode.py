"""From nodes to the tree."""

from __future__ import annotations

import math
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from aiostage.checkpoint.blocks import CARRIERS, MAX_SPREAD
from aiostage.checkpoint.composites import COMPOSITES, assemble
from aiostage.checkpoint.nodes import NodeTable, reading
from aiostage.checkpoint.values import FACTORIES, MAPPINGS, read_scalar, torch_constant
from aiostage.storage.safetensors import DTYPES, Record

__all__ = ["Memory", "TreeDecoder", "is_spread"]

_CHUNK = 64
_FACTORIES = {name: factory for factory, name in FACTORIES.items()}
_NEW: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dict": lambda form: {},
    "OrderedDict": lambda form: OrderedDict(),
    "Counter": lambda form: Counter(),
    "defaultdict": lambda form: defaultdict(_FACTORIES[form["factory"]]),
    "list": lambda form: [],
    "set": lambda form: set(),
    "deque": lambda form: deque(maxlen=form["maxlen"]),
}
"""Containers that are made empty and filled when everything else exists, so that they may contain themselves."""

_EXTEND: dict[str, Callable[[Any, Any], None]] = {"list": list.extend, "set": set.update, "deque": deque.extend}
_IMMUTABLE: dict[str, Callable[[Any], Any]] = {"tuple": tuple, "frozenset": frozenset}
_NOT_MADE = object()
_MAPPINGS = frozenset(MAPPINGS.values())
_QUANTIZED = frozenset((torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4))


class Memory:
    """The memory of the files' tensors.

    Args:
        records: What the files contain, by name.
        data: The bytes of each, as one-dimensional uint8 in host memory; or of its size on the meta device, for leaves
            that have everything except elements.
        path: Of the manifest, for errors.
    """

    def __init__(self, records: Mapping[str, Record], data: Mapping[str, torch.Tensor], *, path: str) -> None:
        self._path = path
        self._records = records
        self._data = data
        self._spread: dict[_View, torch.Tensor] = {}
        self._origins: dict[int, str] = {}

    def tensor(self, form: dict[str, Any]) -> torch.Tensor:
        """Return the leaf that a node describes, over the memory of its file's tensor.

        Raises:
            ValueError: If it does not fit the memory. Other exceptions are possible too.
        """
        view = self._view(form)
        if is_spread(form):
            return _over(self._spread[view], view, 0)
        (offset,) = _sizes([form.get("offset", 0)])
        return _over(self._data[view.name], view, offset)

    def origin(self, leaf: torch.Tensor) -> Record:
        """Return of which tensor of a file a leaf has the elements, in index order.

        Args:
            leaf: From :meth:`tensor`, on the meta device.
        """
        storage = leaf.untyped_storage()._cdata
        if not self._origins:
            for name, data in self._data.items():
                self._origins[data.untyped_storage()._cdata] = name
            for view, data in self._spread.items():
                self._origins[data.untyped_storage()._cdata] = view.name
        return self._records[self._origins[storage]]

    def spread(self, form: dict[str, Any]) -> None:
        """Lay the elements of a leaf out as its strides want them, before it is asked for. Blocks.

        Raises:
            CheckpointCorruptError: If the node does not fit the memory.
        """
        with reading(self._path):
            view = self._view(form)
            if view not in self._spread:
                self._spread[view] = _spread(self._data[view.name], view)

    def _view(self, form: dict[str, Any]) -> _View:
        name = form["name"]
        record = self._records[name]
        dtype = torch_constant(form["dtype"]) if "dtype" in form else DTYPES[record.dtype]
        shape = _sizes(form["shape"]) if "shape" in form else record.shape
        stride = _sizes(form["stride"]) if "stride" in form else _contiguous(shape)
        if dtype in _QUANTIZED:
            raise ValueError(f"{dtype} needs a quantization scheme")
        if len(stride) != len(shape):
            raise ValueError(f"there are {len(shape)} sizes and {len(stride)} strides")
        if "offset" not in form and math.prod(shape) * dtype.itemsize != record.stop - record.start:
            raise ValueError(f"the elements of {name!r} are not {dtype} {list(shape)}")
        return _View(name, dtype, shape, stride)


def is_spread(node: Any) -> bool:
    """Return whether a node's tensor is in its file in index order, but was not in memory."""
    return isinstance(node, dict) and node.get("is") == "tensor" and "stride" in node and "offset" not in node


@dataclass(frozen=True, slots=True)
class _View:
    """How a leaf looks at the memory of a file's tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def extent(self) -> int:
        """How many elements of memory lie between the first and one past the last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))


def _over(data: torch.Tensor, view: _View, offset: int) -> torch.Tensor:
    """Return a tensor that looks at memory, after checking that it stays inside."""
    if offset + view.extent > data.numel() // view.dtype.itemsize:
        raise ValueError(f"{view} from {offset} on exceeds {data.numel()} bytes")
    storage, device = data.untyped_storage(), data.device
    if view.dtype is not torch.complex32:
        return torch.empty(0, dtype=view.dtype, device=device).set_(storage, offset, view.shape, view.stride)
    with warnings.catch_warnings():
        # They are called experimental whenever one is made; whoever saved it has been told.
        warnings.simplefilter("ignore", UserWarning)
        return torch.empty(0, dtype=view.dtype, device=device).set_(storage, offset, view.shape, view.stride)


def _spread(elements: torch.Tensor, view: _View) -> torch.Tensor:
    """Return new memory in which a view finds the elements that lie in index order in other memory."""
    extent, count = view.extent, elements.numel() // view.dtype.itemsize
    if extent > MAX_SPREAD * count:
        raise ValueError(f"strides {view.stride} spread {count} elements too far")
    if elements.is_meta:
        return torch.empty(extent * view.dtype.itemsize, dtype=torch.uint8, device=elements.device)
    memory = torch.zeros(extent * view.dtype.itemsize, dtype=torch.uint8)
    if extent:
        carrier = CARRIERS[view.dtype.itemsize]
        strided = torch.empty(0, dtype=carrier).set_(memory.untyped_storage(), 0, view.shape, view.stride)
        strided.copy_(elements.view(carrier).view(view.shape))
    return memory


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def _sizes(values: Any) -> tuple[int, ...]:
    """Check that a list holds sizes."""
    if not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
        raise ValueError(f"{values!r} are no sizes")
    return tuple(values)


class TreeDecoder:
    """Builds the tree that a table of nodes describes.

    Args:
        table: Of the nodes, of which those that are reached are wanted.
        memory: Of the tensors.
        path: Of the manifest, for errors.
    """

    def __init__(self, table: NodeTable, memory: Memory, *, path: str) -> None:
        self._table = table
        self._memory = memory
        self._path = path
        self._made: list[Any] = []

    def build(self) -> Generator[None, None, Any]:
        """Build the tree, yielding now and then.

        Returns:
            The tree.

        Raises:
            CheckpointCorruptError: If the nodes do not describe one.
        """
        with reading(self._path):
            return (yield from self._build())

    def _build(self) -> Generator[None, None, Any]:
        table = self._table
        # What may contain itself exists first, then everything that is made whole, then the former is filled.
        for form in table.forms:
            kind = form["is"]
            self._made.append(_NEW[kind](form) if kind in _NEW else _NOT_MADE)
        wanted = [index for index, how in enumerate(table.reached) if how]
        for count, index in enumerate(wanted):
            if self._made[index] is _NOT_MADE:
                self._made[index] = self._make(table.forms[index], table.children[index])
            if count % _CHUNK == 0:
                yield
        for index in wanted:
            made, form = self._made[index], table.forms[index]
            if form["is"] in _NEW:
                yield from self._fill(made, form, table.children[index])
            if "attributes" in form:
                vars(made).update({name: self._child(child) for name, child in form["attributes"].items()})
            yield
        return self._child(table.root)

    def _make(self, form: dict[str, Any], children: list[Any]) -> Any:
        """Make an object that cannot be changed later, or has nothing in it that could refer to it."""
        kind = form["is"]
        if kind in _IMMUTABLE:
            return _IMMUTABLE[kind](map(self._child, children))
        if kind == "tensor" or kind in COMPOSITES:
            return self._tensor(form, list(map(self._child, children)))
        if kind == "ndarray":
            (tensor,) = map(self._child, children)
            return tensor.numpy()
        return read_scalar(kind, form["value"])

    def _tensor(self, form: dict[str, Any], parts: list[Any]) -> torch.Tensor:
        gradient = parts.pop() if form.get("grad") else None
        tensor = self._memory.tensor(form) if form["is"] == "tensor" else assemble(form["is"], parts, form)
        requires_grad = form.get("requires_grad")
        if form.get("class") == "Parameter":
            return torch.nn.Parameter(tensor, requires_grad is not False)
        if requires_grad is True:
            tensor.requires_grad_()
            tensor.grad = gradient
        return tensor

    def _fill(self, made: Any, form: dict[str, Any], children: list[Any]) -> Generator[None, None, None]:
        if form["is"] in _MAPPINGS:
            for index in range(0, len(children), 2):
                # Not through Counter.update, which adds.
                made[self._child(children[index])] = self._child(children[index + 1])
                if index % _CHUNK == 0:
                    yield
        else:
            for start in range(0, len(children), _CHUNK):
                _EXTEND[form["is"]](made, map(self._child, children[start : start + _CHUNK]))
                yield

    def _child(self, child: Any) -> Any:
        index = self._table.node(child)
        if index is None:
            return child
        made = self._made[index]
        if made is _NOT_MADE:
            raise ValueError(f"a node refers to node {index}, which does not come before it")
        return made
