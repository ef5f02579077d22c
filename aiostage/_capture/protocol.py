"""How objects of a class are copied, and whether a change to one of them can be noticed."""

from __future__ import annotations

import array
import copyreg
import datetime
import decimal
import enum
import fractions
import pathlib
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from functools import cache
from typing import Any

import numpy as np

__all__ = ["BUFFERS", "IMMUTABLE", "is_safe_to_make", "is_witnessed"]

BUFFERS = frozenset((np.ndarray, bytearray, array.array))
"""Classes whose instances are memory without a version."""

IMMUTABLE = (
    datetime.date,
    datetime.time,
    datetime.timedelta,
    datetime.tzinfo,
    decimal.Decimal,
    enum.Enum,
    fractions.Fraction,
    pathlib.PurePath,
    slice,
    uuid.UUID,
    np.dtype,
)
"""Classes whose instances never change, so that it does not matter when they are looked at."""

_READ = ("__iter__", "items", "keys", "values", "__reduce__", "__reduce_ex__", "__getstate__", "__getattribute__")


def is_witnessed(cls: Any) -> bool:
    """Return whether all that objects of a class reduce to can be compared later, because no other code makes it."""
    return _is_witnessed(cls)


@cache
def _is_witnessed(cls: Any) -> bool:
    if cls in copyreg.dispatch_table:
        return cls in (slice, complex)
    if issubclass(cls, IMMUTABLE) or (issubclass(cls, np.generic) and not issubclass(cls, np.void)):
        return True
    base: Any = object
    for known in (Counter, OrderedDict, defaultdict, dict, list, tuple, set, frozenset, deque):
        if issubclass(cls, known):
            base = known
            break
    if any(getattr(cls, name, None) is not getattr(base, name, None) for name in _READ):
        return False
    # A tuple's are its items, which are what they are.
    if base is not tuple and (hasattr(cls, "__getnewargs__") or hasattr(cls, "__getnewargs_ex__")):
        return hasattr(base, "__getnewargs__")
    return base is not object or cls.__module__ != "builtins" or cls is object


def is_safe_to_make(cls: Any) -> bool:
    """Return whether making an object of a class runs no code that could look at the values of tensors."""
    return _is_safe_to_make(cls)


@cache
def _is_safe_to_make(cls: Any) -> bool:
    if hasattr(cls, "__setstate__"):
        return False
    if issubclass(cls, (dict, list, set, frozenset, deque)):
        return cls.__module__ in ("builtins", "collections")
    return True
