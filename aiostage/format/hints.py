"""What to do about an object that a checkpoint cannot carry: one line for each kind, which works."""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any

import numpy as np
import torch

__all__ = ["hint_for", "reason_for"]

_REGISTER = "Register its class with aiostage.checkpoint.register()"

_CONTAINERS: tuple[type, ...] = (dict, list, tuple, set, frozenset)
_SCALARS: tuple[type, ...] = (bool, int, float, complex, str, bytes, bytearray)


def reason_for(value: Any) -> str:
    """Return why an object is refused."""
    if isinstance(value, type):
        return f"the class {value.__module__}.{value.__qualname__} itself is code, which no checkpoint carries"
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)):
        return f"a {type(value).__name__} is code, which no checkpoint carries"
    cls = type(value)
    return f"an object of class {cls.__module__}.{cls.__qualname__} cannot be carried by JSON"


def hint_for(value: Any) -> str:
    """Return what to put into the state dict instead, or what to do so that the object can be carried."""
    cls = type(value)
    if isinstance(value, type):
        return "Put its name into the state dict: a string."
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)):
        return "Put its name into the state dict, and look it up after loading."
    if isinstance(value, np.ndarray):
        return "Put np.asarray(array) into the state dict."
    if isinstance(value, torch.nn.Module) or (dataclasses.is_dataclass(value) and hasattr(value, "state_dict")):
        return "Put its state_dict() into the state dict."
    if isinstance(value, (np.longdouble, np.clongdouble)):
        return "Put np.array([value]).view(np.uint8) into the state dict, or convert it by float() or complex()."
    if isinstance(value, np.generic):
        return "Convert it by item()."
    for base in _SCALARS:
        if isinstance(value, base):
            return f"Convert it by {base.__name__}(), or register its class with aiostage.checkpoint.register()."
    for base in _CONTAINERS:
        # What a subclass has besides would be lost in a conversion.
        if isinstance(value, base):
            extra = " if it has nothing besides" if getattr(value, "__dict__", None) else ""
            return f"{_REGISTER}, or convert it by {base.__name__}(){extra}."
    if hasattr(cls, "state_dict"):
        return "Put its state_dict() into the state dict."
    return f"{_REGISTER}, or put what it is made of into the state dict."
