"""From nodes to the tree.

Everything is built over memory that was allocated before. A node makes an object of a class only if the reader has
named that class; everything else in a manifest becomes plain data.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

import torch

from aiostage._loop.workers import release_gil, releasing_gil
from aiostage._private import storage_identity
from aiostage.errors import CheckpointCorruptError, shown
from aiostage.format.classes import Classes
from aiostage.format.composites import COMPOSITES, SPARSE, assemble, check_invariants
from aiostage.format.nodes import NodeTable, reading, view_of
from aiostage.format.objects import (
    KINDS_VERSION,
    MADE_FIRST,
    MADE_WHOLE,
    OBJECT_KINDS,
    attach,
    make_first,
    rebuild_object,
)
from aiostage.format.safetensors import DTYPES, TensorRecord, contiguous_strides
from aiostage.format.values import FACTORIES, MAPPINGS, SCALAR_KINDS, Collisions, read_bytes, read_scalar

__all__ = ["Memory", "TreeDecoder", "check_sparse", "parts_of_sparse"]

_ELEMENTS_AT_ONCE = 64
"""Elements that are added to a container in one step with the GIL."""

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
_NOT_MADE = object()
_MAPPINGS = frozenset(MAPPINGS.values())
_BYTES = ("bytes", "bytearray")
_PLAIN_FORM = len(("is", "name"))
"""Items of the form of a tensor that is all of its file's tensor."""


class Memory:
    """The memory of the files' tensors.

    Args:
        records: What the files contain, by name.
        data: Memory for each as its leaves look at it, one-dimensional uint8 on any device. Leaves over memory on the
            meta device have everything except elements.
    """

    def __init__(self, records: Mapping[str, TensorRecord], data: Mapping[str, torch.Tensor]) -> None:
        self._records = records
        self._data = data
        self._origins: dict[int, str] = {}
        # Many tensors have dtype and shape in common: by both, the dtype of torch and the strides.
        self._layouts: dict[tuple[str, tuple[int, ...]], tuple[torch.dtype, tuple[int, ...]]] = {}

    def tensor(self, form: dict[str, Any]) -> torch.Tensor:
        """Return the leaf that a node describes, over the memory of its file's tensor.

        Raises:
            ValueError: If it does not fit the memory. Other exceptions are possible too.
        """
        name = form["name"]
        (_, dtype_name, shape, start, stop), data = self._records[name], self._data[name]
        if len(form) > _PLAIN_FORM or data.numel() != stop - start:
            return view_of(form, self._records).over(data)
        # Most leaves are all of a tensor of a file. Reading the header has checked that its shape fits its size.
        layout = self._layouts.get((dtype_name, shape))
        if layout is None:
            layout = self._layouts[dtype_name, shape] = DTYPES[dtype_name], contiguous_strides(shape)
        dtype, strides = layout
        return torch.empty(0, dtype=dtype, device=data.device).set_(data.untyped_storage(), 0, shape, strides)

    def origin(self, leaf: torch.Tensor) -> TensorRecord:
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
        table: The table of the nodes, of which those that are reached are wanted.
        memory: The memory of the tensors.
        path: The path of the manifest, for errors.
        classes: Whose objects are made again. None: none but those of the standard library, NumPy and PyTorch.
    """

    def __init__(self, table: NodeTable, memory: Memory, *, path: str, classes: Classes | None = None) -> None:
        self._table = table
        self._memory = memory
        self._path = path
        self._classes = classes if classes is not None else Classes()
        self._made: list[Any] = []
        # Nodes that are filled in the third pass, and those that contain them: their contents may not be there yet.
        self._incomplete: set[int] = set()

    def build(self) -> Any:
        """Build the tree.

        Returns:
            The tree.

        Raises:
            CheckpointCorruptError: If the nodes do not describe one.
        """
        with reading(self._path):
            return self._build()

    def _build(self) -> Any:
        table = self._table
        # Three passes, since nodes may contain themselves. First, objects that can exist without what they contain are
        # made. Second, every other node is made, in the order of the file, where children come before what contains
        # them; nodes whose children are all there are filled at once. Third, the nodes on circles are filled.
        # Nodes that are not reached were left out by only=, and must not fail.
        for form, how in releasing_gil(zip(table.forms, table.reached, strict=True)):
            kind, made = form["is"], _NOT_MADE
            if how and kind in MADE_FIRST:
                made = make_first(form, self._classes)
            elif how and kind in _NEW:
                made = _NEW[kind](form)
            self._made.append(made)
        left: list[int] = []
        for index, how in enumerate(releasing_gil(table.reached)):
            if not how:
                continue
            form = table.forms[index]
            if len(form) == _PLAIN_FORM and form["is"] == "tensor" and not table.children[index]:
                self._made[index] = self._memory.tensor(form)
                continue
            if self._made[index] is _NOT_MADE:
                self._made[index] = self._make(index)
            if self._comes_last(index):
                self._fill(index)
            else:
                left.append(index)
                self._incomplete.add(index)
        for index in releasing_gil(left):
            self._fill(index)
        return self._child(table.root)

    def _comes_last(self, index: int) -> bool:
        """Return whether all that a node contains comes before it."""
        table, form = self._table, self._table.forms[index]
        children = table.children[index]
        if "attributes" in form:
            children = [*children, *form["attributes"].values()]
        for child in releasing_gil(children):
            if type(child) is list:
                if child[0] >= index:
                    return False
                if self._incomplete and child[0] in self._incomplete:
                    self._incomplete.add(index)
        return True

    def _make(self, index: int) -> Any:
        """Make an object that cannot be changed later, or has nothing in it that could refer to it."""
        form, children = self._table.forms[index], self._table.children[index]
        kind = form["is"]
        if kind == "frozenset":
            return frozenset(Collisions().add(map(self._child, children)))
        if kind == "tuple":
            return tuple(map(self._child, children))
        if kind == "tensor" or kind in COMPOSITES:
            return self._tensor(form, list(map(self._child, children)))
        if kind == "ndarray":
            # Over the memory of the tensor: an array and a tensor that shared memory share it again.
            (tensor,) = map(self._child, children)
            return tensor.numpy()
        if kind in _BYTES:
            return read_bytes(kind, form["value"])
        if kind in OBJECT_KINDS:
            # A function of a registered class must not see a container that is still empty. The writer refuses such
            # trees, so only a damaged file has one.
            if kind in MADE_WHOLE and any(type(child) is list and child[0] in self._incomplete for child in children):
                raise ValueError(f"node {index} needs what is made after it")
            return self._object(form, list(map(self._child, children)))
        if kind not in SCALAR_KINDS:
            raise CheckpointCorruptError(
                f"it has an object of kind {shown(kind)}, of version {shown(self._table.kinds)} of all kinds, and only "
                f"those up to version {KINDS_VERSION} are known.",
                path=self._path,
                remedy="Read it with a newer aiostage, or leave that object out with only=.",
            )
        return read_scalar(kind, form["value"])

    def _object(self, form: dict[str, Any], parts: list[Any]) -> Any:
        gradient = parts.pop() if form.get("grad") else None
        made = rebuild_object(form, parts, self._classes)
        if isinstance(made, torch.Tensor):
            made = _with_autograd(made, form, gradient)
        return made

    def _tensor(self, form: dict[str, Any], parts: list[Any]) -> torch.Tensor:
        gradient = parts.pop() if form.get("grad") else None
        tensor = self._memory.tensor(form) if form["is"] == "tensor" else assemble(form["is"], parts, form)
        return _with_autograd(tensor, form, gradient)

    def _fill(self, index: int) -> None:
        """Put into an object what it contains besides what it was made of."""
        made, form, children = self._made[index], self._table.forms[index], self._table.children[index]
        kind = form["is"]
        if kind in _MAPPINGS:
            collisions = Collisions()
            for place in releasing_gil(range(0, len(children), 2)):
                key = children[place]
                if type(key) is not str:
                    (key,) = collisions.add((self._child(key),))
                # Not by update(): that of a Counter adds.
                made[key] = self._child(children[place + 1])
        elif kind in _EXTEND:
            elements = Collisions() if kind == "set" else None
            for start in range(0, len(children), _ELEMENTS_AT_ONCE):
                found = map(self._child, children[start : start + _ELEMENTS_AT_ONCE])
                _EXTEND[kind](made, elements.add(found) if elements is not None else found)
                release_gil()
        if "attributes" in form:
            attributes = {name: self._child(child) for name, child in form["attributes"].items()}
            if kind in OBJECT_KINDS:
                attach(made, form, attributes)
            else:
                vars(made).update(attributes)

    def _child(self, child: Any) -> Any:
        if type(child) is not list:
            return child
        # The table has checked that there is such a node.
        made = self._made[child[0]]
        if made is _NOT_MADE:
            raise ValueError(f"a node refers to node {child[0]}, which does not come before it")
        return made


def _with_autograd(tensor: torch.Tensor, form: dict[str, Any], gradient: Any) -> torch.Tensor:
    """Return a tensor as a parameter, or requiring a gradient, as its node says."""
    requires_grad = form.get("requires_grad")
    if form.get("class") == "Parameter":
        if isinstance(tensor, torch.nn.Parameter):
            # Not by requires_grad_(), which lazy parameters refuse.
            tensor.requires_grad = requires_grad is not False
            return tensor
        return torch.nn.Parameter(tensor, requires_grad is not False)
    if requires_grad is True:
        tensor.requires_grad = True
        tensor.grad = gradient
    return tensor


def parts_of_sparse(table: NodeTable, path: str) -> set[str]:
    """Return the names of the tensors of files that sparse tensors of the tree consist of.

    Args:
        table: The table of the nodes, looked through before.
        path: The path of the manifest, for errors.

    Raises:
        CheckpointCorruptError: If a sparse tensor consists of something else.
    """
    names: set[str] = set()
    with reading(path):
        for index in _sparse(table):
            names.update(table.forms[part]["name"] for part in _parts(table, index))
    return names


def check_sparse(
    table: NodeTable, records: Mapping[str, TensorRecord], data: Mapping[str, torch.Tensor], path: str
) -> None:
    """Check that indices lie within the shapes, and what else PyTorch demands of sparse tensors. Blocks.

    Args:
        table: The table of the nodes, looked through before.
        records: The tensors of files, by name.
        data: Host memory with the bytes of those that :func:`parts_of_sparse` returns.
        path: The path of the manifest, for errors.

    Raises:
        CheckpointCorruptError: If one does not hold what PyTorch demands.
    """
    memory = Memory(records, data)
    with reading(path):
        for index in _sparse(table):
            form = table.forms[index]
            parts = [memory.tensor(table.forms[part]) for part in _parts(table, index)]
            check_invariants(form["is"], parts, form)


def _sparse(table: NodeTable) -> list[int]:
    reached = zip(table.forms, table.reached, strict=True)
    return [index for index, (form, how) in enumerate(reached) if how and form["is"] in SPARSE]


def _parts(table: NodeTable, index: int) -> list[int]:
    """Return the nodes that a sparse tensor consists of, without its gradient."""
    parts: list[int] = []
    count = SPARSE[table.forms[index]["is"]]
    for child in table.children[index][:count]:
        node = table.node(child)
        if node is None or table.forms[node]["is"] != "tensor":
            raise ValueError(f"node {index} consists of something that is not a tensor")
        parts.append(node)
    if len(parts) != count:
        raise ValueError(f"node {index} consists of {len(parts)} tensors instead of {count}")
    return parts
