"""From nodes to the tree."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch

from aiostage._private import storage_identity
from aiostage.checkpoint.composites import COMPOSITES, assemble
from aiostage.checkpoint.nodes import NodeTable, reading
from aiostage.checkpoint.values import FACTORIES, MAPPINGS, read_bytes, read_scalar
from aiostage.checkpoint.views import view_of
from aiostage.storage.safetensors import Record

__all__ = ["Memory", "TreeDecoder"]

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
_BYTES = ("bytes", "bytearray")


class Memory:
    """The memory of the files' tensors.

    Args:
        records: What the files contain, by name.
        data: Memory for each as its leaves look at it, one-dimensional uint8 on any device. Leaves over memory on the
            meta device have everything except elements.
    """

    def __init__(self, records: Mapping[str, Record], data: Mapping[str, torch.Tensor]) -> None:
        self._records = records
        self._data = data
        self._origins: dict[int, str] = {}

    def tensor(self, form: dict[str, Any]) -> torch.Tensor:
        """Return the leaf that a node describes, over the memory of its file's tensor.

        Raises:
            ValueError: If it does not fit the memory. Other exceptions are possible too.
        """
        return view_of(form, self._records).over(self._data[form["name"]])

    def origin(self, leaf: torch.Tensor) -> Record:
        """Return of which tensor of a file a leaf has the elements, in index order.

        Args:
            leaf: From :meth:`tensor`, on the meta device.
        """
        if not self._origins:
            self._origins = {storage_identity(data.untyped_storage()): name for name, data in self._data.items()}
        return self._records[self._origins[storage_identity(leaf.untyped_storage())]]


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
                self._made[index] = yield from self._make(table.forms[index], table.children[index])
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

    def _make(self, form: dict[str, Any], children: list[Any]) -> Generator[None, None, Any]:
        """Make an object that cannot be changed later, or has nothing in it that could refer to it."""
        kind = form["is"]
        if kind in _IMMUTABLE:
            return _IMMUTABLE[kind](map(self._child, children))
        if kind == "tensor" or kind in COMPOSITES:
            return self._tensor(form, list(map(self._child, children)))
        if kind == "ndarray":
            (tensor,) = map(self._child, children)
            return tensor.numpy()
        if kind in _BYTES:
            return (yield from read_bytes(kind, form["value"]))
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
