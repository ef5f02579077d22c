"""NumPy dtypes as JSON: read with suspicion, since ``np.dtype`` evaluates what looks like syntax."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from aiostage.errors import shown
from aiostage.format.kinds import NotCarried

__all__ = ["dtype_form", "dtype_of"]

# Limits against a file that asks for an element of any size, or for recursion without end. All are guesses, far above
# what arrays in state dicts have.
_SIMPLE = re.compile(
    r"[<>|](?:b1|[iu][1248]|f[248]|c(?:8|16)|[SV]\d{1,9}|U\d{1,9}"
    r"|[mM]8(?:\[\d{0,9}(?:Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?)"
)
_MAX_DEPTH = 16
_MAX_FIELDS = 10_000
_MAX_ITEM_BYTES = 1 << 31
_LONG = "gG"
"""Codes of longdouble and clongdouble."""

_USER_DEFINED = 2
"""What ``dtype.isbuiltin`` is for dtypes that other packages have registered, as ml_dtypes does with bfloat16."""


def dtype_form(dtype: np.dtype[Any]) -> Any:
    """Return what describes a dtype, as JSON.

    Raises:
        NotCarried: If elements of it cannot be written.
    """
    _check(dtype)
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return {"base": dtype_form(base), "shape": list(shape)}
    if dtype.names is None:
        return dtype.str
    fields = [dtype.fields[name] for name in dtype.names] if dtype.fields is not None else []
    # A field is a pair of dtype and offset, or has a title as the third.
    if any(len(found) > 2 for found in fields):
        raise NotCarried("the fields of its dtype have titles", "Rename its fields without titles.")
    return {
        "names": list(dtype.names),
        "formats": [dtype_form(found[0]) for found in fields],
        "offsets": [found[1] for found in fields],
        "itemsize": dtype.itemsize,
        "aligned": dtype.isalignedstruct,
    } | ({"record": True} if dtype.type is np.record else {})


def _check(dtype: np.dtype[Any]) -> None:
    if dtype.char == "T":
        raise NotCarried("its dtype is StringDType", "Put its tolist() into the state dict.")
    if dtype.names is None and dtype.subdtype is None and dtype.hasobject:
        raise NotCarried("its elements are Python objects", "Put its tolist() into the state dict.")
    if dtype.isbuiltin == _USER_DEFINED:
        bits = dtype.itemsize * 8
        raise NotCarried(
            f"its dtype {dtype} is not one of NumPy's own",
            f"Put torch.from_numpy(array.view(np.uint{bits})) into the state dict, viewed as the dtype of torch."
            if bits in (8, 16, 32, 64)
            else "Put its tolist() into the state dict.",
        )
    if dtype.char in _LONG:
        raise NotCarried(
            f"its dtype {dtype} means another format on another machine",
            "Put its astype(np.float64) or astype(np.complex128) into the state dict, or its view(np.uint8).",
        )


def dtype_of(form: Any, depth: int = 0) -> np.dtype[Any]:
    """Return the dtype that JSON describes.

    Raises:
        ValueError: If it describes none. Other exceptions are possible too.
    """
    if isinstance(form, str):
        if not _SIMPLE.fullmatch(form):
            raise ValueError(f"{shown(form)} is not a dtype of NumPy")
        return np.dtype(form)
    if depth > _MAX_DEPTH:
        raise ValueError("a dtype is nested too deeply")
    if "base" in form:
        base, shape = dtype_of(form["base"], depth + 1), form["shape"]
        # Before np.dtype sees it, whose own size is a C integer.
        nbytes = max(base.itemsize, 1)
        for size in shape:
            if type(size) is not int or not 0 <= size < _MAX_ITEM_BYTES:
                raise ValueError("the size of a dtype is not an integer of at least 0")
            nbytes *= max(size, 1)
            if nbytes > _MAX_ITEM_BYTES:
                raise ValueError("an element is too large")
        return np.dtype((base, tuple(shape)))
    names, formats, offsets = form["names"], form["formats"], form["offsets"]
    if not len(names) == len(formats) == len(offsets) <= _MAX_FIELDS or not all(type(name) is str for name in names):
        raise ValueError("the fields of a dtype do not fit each other")
    if not all(type(number) is int and 0 <= number <= _MAX_ITEM_BYTES for number in (*offsets, form["itemsize"])):
        raise ValueError("the offsets of a dtype are not integers of at least 0")
    fields = {
        "names": names,
        "formats": [dtype_of(each, depth + 1) for each in formats],
        "offsets": offsets,
        "itemsize": form["itemsize"],
    }
    made: np.dtype[Any] = np.dtype(fields, align=form["aligned"] is True)  # type: ignore[call-overload]
    return np.dtype((np.record, made)) if form.get("record") is True else made
