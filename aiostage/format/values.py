"""What a manifest carries besides tensors: scalars and containers, how JSON spells them, and what may be hashed."""

from __future__ import annotations

import base64
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import torch

from aiostage._loop.workers import releasing_gil
from aiostage.errors import shown

__all__ = [
    "ARRAY_DTYPES",
    "EXACT_INTEGERS",
    "FACTORIES",
    "MAPPINGS",
    "MAX_HASHED_DEPTH",
    "MAX_HASHED_SIZE",
    "SCALARS",
    "SCALAR_KINDS",
    "SEQUENCES",
    "Collisions",
    "TooLongToHashError",
    "check_hashed",
    "is_inline",
    "read_bytes",
    "read_scalar",
    "torch_constant",
    "write_scalar",
]

MAPPINGS: dict[type, str] = {dict: "dict", OrderedDict: "OrderedDict", Counter: "Counter", defaultdict: "defaultdict"}
"""Exact classes of mappings, and their names in the manifest. Subclasses may hold more than their contents."""

SEQUENCES: dict[type, str] = {list: "list", tuple: "tuple", set: "set", frozenset: "frozenset", deque: "deque"}
"""Exact classes of other containers, and their names in the manifest."""

FACTORIES: dict[Any, str] = {None: "None"} | {
    factory: factory.__name__
    for factory in (dict, list, set, tuple, int, float, complex, str, bytes, bool, OrderedDict, Counter)
}
"""What makes the default values of a defaultdict. Any other factory is code, which no checkpoint carries."""

ARRAY_DTYPES = frozenset(
    np.dtype(name) for name in ("bool", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "c8", "c16")
)
"""NumPy dtypes that torch can hold, in the byte order of the machine."""

_BASE64_STEP = 64 << 10
"""Characters of base64 that are decoded at once with the GIL held. A multiple of four, which are three bytes."""

EXACT_INTEGERS = 1 << 53
"""Larger integers are read inexactly by other JSON parsers, and would be slow to print in decimal."""


def is_inline(value: Any) -> bool:
    """Return whether JSON has a spelling of its own for a value that is read back as exactly that value."""
    cls = type(value)
    if cls is str:
        # A JSON parser joins the escapes of two surrogates to one character, which two characters were before.
        return value.isascii() or _is_encodable(value)
    if cls is int:
        return bool(abs(value) <= EXACT_INTEGERS)
    if cls is float:
        # JSON has no NaN and no infinity. Python prints finite floats so that they are read back exactly.
        return math.isfinite(value)
    return value is None or cls is bool


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def torch_constant(name: str) -> Any:
    """Return a dtype, layout or memory format by its name.

    Raises:
        ValueError: If torch has none of that name.
    """
    # Not by getattr(torch, name): the name comes from a file, and torch imports modules that are asked for like that.
    value = _CONSTANTS.get(name) if isinstance(name, str) else None
    if value is None:
        raise ValueError(f"torch.{shown(name)} is not a dtype, layout or memory format")
    return value


_TORCH_CONSTANTS = (torch.dtype, torch.layout, torch.memory_format)
_CONSTANTS = {name: value for name, value in vars(torch).items() if type(value) in _TORCH_CONSTANTS}


# The bits, because a NaN has a sign and a payload, which no decimal shows.
def _bits(value: float) -> str:
    return struct.pack(">d", value).hex()


def _from_bits(text: str) -> float:
    try:
        (value,) = struct.unpack(">d", bytes.fromhex(text))
    except struct.error as error:
        raise ValueError(f"{shown(text)} are not the bits of a float") from error
    return float(value)


def _write_complex(value: complex) -> list[str]:
    return [_bits(value.real), _bits(value.imag)]


def _write_array_scalar(value: Any) -> list[str]:
    return [value.dtype.str, value.tobytes().hex()]


_SCALAR_DTYPES = {dtype.str: dtype for dtype in ARRAY_DTYPES} | {
    # A file may come from a machine of the other byte order.
    dtype.newbyteorder().str: dtype.newbyteorder()
    for dtype in ARRAY_DTYPES
}


def _read_array_scalar(form: list[str]) -> Any:
    # Not np.dtype(form[0]), which evaluates what looks like Python.
    dtype = _SCALAR_DTYPES[form[0]]
    return np.frombuffer(bytes.fromhex(form[1]), dtype=dtype, count=1)[0]


_Codec: TypeAlias = tuple[str, Callable[[Any], Any], Callable[[Any], Any]]

_BASE64: tuple[Callable[[Any], Any], Callable[[Any], Any]] = (
    lambda value: base64.b64encode(value).decode(),
    # Without validate=True, characters that are not base64 are skipped, and damage is not seen.
    lambda form: base64.b64decode(form, validate=True),
)
_TORCH: _Codec = ("torch", lambda value: str(value).removeprefix("torch."), torch_constant)
_NUMPY: _Codec = ("numpy", _write_array_scalar, _read_array_scalar)

SCALARS: dict[type, _Codec] = {
    # In hexadecimal: converting a long integer to decimal takes quadratic time, and Python refuses over 4,300 digits.
    int: ("int", hex, lambda form: int(form, 16)),
    float: ("float", _bits, _from_bits),
    complex: ("complex", _write_complex, lambda form: complex(*map(_from_bits, form))),
    str: (
        "str",
        lambda value: value.encode("utf-8", "surrogatepass").hex(),
        lambda form: bytes.fromhex(form).decode("utf-8", "surrogatepass"),
    ),
    bytes: ("bytes", *_BASE64),
    bytearray: ("bytearray", _BASE64[0], lambda form: bytearray(_BASE64[1](form))),
    torch.Size: ("Size", list, torch.Size),
    torch.device: ("device", str, torch.device),
    **dict.fromkeys(_TORCH_CONSTANTS, _TORCH),
    **dict.fromkeys((dtype.type for dtype in ARRAY_DTYPES), _NUMPY),
}
"""For each exact class: its name in the manifest, and how a value is spelled and read."""

_READERS = {name: read for name, _, read in SCALARS.values()}

SCALAR_KINDS = frozenset(_READERS)
"""The names of all scalars in the manifest."""


def write_scalar(value: Any) -> tuple[str, Any]:
    """Return the name and the spelling of a scalar whose class is in :data:`SCALARS`."""
    name, write, _ = SCALARS[type(value)]
    return name, write(value)


def read_scalar(name: str, form: Any) -> Any:
    """Return the scalar that has a name and a spelling.

    Raises:
        KeyError: If there is no such name.
        ValueError: If it is spelled wrong. Other exceptions are possible too.
    """
    return _READERS[name](form)


def read_bytes(name: str, form: str) -> bytes | bytearray:
    """Return ``bytes`` or a ``bytearray``, by their name, as :func:`read_scalar` does."""
    starts = releasing_gil(range(0, len(form), _BASE64_STEP))
    pieces = [base64.b64decode(form[start : start + _BASE64_STEP], validate=True) for start in starts]
    return b"".join(pieces) if name == "bytes" else bytearray().join(pieces)


# The hash of a tuple is computed anew each time, recursively in C, and visits an element as often as it is met. So a
# few lines of a hostile manifest could exhaust the stack, or keep a load busy for years: tuples, each of which contains
# the one before twice. The numbers are guesses, far above what trees have. A save refuses the same, so that it never
# writes what no load takes.

MAX_HASHED_DEPTH = 100
"""Levels of tuples in an element of a set or in a key."""

MAX_HASHED_SIZE = 10_000
"""Objects in one element or key, each counted as often as it is met."""

_MAX_HASHED = 1 << 25
"""Objects in all elements and keys together. Hashing so many takes a second or so."""

_MAX_COLLISIONS = 64
"""Different objects of one hash in a set or a mapping, each of which is compared with the others. By chance there are
two at the most."""

_MAPPINGS = frozenset(MAPPINGS.values())
_SETS = frozenset(("set", "frozenset"))
# Hashing one of these does not hash what it contains: they are hashed by identity or not at all.
_NOT_HASHED_INSIDE = _MAPPINGS | {"set", "list", "deque", "tensor"}


class TooLongToHashError(ValueError):
    """An element of a set or a key is too deep or too large, or too many have one hash.

    Attributes:
        container: The number of the node that it is an element or a key of; -1 if its caller knows.
    """

    def __init__(self, message: str, container: int = -1) -> None:
        super().__init__(message)
        self.container = container


def check_hashed(forms: Sequence[dict[str, Any]], children: Sequence[Sequence[Any]]) -> None:
    """Refuse nodes that take too long to hash and are to be hashed.

    Args:
        forms: What describes each node.
        children: What each contains: scalars, and lists with the number of a node.

    Raises:
        TooLongToHashError: If there is one, or if there are too many in total.
    """
    if not any(form["is"] in _SETS or form["is"] in _MAPPINGS for form in forms):
        return
    # Children come before what contains them, so one pass computes both bottom-up. A child with a higher number closes
    # a circle, which only mutable objects can, and these are not hashed by what they contain.
    depths, sizes = [1] * len(forms), [1] * len(forms)
    for index, form in enumerate(releasing_gil(forms)):
        if form["is"] not in _NOT_HASHED_INSIDE:
            depth = size = 0
            for child in releasing_gil(chain(children[index], form.get("attributes", {}).values())):
                size += 1
                if type(child) is list and child[0] < index:
                    depth = max(depth, depths[child[0]])
                    size += sizes[child[0]]
            depths[index] = depth + 1
            # Limited, or the numbers would grow to thousands of digits.
            sizes[index] = min(size, MAX_HASHED_SIZE) + 1
    total = 0
    for index, form in enumerate(releasing_gil(forms)):
        # All elements of a set; every second child of a mapping, which is a key.
        step = 1 if form["is"] in _SETS else 2 if form["is"] in _MAPPINGS else 0
        for place in releasing_gil(range(0, len(children[index]) if step else 0, step or 1)):
            child = children[index][place]
            if type(child) is list:
                total += sizes[child[0]]
                if depths[child[0]] > MAX_HASHED_DEPTH or sizes[child[0]] > MAX_HASHED_SIZE or total > _MAX_HASHED:
                    raise TooLongToHashError(
                        f"node {child[0]} is hashed and too large for it: more than {MAX_HASHED_DEPTH} levels, more "
                        f"than {MAX_HASHED_SIZE} objects, or more than {_MAX_HASHED} with others",
                        index,
                    )


class Collisions:
    """Counts the hashes of what goes into one set or mapping, and refuses too many that are the same.

    Strings are not counted: Python seeds their hashes anew in each process, so a file cannot choose them.
    """

    def __init__(self) -> None:
        self._found: dict[str, int] = {}

    def add(self, keys: Iterable[Any]) -> list[Any]:
        """Count the hashes of keys; return the keys.

        Raises:
            TooLongToHashError: If too many different ones have the same hash.
            TypeError: If one has none.
        """
        keys = list(keys)
        for key in keys:
            if type(key) is not str:
                # As text: hashes that are chosen to collide would collide in this dict too, were they numbers in it.
                found = f"{hash(key):x}"
                count = self._found[found] = self._found.get(found, 0) + 1
                if count > _MAX_COLLISIONS:
                    raise TooLongToHashError(f"more than {_MAX_COLLISIONS} elements or keys have the same hash")
        return keys
