"""The entries of a checkpoint: one for each container, tensor and value, whatever program has written it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from aiostage.format.composites import take_apart
from aiostage.format.nodes import LOOKED_INTO, NodeTable, view_of
from aiostage.format.safetensors import DTYPE_NAMES, TensorRecord
from aiostage.format.values import SCALAR_KINDS, read_scalar

__all__ = ["TreeEntry", "entries_of_table", "entries_of_tree", "tensor_entry"]

_SCALARS = (bool, int, float, str, type(None))
_BYTES = ("bytes", "bytearray")
_REFERENCES = frozenset(("name", "offset", "stride", "attributes", "grad"))
"""Parts of a node that say where something else is. They differ between checkpoints of equal trees."""


@dataclass(frozen=True, slots=True)
class TreeEntry:
    """One place of a checkpoint.

    Attributes:
        path: The steps that lead to it.
        kind: ``"container"``, ``"tensor"``, ``"value"``, ``"object"`` for a value that is more than a number or a text,
            or ``"reference"`` to another place.
        text: Its kind, or its value, for people.
        inner: Whether it is a part of an object, or an attribute, so that no key or index leads to it.
        dtype: The dtype of a tensor.
        shape: The shape of a tensor.
        nbytes: Size of the elements of a tensor.
        more: Further facts, by name.
        source: What the elements are read from. Each kind of checkpoint has something else here.
    """

    path: tuple[str, ...]
    kind: str
    text: str = ""
    inner: bool = False
    dtype: str = ""
    shape: tuple[int, ...] = ()
    nbytes: int = 0
    more: Mapping[str, Any] | None = None
    source: Any = None

    @property
    def name(self) -> str:
        """The path as text."""
        return ".".join(self.path) or "."


def tensor_entry(
    path: tuple[str, ...],
    dtype: torch.dtype,
    shape: Iterable[int],
    *,
    inner: bool = False,
    nbytes: int | None = None,
    text: str = "",
    more: Mapping[str, Any] | None = None,
    source: Any = None,
) -> TreeEntry:
    """Return the entry of a tensor."""
    shape = tuple(shape)
    elements = 1
    for length in shape:
        elements *= length
    nbytes = elements * dtype.itemsize if nbytes is None else nbytes
    name = DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))
    return TreeEntry(path, "tensor", text or "tensor", inner, name, shape, nbytes, more, source)


def entries_of_table(table: NodeTable, records: Mapping[str, TensorRecord]) -> Iterator[TreeEntry]:
    """Iterate over the places of a tree that nodes describe, the root first.

    Args:
        table: The table of the nodes.
        records: The tensors of files, by name. For a missing one, only the path and the name are known.

    Raises:
        ValueError: If a node does not fit the files. Other exceptions are possible too.
    """
    # With a list and not by recursion: a hostile tree may be deeper than Python's stack.
    pending: list[tuple[tuple[str, ...], Any, bool]] = [((), table.root, False)]
    met: dict[int, tuple[str, ...]] = {}
    while pending:
        path, child, inner = pending.pop()
        index = table.node(child)
        if index is None:
            yield TreeEntry(path, "value", repr(child), inner)
            continue
        if index in met:
            yield TreeEntry(path, "reference", ".".join(met[index]) or ".", inner, source=met[index])
            continue
        met[index] = path
        form, children = table.forms[index], table.children[index]
        below: list[tuple[tuple[str, ...], Any, bool]] = []
        if form["is"] in LOOKED_INTO:
            steps = [(_key(table, key), value) for key, value in table.edges(index)]
            yield TreeEntry(path, "container", f"{form['is']} of {len(steps)}", inner)
            below += [((*path, step), value, inner) for step, value in _distinct(steps)]
        else:
            yield _leaf(path, form, inner, records)
            below += [((*path, f"<{number}>"), value, True) for number, value in enumerate(children)]
        below += [((*path, f"<{name}>"), value, True) for name, value in form.get("attributes", {}).items()]
        pending += reversed(below)


def _leaf(path: tuple[str, ...], form: dict[str, Any], inner: bool, records: Mapping[str, TensorRecord]) -> TreeEntry:
    described = {key: value for key, value in form.items() if key not in _REFERENCES}
    if form["is"] in SCALAR_KINDS and form["is"] not in _BYTES:
        return _scalar(path, read_scalar(form["is"], form["value"]), inner)
    if form["is"] != "tensor":
        return TreeEntry(path, "object", f"{form['is']} {_said(form)}".rstrip(), inner, more=described)
    kind = form.get("class", "tensor")
    if form["name"] not in records:
        return TreeEntry(path, "tensor", kind, inner, source=form)
    view, record = view_of(form, records), records[form["name"]]
    more = {
        "class": kind,
        "requires_grad": form.get("requires_grad") is not False
        if kind == "Parameter"
        else bool(form.get("requires_grad")),
    }
    if "offset" in form:
        more["view_of"] = form["name"]
    return tensor_entry(
        path, view.dtype, view.shape, inner=inner, nbytes=record.stop - record.start, text=kind, more=more, source=form
    )


def _scalar(path: tuple[str, ...], value: Any, inner: bool) -> TreeEntry:
    """Return the entry of a value that is not a container."""
    try:
        text = repr(value)
    except ValueError:
        # An integer of too many digits.
        text = hex(value)
    if type(value) in _SCALARS:
        return TreeEntry(path, "value", text, inner)
    return TreeEntry(path, "object", f"{type(value).__name__} {text}", inner, more={"value": text})


def _said(form: Mapping[str, Any]) -> str:
    """Return the value or the shape in a node, as text."""
    found = form.get("value", form.get("shape"))
    return "" if found is None else repr(found)


def _key(table: NodeTable, key: Any) -> str:
    """Return a key as text; a container of containers only by its number."""
    index = table.node(key)
    if index is None:
        return str(key)
    form, children = table.forms[index], table.children[index]
    if "value" in form:
        return str(read_scalar(form["is"], form["value"]))
    if form["is"] == "tuple" and all(table.node(child) is None for child in children):
        return repr(tuple(children))
    return f"<{form['is']} {index}>"


def _distinct(steps: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Number the keys that have the same text, such as 1 and "1"."""
    met: dict[str, int] = {}
    for step, value in steps:
        count = met[step] = met.get(step, 0) + 1
        yield (step if count == 1 else f"{step} ({count})"), value


def entries_of_tree(tree: Any, path: tuple[str, ...] = ()) -> Iterator[TreeEntry]:
    """Iterate over the places of a tree of PyTorch objects, which has to stay alive meanwhile.

    Args:
        tree: Tensors, and what is not a tensor, in dicts, lists and tuples. The entry of a tensor has it as its source.
        path: The path of the tree itself.
    """
    pending: list[tuple[tuple[str, ...], Any, bool]] = [(path, tree, False)]
    met: dict[int, tuple[str, ...]] = {}
    while pending:
        path, value, inner = pending.pop()
        if type(value) in _SCALARS:
            yield _scalar(path, value, inner)
            continue
        if id(value) in met and not isinstance(value, (bytes, torch.dtype, torch.Size, tuple)):
            yield TreeEntry(path, "reference", ".".join(met[id(value)]) or ".", inner, source=met[id(value)])
            continue
        met[id(value)] = path
        below: list[tuple[tuple[str, ...], Any, bool]] = []
        if isinstance(value, Mapping):
            yield TreeEntry(path, "container", f"{type(value).__name__} of {len(value)}", inner)
            below += [((*path, step), child, inner) for step, child in _distinct((str(k), v) for k, v in value.items())]
        elif isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            yield TreeEntry(path, "container", f"{type(value).__name__} of {len(value)}", inner)
            below += [((*path, str(number)), child, inner) for number, child in enumerate(value)]
        elif isinstance(value, torch.Tensor):
            yield from _tensor(path, value, inner, below)
        elif isinstance(value, np.ndarray):
            yield TreeEntry(path, "object", "ndarray", inner, more={"is": "ndarray"})
            below.append(((*path, "<0>"), torch.from_numpy(value), True))
        elif isinstance(value, (bytes, bytearray)):
            text, name = base64.b64encode(value).decode(), type(value).__name__
            yield TreeEntry(path, "object", f"{name} {text!r}", inner, more={"is": name, "value": text})
        else:
            yield _scalar(path, value, inner)
        if isinstance(value, (Mapping, list, tuple, torch.Tensor)):
            # For example the versions of a module's state dict, which is an OrderedDict.
            attributes = getattr(value, "__dict__", {})
            below += [((*path, f"<{name}>"), child, True) for name, child in attributes.items()]
        pending += reversed(below)


def _tensor(path: tuple[str, ...], tensor: torch.Tensor, inner: bool, below: list[Any]) -> Iterator[TreeEntry]:
    kind = "Parameter" if isinstance(tensor, torch.nn.Parameter) else "tensor"
    apart = (
        None if tensor.is_meta and not tensor.is_quantized and tensor.layout is torch.strided else take_apart(tensor)
    )
    if apart is None:
        more = {"class": kind, "requires_grad": tensor.requires_grad}
        yield tensor_entry(path, tensor.dtype, tensor.shape, inner=inner, text=kind, more=more, source=tensor.detach())
        return
    name, parts, form = apart
    yield TreeEntry(path, "object", f"{name} {_said(form)}".rstrip(), inner, more={"is": name, **form})
    below += [((*path, f"<{number}>"), part, True) for number, part in enumerate(parts.values())]
