"""What a manifest can carry besides tensors: the scalars and containers, and how each is spelled in JSON."""

from __future__ import annotations

import base64
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Generator
from typing import Any, TypeAlias

import numpy as np
import torch

from aiostage.errors import shown

__all__ = [
    "ARRAY_DTYPES",
    "EXACT_INTEGERS",
    "FACTORIES",
    "MAPPINGS",
    "SCALARS",
    "SCALAR_KINDS",
    "SEQUENCES",
    "is_inline",
    "read_bytes",
    "read_scalar",
    "torch_constant",
    "write_scalar",
]

MAPPINGS: dict[type, str] = {dict: "dict", OrderedDict: "OrderedDict", Counter: "Counter", defaultdict: "defaultdict"}
"""Exact classes of mappings, and their names in the manifest."""

SEQUENCES: dict[type, str] = {list: "list", tuple: "tuple", set: "set", frozenset: "frozenset", deque: "deque"}
"""Exact classes of other containers, and their names in the manifest."""

FACTORIES: dict[Any, str] = {None: "None"} | {
    factory: factory.__name__
    for factory in (dict, list, set, tuple, int, float, complex, str, bytes, bool, OrderedDict, Counter)
}
"""What makes the default values of a defaultdict. Anything else would have to be imported by name."""

ARRAY_DTYPES = frozenset(
    np.dtype(name) for name in ("bool", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "c8", "c16")
)
"""NumPy dtypes that torch can hold, in the byte order of the machine."""

_STEP = 64 << 10
"""Characters of base64 that are decoded at once, a multiple of four."""

EXACT_INTEGERS = 1 << 53
"""Larger integers are read inexactly by other JSON parsers, and would be slow to print in decimal."""


def is_inline(value: Any) -> bool:
    """Return whether JSON has a spelling of its own for a value that is read back as exactly that value."""
    cls = type(value)
    if cls is str:
        # Surrogates survive JSON one by one but not in pairs.
        return value.isascii() or _is_encodable(value)
    if cls is int:
        return abs(int(value)) <= EXACT_INTEGERS
    if cls is float:
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
    # Not looked up in torch, which imports what is asked for.
    value = _CONSTANTS.get(name) if isinstance(name, str) else None
    if value is None:
        raise ValueError(f"torch.{shown(name)} is no dtype, layout or memory format")
    return value


_TORCH_CONSTANTS = (torch.dtype, torch.layout, torch.memory_format)
_CONSTANTS = {name: value for name, value in vars(torch).items() if type(value) in _TORCH_CONSTANTS}


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
    # Of machines of the other byte order.
    dtype.newbyteorder().str: dtype.newbyteorder()
    for dtype in ARRAY_DTYPES
}


def _read_array_scalar(form: list[str]) -> Any:
    # Not through np.dtype, which evaluates what looks like syntax.
    dtype = _SCALAR_DTYPES[form[0]]
    return np.frombuffer(bytes.fromhex(form[1]), dtype=dtype, count=1)[0]


_Codec: TypeAlias = tuple[str, Callable[[Any], Any], Callable[[Any], Any]]

_BASE64: tuple[Callable[[Any], Any], Callable[[Any], Any]] = (
    lambda value: base64.b64encode(value).decode(),
    lambda form: base64.b64decode(form, validate=True),
)
_TORCH: _Codec = ("torch", lambda value: str(value).removeprefix("torch."), torch_constant)
_NUMPY: _Codec = ("numpy", _write_array_scalar, _read_array_scalar)

SCALARS: dict[type, _Codec] = {
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


def read_bytes(name: str, form: str) -> Generator[None, None, bytes | bytearray]:
    """Return ``bytes`` or a ``bytearray``, by their name, as :func:`read_scalar` does; yielding now and then."""
    pieces: list[bytes] = []
    for start in range(0, len(form), _STEP):
        pieces.append(base64.b64decode(form[start : start + _STEP], validate=True))
        yield
    return b"".join(pieces) if name == "bytes" else bytearray().join(pieces)
