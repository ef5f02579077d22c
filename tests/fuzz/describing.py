"""What a tree is, as a list of facts that two trees have in common exactly when they are the same."""

from __future__ import annotations

import copyreg
import enum
import random
import types
import weakref
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from tests.fuzz.classes import Wrapper

__all__ = ["Description", "describe", "difference", "difference_of_cast"]

_VALUES = (type(None), bool, int, float, complex, str, bytes, range, torch.dtype, torch.device, torch.Size)
_SAME = (
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
    enum.Enum,
    weakref.ref,
)


@dataclass
class Description:
    """Facts in the order of a walk, and what was met.

    Attributes:
        facts: Each with the path that it was found at.
        tensors: Those with memory of their own, with their paths.
        computed: The paths of conjugate and negative views, whose copies may have strides of their own.
        mutable: The identities of all objects met that may be changed.
    """

    facts: list[tuple[str, Any]] = field(default_factory=list)
    tensors: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    mutable: dict[int, str] = field(default_factory=dict)
    computed: set[str] = field(default_factory=set)

    def overlaps(self) -> dict[tuple[str, str], int]:
        """Return how many bytes lie between the beginnings of each two tensors that have bytes in common."""
        spans = []
        for path, tensor in self.tensors:
            if tensor.numel():
                last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
                start = _address(tensor)
                spans.append((start, start + (last + 1) * tensor.dtype.itemsize, path))
        spans.sort()
        found = {}
        for number, (start, stop, path) in enumerate(spans):
            for other_start, _, other in spans[number + 1 :]:
                if other_start >= stop:
                    break
                first, second = sorted((path, other))
                found[first, second] = (other_start - start) * (1 if first == path else -1)
        return found


def describe(root: Any, *, bare: bool = False, as_source: bool = False) -> Description:
    """Describe a tree by value; the description refers to none of its memory but through ``tensors``.

    Args:
        root: The tree.
        bare: Whether to leave out what ``copy.deepcopy`` drops of an ``nn.Parameter``.
        as_source: Whether to leave out what a copy counts by itself.
    """
    description = Description()
    _Describing(description, bare, as_source).visit(root, "tree")
    return description


def difference(expected: Description, found: Description, computed: Collection[str] = ()) -> str | None:
    """Return the first difference in words, or None; at some paths strides may differ."""
    for (path, one), (_, other) in zip(expected.facts, found.facts, strict=False):
        if one != other and not (one[0] == other[0] == "strides" and path in computed):
            return f"{path}: expected {str(one)[:300]}, found {str(other)[:300]}"
    if len(expected.facts) != len(found.facts):
        return f"expected {len(expected.facts)} facts, found {len(found.facts)}"
    return None


def difference_of_cast(expected: Description, found: Description, computed: Collection[str] = ()) -> str | None:
    """Return the first difference in words, or None, where floating-point tensors may have been cast.

    What is in one piece of memory has the dtype that it had, or another one and the values that casting gives.
    """
    originals, cast = dict(expected.tensors), set()
    for path, tensor in found.tensors:
        original = originals.get(path)
        floating = original is not None and original.dtype.is_floating_point and tensor.dtype.is_floating_point
        if original is not None and floating and original.dtype is not tensor.dtype:
            if _bytes(original.detach().to(tensor.dtype)) != _bytes(tensor.detach()):
                return f"{path}: the values are not those of the source, cast to {tensor.dtype}"
            cast.add(path)
    return difference(_without_dtypes(expected, cast), _without_dtypes(found, cast), computed)


def _without_dtypes(description: Description, cast: Collection[str]) -> Description:
    """Return a description without what casting changes of some tensors."""
    facts = [
        (path, fact[1:] if path in cast and isinstance(fact[0], torch.dtype) else fact)
        for path, fact in description.facts
        if path not in cast or fact[0] not in ("strides", "bytes")
    ]
    return Description(facts)


def _address(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.data_ptr()


class _Describing:
    def __init__(self, description: Description, bare: bool, as_source: bool) -> None:
        self.to = description
        self.bare = bare
        self.as_source = as_source
        self.numbers: dict[int, int] = {}
        self.alive: list[Any] = []

    def note(self, path: str, *fact: Any) -> None:
        self.to.facts.append((path, fact))

    def visit(self, item: Any, path: str) -> None:
        cls = type(item)
        if cls in _VALUES:
            self.note(path, cls, repr(item))
            return
        if isinstance(item, _SAME):
            self.note(path, "the same", id(item))
            return
        if id(item) in self.numbers:
            self.note(path, "met before", self.numbers[id(item)])
            return
        number = self.numbers[id(item)] = len(self.numbers)
        self.alive.append(item)
        self.note(path, "new", number, cls)
        if not isinstance(item, (tuple, frozenset, types.MethodType)):
            self.to.mutable[id(item)] = path
        if isinstance(item, torch.Tensor):
            self.tensor(item, path)
        elif isinstance(item, numpy.ndarray):
            self.array(item, path)
        elif isinstance(item, torch.UntypedStorage):
            memory = torch.empty(0, dtype=torch.uint8).set_(item)
            self.note(path, "bytes", _bytes(memory))
            self.to.tensors.append((path, memory))
        elif isinstance(item, numpy.generic):
            self.note(path, item.dtype.str, item.tobytes())
        else:
            self.contents(item, path)

    def contents(self, item: Any, path: str) -> None:
        if isinstance(item, dict):
            self.note(path, len(item))
            for place, (key, value) in enumerate(list(item.items())):
                self.visit(key, f"{path}.key{place}")
                self.visit(value, f"{path}[{str(key)[:20]}]" if type(key) in _VALUES else f"{path}.value{place}")
        elif isinstance(item, (list, tuple, deque)):
            self.note(path, len(item), getattr(item, "maxlen", None))
            for place, value in enumerate(list(item)):
                self.visit(value, f"{path}[{place}]")
        elif isinstance(item, (set, frozenset)):
            for place, value in enumerate(sorted(item, key=_order)):
                self.visit(value, f"{path}{{{place}}}")
                self.note(path, "found by its hash", value in item)
        elif isinstance(item, (bytearray, str)):
            self.note(path, repr(item))
        elif isinstance(item, random.Random):
            self.note(path, item.getstate())
        elif isinstance(item, types.MethodType):
            self.visit(item.__func__, f"{path}.__func__")
            self.visit(item.__self__, f"{path}.__self__")
        elif self.as_source and isinstance(item, Iterator) and type(item).__module__ == "builtins":
            # As in a copy by copy.deepcopy, one over a list in a circle has the place that there was in the list by
            # the time that it was made.
            return
        elif type(item).__module__ == "builtins" or type(item).__flags__ & 1 << 9 == 0:
            # Made in C: what it reduces to is what there is to see.
            self.contents(item.__reduce_ex__(4), path)
        self.attributes(item, path)

    def attributes(self, item: Any, path: str, without: tuple[str, ...] = ()) -> None:
        if self.as_source:
            without += ("generation", "total")
        held = {name: value for name, value in getattr(item, "__dict__", {}).items() if name not in without}
        self.note(path, "attributes", tuple(held))
        for name, value in list(held.items()):
            self.visit(value, f"{path}.{name}")
        for name in sorted(copyreg._slotnames(type(item))):  # type: ignore[attr-defined]
            if hasattr(item, name):
                self.visit(getattr(item, name), f"{path}.{name}")

    def array(self, array: Any, path: str) -> None:
        self.note(path, repr(array.dtype), array.shape, array.strides if array.size else None, array.flags.writeable)
        if isinstance(array, numpy.ma.MaskedArray):
            self.note(path, "mask", numpy.ma.getmaskarray(array).tobytes(), str(array.fill_value))
            array = array.data
        if array.dtype.hasobject and array.dtype.fields is None:
            for place, item in enumerate(array.flat):
                self.visit(item, f"{path}[{place}]")
        elif array.dtype.hasobject:
            for name in array.dtype.names:
                for place, item in enumerate(array[name].flat):
                    self.visit(item, f"{path}[{name}][{place}]")
        else:
            self.note(path, array.tobytes())

    def tensor(self, tensor: torch.Tensor, path: str) -> None:
        bare = self.bare and isinstance(tensor, torch.nn.Parameter)
        without: tuple[str, ...] = ()
        if isinstance(tensor, Wrapper):
            self.note(path, tensor.dtype, tuple(tensor.shape), tensor.requires_grad)
            without = ("left", "right")
            self.visit(tensor.left, f"{path}.left")
            self.visit(tensor.right, f"{path}.right")
        elif isinstance(tensor, torch.nn.parameter.UninitializedTensorMixin):
            self.note(path, "uninitialized", tensor.requires_grad)
        else:
            with torch._C.DisableTorchFunctionSubclass():
                self.memory(tensor, path, bare)
        if bare:
            return
        with torch._C.DisableTorchFunctionSubclass():
            grad = tensor.grad if tensor.is_leaf else None
        if grad is not None:
            self.visit(grad, f"{path}.grad")
        self.attributes(tensor, path, without)

    def memory(self, tensor: torch.Tensor, path: str, bare: bool) -> None:
        # Of a tensor that autograd has computed, such as a view of one that requires a gradient, only the values are
        # staged; copy.deepcopy refuses it.
        requires_grad = tensor.requires_grad and tensor.is_leaf
        self.note(path, tensor.dtype, tuple(tensor.shape), tensor.layout, requires_grad, tensor.device.type)
        plain = tensor.detach()
        if tensor.is_nested:
            self.note(path, "offsets", plain.offsets().tolist(), _bytes(plain.values()))
        elif tensor.is_quantized:
            self.note(path, str(tensor.qscheme()), _bytes(plain.int_repr()), _bytes(plain.dequantize()))
        elif tensor.layout is torch.sparse_coo:
            self.note(path, plain.is_coalesced(), _bytes(plain._indices()), _bytes(plain._values()))
        elif tensor.layout is not torch.strided:
            self.note(path, _bytes(plain.crow_indices()), _bytes(plain.col_indices()), _bytes(plain.values()))
        else:
            by_value = tensor.is_conj() or tensor.is_neg()
            self.note(path, "strides", None if bare else tensor.stride())
            if by_value:
                self.to.computed.add(path)
            self.note(path, "bytes", _bytes(plain))
            if not by_value:
                self.to.tensors.append((path, tensor))


def _bytes(tensor: torch.Tensor) -> bytes:
    plain = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format).reshape(-1)
    # The bytes of a tensor whose dtype NumPy does not know.
    if not plain.numel() or plain.is_meta:
        return b""
    return bytes(plain.view(torch.uint8).numpy().tobytes())


def _order(item: Any) -> str:
    tag = getattr(item, "tag", None)
    return f"tag {tag}" if tag is not None else str(getattr(item, "items", item))
