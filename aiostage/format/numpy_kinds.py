"""Kinds of NumPy beyond numbers and their arrays: other dtypes, masked arrays, generators of random numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from aiostage.format.kinds import Kind, NotCarried, Parts
from aiostage.format.numpy_dtypes import dtype_form, dtype_of

__all__ = ["NUMPY_KINDS", "array_parts", "bit_generator"]

_MAX_DIMENSIONS = 64
_MT19937_WORDS = 624
_PHILOX_WORDS = 4

_BIT_GENERATORS: dict[str, Any] = {
    cls.__name__: cls
    for cls in (np.random.MT19937, np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64)
}


def array_parts(array: np.ndarray[Any, Any]) -> Parts:
    """Take an array apart whose dtype torch does not know.

    Raises:
        NotCarried: If its elements cannot be written.
    """
    try:
        dtype = dtype_form(array.dtype)
    except NotCarried as error:
        raise NotCarried(f"a NumPy array cannot be written: {error.reason}", error.hint) from None
    fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    form = {"dtype": dtype, "shape": list(array.shape)} | ({"fortran": True} if fortran else {})
    data = array.tobytes("F" if fortran else "C")
    memory = (
        torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if data
        else torch.empty(0, dtype=torch.uint8, device="cpu")
    )
    return Parts(form, {"array": memory})


def _rebuild_array(form: Mapping[str, Any], children: Sequence[Any]) -> np.ndarray[Any, Any]:
    (memory,) = children
    dtype, shape = dtype_of(form["dtype"]), form["shape"]
    if len(shape) > _MAX_DIMENSIONS or not all(type(size) is int and 0 <= size < 1 << 62 for size in shape):
        raise ValueError("the shape of an array is not a list of integers of at least 0")
    if not isinstance(memory, torch.Tensor) or memory.dtype is not torch.uint8:
        raise ValueError("an array has no memory")
    order: Any = "F" if form.get("fortran") is True else "C"
    if math.prod(shape) * dtype.itemsize != memory.numel():
        raise ValueError(f"an array of {list(shape)} and {dtype} has {memory.numel()} bytes")
    # A copy, because the memory of the file need not be aligned to the elements. NumPy wants no memory for no elements.
    data = memory.numpy()
    return np.ndarray(tuple(shape), dtype, data if data.size else None, order=order).copy(order)


def _take_scalar_apart(value: Any) -> Parts:
    try:
        dtype = dtype_form(value.dtype)
    except NotCarried as error:
        raise NotCarried(f"a NumPy scalar cannot be written: {error.reason}", error.hint) from None
    return Parts({"dtype": dtype, "value": value.tobytes().hex()})


def _rebuild_scalar(form: Mapping[str, Any], children: Sequence[Any]) -> Any:
    dtype = dtype_of(form["dtype"])
    if dtype.subdtype is not None:
        raise ValueError("a scalar has a shape")
    data = bytes.fromhex(form["value"])
    if len(data) != dtype.itemsize:
        raise ValueError(f"a scalar of {dtype} has {len(data)} bytes")
    return np.ndarray((), dtype, bytearray(data) if data else None)[()]


def _take_masked_apart(value: Any) -> Parts:
    mask = np.ma.getmask(value)
    return Parts(
        {"hard": bool(value.hardmask)},
        {
            "data": np.asarray(value.data),
            "mask": None if mask is np.ma.nomask else mask,
            # The private attribute: fill_value makes one of the default for an array that has none of its own.
            "fill_value": None if value._fill_value is None else np.asarray(value._fill_value),
        },
    )


def _rebuild_masked(form: Mapping[str, Any], children: Sequence[Any]) -> Any:
    data, mask, fill_value = children
    if type(data) is not np.ndarray or not all(each is None or type(each) is np.ndarray for each in (mask, fill_value)):
        raise ValueError("a masked array is made of arrays")
    made: Any = np.ma.MaskedArray(data, np.ma.nomask if mask is None else mask, hard_mask=form["hard"] is True)
    if fill_value is not None:
        made.fill_value = fill_value[()]
    return made


def _take_bit_generator_apart(value: Any) -> Parts:
    return Parts({"generator": type(value).__name__}, {"state": value.state})


def bit_generator(name: str, state: Any) -> Any:
    """Make a generator of bits.

    NumPy does not check positions, and would read memory outside of the state, so they are checked here.
    """
    made = _BIT_GENERATORS[name]()
    if type(state) is not dict:
        raise ValueError("the state of a generator is a dict")
    if name == "MT19937":
        _check_position(state["state"]["pos"], _MT19937_WORDS)
        if state["state"]["key"].shape != (_MT19937_WORDS,):
            raise ValueError("the key of a generator has another length")
    if name == "Philox":
        _check_position(state["buffer_pos"], _PHILOX_WORDS)
        if state["buffer"].shape != (_PHILOX_WORDS,):
            raise ValueError("the buffer of a generator has another length")
    made.state = state
    return made


# At the end of the state is allowed: the next draw then computes a new one.
def _check_position(value: Any, most: int) -> None:
    if not isinstance(value, (int, np.integer)) or not 0 <= value <= most:
        raise ValueError("the position of a generator is outside of its state")


def _take_generator_apart(value: Any) -> Parts:
    return Parts(children={"bit_generator": value.bit_generator})


def _rebuild_generator(form: Mapping[str, Any], children: Sequence[Any]) -> np.random.Generator:
    (bits,) = children
    if type(bits) not in _BIT_GENERATORS.values():
        raise ValueError("a Generator is made of a generator of bits")
    return np.random.Generator(bits)


def _take_random_state_apart(value: Any) -> Parts:
    state = value.get_state(legacy=False)
    return Parts({"generator": state["bit_generator"]}, {"state": state})


def _rebuild_random_state(form: Mapping[str, Any], children: Sequence[Any]) -> np.random.RandomState:
    (state,) = children
    # The generator of bits checks the state before RandomState takes it. It does not know has_gauss and gauss, which
    # are the second of a pair of normal numbers, drawn and not yet returned.
    bits = bit_generator(form["generator"], {key: value for key, value in state.items() if "gauss" not in key})
    made = np.random.RandomState(bits)
    made.set_state(state)
    return made


def _text(value: Any) -> Parts:
    return Parts(children={"text": str(value)})


def _rebuild_text(form: Mapping[str, Any], children: Sequence[Any]) -> np.str_:
    (text,) = children
    if type(text) is not str:
        raise ValueError("a text is expected")
    return np.str_(text)


NUMPY_KINDS: tuple[Kind, ...] = (
    Kind("array", (), array_parts, _rebuild_array),
    Kind("np.str_", (np.str_,), _text, _rebuild_text),
    Kind(
        "np.generic",
        (np.datetime64, np.timedelta64, np.bytes_, np.void),
        _take_scalar_apart,
        _rebuild_scalar,
    ),
    Kind("MaskedArray", (np.ma.MaskedArray,), _take_masked_apart, _rebuild_masked),
    Kind(
        "np.dtype",
        (),
        lambda value: Parts({"dtype": dtype_form(value)}),
        lambda form, children: dtype_of(form["dtype"]),
    ),
    Kind(
        "BitGenerator",
        tuple(_BIT_GENERATORS.values()),
        _take_bit_generator_apart,
        lambda form, children: bit_generator(form["generator"], *children),
    ),
    Kind("np.random.Generator", (np.random.Generator,), _take_generator_apart, _rebuild_generator),
    Kind("RandomState", (np.random.RandomState,), _take_random_state_apart, _rebuild_random_state),
)
