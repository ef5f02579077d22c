"""Memory without a version: NumPy arrays, bytearrays and arrays, copied and compared in pieces."""

from __future__ import annotations

import ctypes
from collections.abc import Generator
from operator import attrgetter
from typing import Any

import numpy as np

__all__ = ["copy_buffer", "nbytes_of", "same_buffer"]

_PIECE_BYTES = 2**18
"""Bytes copied or compared between two yields: up to a millisecond where the pages are new."""


_resize = ctypes.PyDLL(None).PyByteArray_Resize
_resize.argtypes = [ctypes.py_object, ctypes.c_ssize_t]


def nbytes_of(source: Any) -> int:
    """Return how many bytes of memory something holds."""
    return int(source.nbytes) if isinstance(source, np.ndarray) else len(source) * getattr(source, "itemsize", 1)


def copy_buffer(source: Any) -> Generator[None, None, Any]:
    """Return a copy as copy.deepcopy makes it, yielding between pieces."""
    if nbytes_of(source) <= _PIECE_BYTES:
        return source.copy(order="K") if isinstance(source, np.ndarray) else source[:]
    if isinstance(source, np.ndarray):
        array = np.empty_like(source, order="K", subok=False)
        for there, here in _pieces(array, source):
            there[...] = here
            yield
        return array
    copy: Any = source[:0]
    step = max(1, _PIECE_BYTES // getattr(source, "itemsize", 1))
    if type(source) is bytearray:
        # bytearray(n) writes n zeros at once, and one that grows is moved now and then, 20 ms for 500 MB.
        _resize(copy, len(source))
        stop = 0
        for start in range(0, len(copy), step):
            part = source[start : start + step]
            copy[stop : stop + len(part)] = part
            stop += len(part)
            yield
        # What was not written is not shown: the source may have become shorter.
        del copy[stop:]
        return copy
    for start in range(0, len(source), step):
        copy += source[start : start + step]
        yield
    return copy


def same_buffer(source: Any, copy: Any) -> Generator[None, None, bool]:
    """Return whether something still holds what its copy does, yielding between pieces."""
    if isinstance(source, np.ndarray):
        if (source.shape, source.dtype) != (copy.shape, copy.dtype):
            return False
        for there, here in _pieces(copy, source):
            if there.tobytes() != here.tobytes():
                return False
            yield
        return True
    if len(source) != len(copy):
        return False
    step = max(1, _PIECE_BYTES // getattr(source, "itemsize", 1))
    for start in range(0, len(source), step):
        if source[start : start + step] != copy[start : start + step]:
            return False
        yield
    return True


def _pieces(copy: np.ndarray[Any, Any], source: np.ndarray[Any, Any]) -> Generator[tuple[Any, Any], None, None]:
    """Yield the same parts of two arrays, none larger than a piece if the arrays can be cut so."""
    if source.nbytes <= _PIECE_BYTES or source.ndim == 0:
        yield copy, source
        return
    for order in ("C", "F"):
        contiguous = attrgetter(f"flags.{order.lower()}_contiguous")
        if contiguous(copy) and contiguous(source):
            flat: Any = copy.reshape(-1, order=order)
            other: Any = source.reshape(-1, order=order)
            step = max(1, _PIECE_BYTES // max(1, source.itemsize))
            for start in range(0, flat.size, step):
                yield flat[start : start + step], other[start : start + step]
            return
    for row, line in zip(copy, source, strict=True):
        if isinstance(line, np.ndarray) and isinstance(row, np.ndarray):
            yield from _pieces(row, line)
        else:
            yield copy, source
            return
