"""From a tree to nodes: a flat table in which a container refers to what it contains by number."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from gc import get_referents
from itertools import islice
from json.encoder import encode_basestring_ascii
from operator import attrgetter
from types import MappingProxyType
from typing import Any
from weakref import ref

import numpy as np
import torch

from aiostage import _private
from aiostage._loop.workers import large_lists, release_gil, releasing_gil
from aiostage.errors import UnsupportedLeafError, shown
from aiostage.format.composites import take_apart
from aiostage.format.kinds import NotCarried
from aiostage.format.objects import KINDS_VERSION, MADE_WHOLE, is_flattened, take_object_apart
from aiostage.format.values import (
    ARRAY_DTYPES,
    FACTORIES,
    MAPPINGS,
    MAX_HASHED_DEPTH,
    MAX_HASHED_SIZE,
    SCALARS,
    SEQUENCES,
    Collisions,
    TooLongToHashError,
    check_hashed,
    is_inline,
    write_scalar,
)
from aiostage.leaf import Attribute, Path, format_path

__all__ = ["TreeEncoder", "TreeNode", "ValuesNeeded", "path_of"]

_CHILDREN_PER_LINE = 256
"""Pairs of a mapping in one line of the manifest, or twice as many children of another container. A guess: lines are
parsed in one step each, and are to stay short."""


_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))

_SETS = frozenset(("set", "frozenset"))

_ARRAYS = frozenset((np.ndarray, np.memmap))

_NAME_ONLY = {"name"}

_NOTHING: Mapping[str, Any] = MappingProxyType({})

_KEPT_IN_A_LIST = "Keep it in a list, or as a value."

# json.dumps would make an encoder for each line.
_dump = json.JSONEncoder(separators=(",", ":")).encode


class ValuesNeeded(Exception):
    """A function of a registered class has to look at tensors that may not have their values yet."""


class TreeNode:
    """One object of the tree that is not spelled out inside its container.

    Attributes:
        value: The object.
        key: Where in the parent.
        kind: Its name in the manifest.
        children: What it contains: JSON scalars, and nodes. Of mappings, keys and values by turns.
        form: What else describes it, as JSON.
        attributes: By name, what its ``__dict__`` holds.
        position: Its number, given when all of its children have theirs, except those that contain it.
        entered: Whether its children are known.
        whole: Whether all that is in it has to be complete before it can be made.
        depth: How many nodes on the way to it are open, which are entered and have no number.
    """

    __slots__ = (
        "__weakref__",
        "_parent",
        "attributes",
        "children",
        "depth",
        "entered",
        "form",
        "key",
        "kind",
        "position",
        "value",
        "whole",
    )

    def __init__(self, value: Any, parent: TreeNode | None, key: object) -> None:
        self.value = value
        # Weak: with a reference to the parent, every node would be on a circle, and keep staged memory until the cyclic
        # collector runs.
        self._parent = ref(parent) if parent is not None else None
        self.key = key
        self.kind = ""
        # Shared empty ones, because most nodes are tensors and have none. Three containers for each node were three of
        # the seven objects that a tensor costs, and half of the time of a plan went into the cyclic collector.
        self.children: Sequence[Any] = ()
        self.form: Mapping[str, Any] = _NOTHING
        self.attributes: Mapping[str, Any] = _NOTHING
        self.position: int | None = None
        self.entered = False
        self.whole = False
        self.depth = 0

    @property
    def parent(self) -> TreeNode | None:
        """The node in which it was first met, None for the root. Lives as long as the encoder."""
        return self._parent() if self._parent is not None else None


def path_of(node: TreeNode) -> Path:
    """Return the path that leads to a node."""
    steps = []
    at: TreeNode | None = node
    while at is not None and (parent := at.parent) is not None:
        steps.append(at.key)
        at = parent
    return tuple(reversed(steps))


_children = attrgetter("children")


class TreeEncoder:
    """Encodes one tree, however deep it is. Shared references and cycles are kept.

    Attributes:
        tensors: The nodes of tensors that are one piece of memory, in the order of the tree. Their ``form`` is left
            to the code that knows where the memory goes.
        uses_kinds: Whether there are objects that readers of the first version do not know.
        other_places: Where tensors were met again, as nodes that nothing refers to; None if it is not to be noted.

    Args:
        values_are_there: Whether tensors have their values, which functions of registered classes may look at.
        notes_places: Whether to note where tensors are met again.
    """

    def __init__(self, *, values_are_there: bool = True, notes_places: bool = False) -> None:
        self.tensors: list[TreeNode] = []
        self.other_places: list[TreeNode] | None = [] if notes_places else None
        self.uses_kinds = False
        self._hashes_nodes = False
        self._values_are_there = values_are_there
        self._open = 0
        # Depths of open nodes that have to be made as a whole. If a child leads back to an open node at that depth or
        # above, the object would have to exist before it can be made.
        self._whole: list[int] = []
        self._root: Any = None
        self._ended: list[TreeNode] = []
        self._known: dict[int, TreeNode] = {}
        self._stack: list[TreeNode] = []

    def containers(self) -> list[list[Any] | dict[Any, Any]]:
        """Return the large containers of an encoder that is not needed any more, to be emptied from the last on."""
        return [self._known, *large_lists(map(_children, self._ended)), self._ended, self.tensors]

    def walk(self, tree: Any) -> None:
        """Find every node.

        Raises:
            UnsupportedLeafError: If something cannot be carried by JSON and safetensors, with its path.
            ValuesNeeded: If the values of tensors have to be there, and are not.
        """
        found: list[TreeNode] = []
        self._root = self._child(tree, None, None, found)
        self._stack += found
        # Depth first with a stack of its own, since trees may be deeper than Python's stack. A node stays on it until
        # its children have their numbers, so that children come before what contains them.
        while self._stack:
            node = self._stack[-1]
            if node.entered:
                self._stack.pop()
                # A node that was found in several places before it was entered is on the stack more than once.
                if node.position is None:
                    self._open -= 1
                    if node.whole:
                        self._whole.pop()
                    self._end(node)
                continue
            node.entered = True
            self._open += 1
            node.depth = self._open
            self._enter(node)
            release_gil()
        if self._hashes_nodes:
            self._check_hashed()

    def _check_hashed(self) -> None:
        """Refuse elements of sets and keys that a load would refuse to hash."""
        forms: list[dict[str, Any]] = []
        children: list[list[Any]] = []
        for node in releasing_gil(self._ended):
            attributes = {name: _reference(child) for name, child in node.attributes.items()}
            forms.append({"is": node.kind, "attributes": attributes})
            children.append(list(map(_reference, node.children)))
        try:
            check_hashed(forms, children)
        except TooLongToHashError as error:
            what = "an element" if self._ended[error.container].kind in _SETS else "a key"
            raise _unsupported(
                self._ended[error.container],
                f"it has {what} that no load would hash: more than {MAX_HASHED_DEPTH} levels deep, or of more than "
                f"{MAX_HASHED_SIZE} objects, or too large together with the others.",
                _KEPT_IN_A_LIST,
            ) from None

    def _end(self, node: TreeNode) -> None:
        """Give a node its number."""
        node.position = len(self._ended)
        self._ended.append(node)

    def lines(self) -> Iterator[str]:
        """Iterate over the lines of the manifest, children before what contains them, the root last."""
        for node in self._ended:
            yield from _lines(node)
        yield _dump({"root": _reference(self._root)} | ({"kinds": KINDS_VERSION} if self.uses_kinds else {}))

    def _child(self, value: Any, parent: TreeNode | None, key: object, found: list[TreeNode]) -> Any:
        """Return a value as a child: as it is, or as its node, which is added to those found if it is new."""
        if is_inline(value):
            return value
        node = self._known.get(id(value))
        if node is None:
            # The node keeps the value alive, and so its id from being given away.
            node = self._known[id(value)] = TreeNode(value, parent, key)
            # Most nodes are plain tensors. One that would be entered next anyhow is entered here, without the stack; if
            # others were found before it, it waits, because nodes are numbered in the order of the tree.
            if not found and type(value) in _TENSORS and _is_plain(value):
                node.entered = True
                self._enter_tensor(node, found)
                self._end(node)
        elif self.other_places is not None and isinstance(value, torch.Tensor):
            self.other_places.append(TreeNode(value, parent, key))
        if not node.entered:
            found.append(node)
        elif self._whole and node.position is None and node.depth <= self._whole[-1]:
            raise _unsupported(
                node,
                "it contains itself by way of an object that has to be made as a whole.",
                "Leave that reference out in the flatten function of the registered class.",
            )
        return node

    def _enter(self, node: TreeNode) -> None:
        """Find out what a node is and what it contains."""
        value, cls, found = node.value, type(node.value), list[TreeNode]()
        if cls in _TENSORS:
            self._enter_tensor(node, found)
        elif cls in MAPPINGS:
            self._enter_mapping(node, found)
        elif cls in SEQUENCES:
            self._enter_sequence(node, found)
        elif cls in SCALARS:
            node.kind, spelled = write_scalar(value)
            node.form = {"value": spelled}
        elif cls in _ARRAYS and value.dtype in ARRAY_DTYPES:
            self._enter_array(node, found)
        else:
            self._enter_object(node, found)
            self._stack += reversed(found)
            return
        # A memmap has attributes about its file, and comes back as an array. To ask a tensor for its __dict__ makes
        # one, so tensors are first asked whether they have one.
        if cls is not np.memmap and not (cls in _TENSORS and not _private.have_attributes((value,))):
            self._add_attributes(node, getattr(value, "__dict__", {}), found)
        self._stack += reversed(found)

    def _add_attributes(self, node: TreeNode, attributes: Mapping[str, Any], found: list[TreeNode]) -> None:
        if not attributes:
            return
        children = node.attributes = {}
        for name, attribute in attributes.items():
            if type(name) is not str:
                raise _unsupported(node, f"it has an attribute that is named {name!r:.80}, not by a string.", None)
            children[name] = self._child(attribute, node, Attribute(name), found)

    def _enter_object(self, node: TreeNode, found: list[TreeNode]) -> None:
        """Take an object apart that is neither a tensor nor a plain container nor a scalar."""
        value = node.value
        try:
            if not self._values_are_there and is_flattened(value):
                raise ValuesNeeded
            node.kind, parts = take_object_apart(value)
        except NotCarried as error:
            raise _unsupported(node, f"{error.reason}.", error.hint) from None
        node.form = parts.form
        # Before the children are looked at: one of them may lead back to this node, which is refused.
        if node.kind in MADE_WHOLE:
            node.whole = True
            self._whole.append(node.depth)
        self.uses_kinds = True
        node.children = [self._child(part, node, Attribute(name), found) for name, part in parts.children.items()]
        self._add_attributes(node, parts.attributes, found)
        if isinstance(value, torch.Tensor):
            self._note_autograd(node, value, isinstance(value, torch.nn.Parameter), found)

    def _enter_mapping(self, node: TreeNode, found: list[TreeNode]) -> None:
        node.kind = MAPPINGS[type(node.value)]
        if type(node.value) is defaultdict:
            factory = node.value.default_factory
            try:
                node.form = {"factory": FACTORIES[factory]}
            except (KeyError, TypeError):
                raise _unsupported(
                    node,
                    f"a defaultdict whose default_factory is {shown(factory)} cannot be carried by JSON.",
                    "Convert it to a dict.",
                ) from None
        children = node.children = []
        collisions = Collisions()
        for key, value in releasing_gil(node.value.items()):
            if type(key) is not str:
                self._note_hashed(node, (key,), collisions)
            children.append(self._child(key, node, key, found))
            children.append(self._child(value, node, key, found))

    def _enter_sequence(self, node: TreeNode, found: list[TreeNode]) -> None:
        node.kind = SEQUENCES[type(node.value)]
        if type(node.value) is deque:
            node.form = {"maxlen": node.value.maxlen}
        children = node.children = []
        collisions = Collisions() if node.kind in _SETS else None
        for index, value in enumerate(releasing_gil(node.value)):
            if collisions is not None:
                self._note_hashed(node, (value,), collisions)
            children.append(self._child(value, node, index, found))

    def _note_hashed(self, node: TreeNode, keys: tuple[Any], collisions: Collisions) -> None:
        """Note a key or an element that a load will hash."""
        try:
            (key,) = collisions.add(keys)
        except TooLongToHashError as error:
            raise _unsupported(node, f"{error}, so that no load would take it.", _KEPT_IN_A_LIST) from None
        if not is_inline(key):
            self._hashes_nodes = True

    def _enter_array(self, node: TreeNode, found: list[TreeNode]) -> None:
        array: np.ndarray[Any, Any] = np.asarray(node.value)
        node.kind = "ndarray"
        if not array.flags.writeable or any(stride < 0 or stride % array.itemsize for stride in array.strides):
            # torch.from_numpy refuses negative strides, and strides that are no multiple of an element; of memory that
            # is not writable it warns. A copy is cheap, because arrays in state dicts are small.
            array = array.copy()
        node.children = [self._child(torch.from_numpy(array), node, Attribute("array"), found)]

    def _enter_tensor(self, node: TreeNode, found: list[TreeNode]) -> None:
        tensor: torch.Tensor = node.value
        if not tensor.is_cpu:
            raise _unsupported(node, f"it is on {tensor.device}, not in host memory.", "Stage it first.")
        try:
            taken = take_apart(tensor) if tensor.layout is not torch.strided or tensor.is_quantized else None
        except ValueError as error:
            raise _unsupported(node, f"{error}.", None) from None
        if taken is None:
            node.kind = "tensor"
            self.tensors.append(node)
        else:
            node.kind, parts, node.form = taken
            node.children = [self._child(part, node, Attribute(name), found) for name, part in parts.items()]
        parameter = type(tensor) is torch.nn.Parameter
        # Asked here and not in the function, because most tensors are neither, and a call for each costs.
        if parameter or tensor.requires_grad:
            self._note_autograd(node, tensor, parameter, found)

    def _note_autograd(self, node: TreeNode, tensor: torch.Tensor, parameter: bool, found: list[TreeNode]) -> None:
        """Say whether a tensor is a parameter and requires a gradient, and which it has."""
        requires_grad = tensor.requires_grad and tensor.is_leaf
        form: dict[str, Any] = {}
        if parameter:
            form["class"] = "Parameter"
        if requires_grad is not parameter:
            form["requires_grad"] = requires_grad
        # As copy.deepcopy does: a Parameter is copied without its gradient, any other tensor with it.
        if requires_grad and not parameter and tensor.grad is not None:
            form["grad"] = True
            node.children = [*node.children, self._child(tensor.grad, node, Attribute("grad"), found)]
        if form:
            node.form = {**node.form, **form}


def _is_plain(tensor: torch.Tensor) -> bool:
    """Return whether a tensor surely contains nothing but its elements."""
    return (
        tensor.layout is torch.strided
        and not tensor.is_quantized
        # A tensor that refers to one object, its class, has no __dict__ yet. It is asked for only otherwise, because
        # asking makes one.
        and (len(get_referents(tensor)) == 1 or not tensor.__dict__)
        and (not tensor.requires_grad or type(tensor) is torch.nn.Parameter)
    )


def _unsupported(node: TreeNode, reason: str, remedy: str | None) -> UnsupportedLeafError:
    return UnsupportedLeafError(reason, path=format_path(path_of(node)), remedy=remedy)


def _reference(child: Any) -> Any:
    """Return a child as JSON: a node is its number in a list, so that it differs from every scalar."""
    return [child.position] if child.__class__ is TreeNode else child


def _lines(node: TreeNode) -> Iterator[str]:
    """Iterate over the lines of one node; what does not fit the first is in lines that add to it."""
    if node.kind == "tensor" and node.form.keys() == _NAME_ONLY and not node.children and not node.attributes:
        # Most nodes are such, and this is faster than the json module. lines.py reads exactly this spelling as fast.
        yield f'{{"is":"tensor","name":{encode_basestring_ascii(node.form["name"])}}}'
        return
    line: dict[str, Any] = {"is": node.kind, **node.form}
    if node.attributes:
        line["attributes"] = {name: _reference(child) for name, child in node.attributes.items()}
    mapping = type(node.value) in MAPPINGS
    references = map(_reference, node.children)
    chunk: list[Any] = list(islice(references, 2 * _CHILDREN_PER_LINE))
    while True:
        if mapping:
            keys, values = chunk[::2], chunk[1::2]
            # Keys of JSON objects are strings; a mapping with others is a list of pairs.
            if all(type(key) is str for key in keys):
                line["items"] = dict(zip(keys, values, strict=True))
            else:
                line["pairs"] = list(zip(keys, values, strict=True))
        elif chunk:
            line["of"] = chunk
        yield _dump(line)
        chunk = list(islice(references, 2 * _CHILDREN_PER_LINE))
        if not chunk:
            return
        line = {"is": "more"}
