"""Every object beyond plain containers, numbers and tensors: how it is taken apart, and how it is put together."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from aiostage.errors import CheckpointError
from aiostage.format.classes import (
    Classes,
    attributes_of,
    full_name,
    make_enum,
    make_namedtuple,
    make_object,
    make_registered,
    make_subclass,
    make_wrapper,
    registered_parts,
    set_attributes,
    take_class_apart,
)
from aiostage.format.kinds import KINDS_VERSION, NotCarried, Parts, table_of
from aiostage.format.numpy_kinds import NUMPY_KINDS, array_parts
from aiostage.format.registry import attributes_registered, flattening_of, unflatten_of
from aiostage.format.standard_kinds import STANDARD_KINDS
from aiostage.format.tensors import JAGGED, take_subclass_apart
from aiostage.format.torch_kinds import TORCH_KINDS

__all__ = [
    "KINDS_VERSION",
    "MADE_FIRST",
    "MADE_WHOLE",
    "OBJECT_KINDS",
    "attach",
    "hint_for",
    "is_flattened",
    "make_first",
    "reason_for",
    "rebuild_object",
    "take_object_apart",
]

_BY_CLASS, _BY_NAME = table_of((*STANDARD_KINDS, *NUMPY_KINDS, *TORCH_KINDS, JAGGED))
_OF_CLASSES = frozenset(("enum", "namedtuple", "object", "registered", "wrapper", "subclass"))


MADE_FIRST = frozenset(("object", "Namespace", "SimpleNamespace"))
"""Kinds that are made of attributes only, and so can exist before what they contain, which may lead back to them."""

MADE_WHOLE = frozenset(("registered", "wrapper", "enum"))
"""Kinds that are made by functions of others, which must see all that is in them."""

OBJECT_KINDS = _OF_CLASSES | _BY_NAME.keys()
"""The names of all kinds here."""


def is_flattened(value: Any) -> bool:
    """Return whether a function that is not ours looks at an object when it is taken apart."""
    cls = type(value)
    return flattening_of(cls) is not None or (isinstance(value, torch.Tensor) and hasattr(cls, "__tensor_flatten__"))


def take_object_apart(value: Any) -> tuple[str, Parts]:
    """Return the name of an object's kind, and its parts.

    Raises:
        NotCarried: If it cannot be carried.
    """
    cls = type(value)
    # Registered classes first: a registration overrides everything else that is known of a class.
    found = flattening_of(cls)
    if found is not None:
        name = full_name(cls)
        if found.flatten is None:
            return "object", Parts({"type": name, "of": "attributes"}, {}, attributes_of(value))
        try:
            children, context = found.flatten(value)
            return "registered", registered_parts(name, children, context, found.base)
        except NotCarried:
            raise
        except Exception as error:
            raise NotCarried(
                f"an object of class {name} could not be flattened: {error!r:.200}",
                "Correct the function with which its class was registered.",
            ) from error
    kind = _BY_CLASS.get(cls)
    if kind is not None:
        return kind.name, kind.take_apart(value)
    if isinstance(value, torch.Tensor):
        return take_subclass_apart(value)
    if cls is np.ndarray or cls is np.memmap:
        return "array", array_parts(np.asarray(value))
    if isinstance(value, np.dtype):
        return "np.dtype", _BY_NAME["np.dtype"].take_apart(value)
    taken = take_class_apart(value)
    if taken is not None:
        return taken
    raise NotCarried(reason_for(value), hint_for(value))


def make_first(form: Mapping[str, Any], classes: Classes) -> Any:
    """Make an object of one of :data:`MADE_FIRST`, without its attributes."""
    if form["is"] != "object":
        return _BY_NAME[form["is"]].rebuild(form, ())
    return make_object(classes.find(form["type"]) or attributes_registered(form["type"]), form)


def rebuild_object(form: Mapping[str, Any], children: Sequence[Any], classes: Classes) -> Any:
    """Make an object of one of :data:`OBJECT_KINDS` from its parts.

    Raises:
        CheckpointError: If a class of the reader's does not fit, or fails.
        ValueError: If the parts do not fit. Other exceptions are possible too.
    """
    name = form["is"]
    if name not in _OF_CLASSES:
        try:
            return _BY_NAME[name].rebuild(form, children)
        except MemoryError:
            raise
        except Exception as error:
            # Any class: decimal.InvalidOperation is an ArithmeticError, for one. The caller expects a few classes.
            raise ValueError(f"a {name} cannot be made: {error!r:.200}") from error
    if name in MADE_WHOLE and not children:
        raise ValueError(f"a {name} has no context")
    cls = classes.find(form["type"])
    if name == "namedtuple":
        return make_namedtuple(cls, form, children)
    if name == "subclass":
        return make_subclass(cls, form, children)
    try:
        if name == "enum":
            return make_enum(cls, form, children)
        if name == "wrapper":
            return make_wrapper(cls, form, children)
        return make_registered(unflatten_of(form["type"], form.get("as"), cls), form, children)
    except CheckpointError:
        raise
    except Exception as error:
        # Without a class no code of the user has run, so the file is at fault, and the caller says so.
        if cls is None and name != "registered":
            raise
        raise CheckpointError(
            f"an object of {form['type'][:80]} could not be made again: {type(error).__name__}: {str(error)[:200]}.",
            remedy="Load it without its class to see what it is made of.",
        ) from error


def attach(made: Any, form: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
    """Give an object its attributes."""
    if form["is"] in _OF_CLASSES:
        set_attributes(made, attributes)
    else:
        vars(made).update(attributes)


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
        # Attributes of a subclass would be lost in a conversion.
        if isinstance(value, base):
            extra = " if it has nothing besides" if getattr(value, "__dict__", None) else ""
            return f"{_REGISTER}, or convert it by {base.__name__}(){extra}."
    if hasattr(cls, "state_dict"):
        return "Put its state_dict() into the state dict."
    if full_name(cls) == "accelerate.state.PartialState":
        return "TrainingArguments have it in them: put their to_dict() into the state dict."
    return f"{_REGISTER}, or put what it is made of into the state dict."
