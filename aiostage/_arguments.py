"""Checks of users' arguments, and which arguments give and take their state as a dict."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from copy import copy
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
import torch

from aiostage.errors import shown

__all__ = [
    "FLAG",
    "check_flags",
    "check_optional",
    "check_progress",
    "checked_path",
    "is_stateful",
    "require_int",
    "require_seconds",
    "require_step",
    "require_text",
    "stateful_in",
    "states_of",
]

FLAG = (bool, np.bool_)
"""The classes of flags, which count by their values."""

_PLAIN = (torch.Tensor, dict, list, tuple, str, int, float, type)
"""What is surely not Stateful, as ``torch.distributed.checkpoint`` calls it."""


def check_flags(**flags: object) -> None:
    """Refuse a flag that is not a bool, by its name: the text ``"false"`` counts as true and would overwrite a file.

    Raises:
        TypeError: If one is not.
    """
    for name, value in flags.items():
        if not isinstance(value, FLAG):
            raise TypeError(f"{name} must be True or False, not {shown(value)}")


def check_optional(name: str, value: object, kind: type | tuple[type, ...], described: str) -> None:
    """Refuse what is neither None nor of a class. A wrapper passes that has all abstract methods of the class.

    Raises:
        TypeError: If it is refused.
    """
    if value is None or isinstance(value, kind):
        return
    # Not __abstractmethods__, which DCP's LoadPlanner does not have.
    required = [each for each in dir(kind) if getattr(getattr(kind, each, None), "__isabstractmethod__", False)]
    if not required or isinstance(value, type) or not all(hasattr(value, each) for each in required):
        raise TypeError(f"{name} must be {described}, or None, not {shown(value)}")


def check_progress(progress: object) -> None:
    """Refuse what is neither a bool, a function nor None. The number 0 is taken for False.

    Raises:
        TypeError: If it is none of these.
    """
    is_zero = isinstance(progress, int) and progress == 0
    if not (progress is None or isinstance(progress, FLAG) or is_zero or callable(progress)):
        raise TypeError(f"progress must be True, a function of one argument, or None, not {shown(progress)}")


def checked_path(name: str, path: object) -> tuple[object, ...]:
    """Return a path, or several of them, as a tuple.

    Raises:
        TypeError: If it is none, such as a single key: a text would be taken apart into its letters.
    """
    if isinstance(path, (str, bytes)) or not isinstance(path, Iterable):
        raise TypeError(f"{name}: a path is a tuple of keys, indices and attribute names, not {shown(path)}")
    return tuple(path)


def require_int(name: str, number: object, *, least: int | None = None, hint: str = "") -> int:
    """Return an integer of any class, such as one of NumPy's, as an int.

    Args:
        name: Of the argument.
        number: What was given.
        least: The smallest that it may be. None: any.
        hint: What the errors say besides.

    Raises:
        TypeError: If it is not whole, or is a bool: ``keep=True`` would keep one.
        ValueError: If it is below ``least``.
    """
    if isinstance(number, bool):
        raise TypeError(f"{name} must be an integer{hint}, not {shown(number)}")
    try:
        found = operator.index(number)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer{hint}, not {shown(number)}") from None
    if least is not None and found < least:
        raise ValueError(f"{name} must be an integer of at least {least}{hint}, not {shown(found)}")
    return found


def require_seconds(
    name: str,
    seconds: object,
    *,
    infinite: bool = False,
    within: tuple[float, float] | None = None,
    hint: str = "",
) -> float:
    """Return a number of seconds, of any class, as a float.

    Args:
        name: Of the argument.
        seconds: What was given.
        infinite: Whether it may be ``math.inf``.
        within: The least and the most that it may be. None: anything above 0.
        hint: What the errors say besides.

    Raises:
        TypeError: If it is no number, or is a bool.
        ValueError: If it is out of range, is NaN, or is infinite and may not be.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, (Real, Decimal)):
        raise TypeError(f"{name} must be a number of seconds{hint}, not {shown(seconds)}")
    try:
        # Before it is compared: NumPy would round the bounds to the class of the number, and warn of those too large.
        found = float(seconds)
    except (OverflowError, ValueError):
        # An integer that is too large, and a signaling NaN.
        found = math.nan
    fits = found > 0 and (infinite or found < math.inf) if within is None else within[0] <= found <= within[1]
    if not fits:
        allowed = "a number of seconds above 0" if within is None else f"from {within[0]:g} to {within[1]:g} seconds"
        # By its value: of other classes than Python's own a message shows the class alone.
        value = seconds if isinstance(seconds, int) else found
        raise ValueError(f"{name} must be {allowed}{hint}, not {shown(value)}")
    return found


def require_step(step: object) -> int:
    """Return the number of a step as an int.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is below 0.
    """
    return require_int("a step", step, least=0)


def require_text(name: str, text: object) -> None:
    """Refuse what is not a str, such as bytes or a path.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a str, not {shown(text)}")


def states_of(tree: Any, is_value: Callable[[type], bool] = lambda cls: False) -> Any:
    """Return a tree with the states of Stateful objects in their places: of the tree itself, or of values of a dict.

    Args:
        tree: The tree.
        is_value: Says of which classes objects stand for themselves, and not for their states.

    Raises:
        Exception: What a ``state_dict`` method or property raises.
    """
    if is_stateful(tree, is_value):
        return tree.state_dict()
    found = dict(_stateful_items(tree, is_value)) if isinstance(tree, dict) else {}
    if not found:
        return tree
    replaced = copy(tree)
    for key, value in found.items():
        replaced[key] = value.state_dict()
    return replaced


def stateful_in(tree: Any, is_value: Callable[[type], bool]) -> frozenset[int]:
    """Return the ids of Stateful objects: the tree itself, or values of a dict; as :func:`states_of`."""
    if is_stateful(tree, is_value):
        return frozenset({id(tree)})
    items = _stateful_items(tree, is_value) if isinstance(tree, dict) else ()
    return frozenset(id(value) for _, value in items)


def _stateful_items(tree: dict[Any, Any], is_value: Callable[[type], bool]) -> list[tuple[Any, Any]]:
    """Return the items of a dict whose values are Stateful."""
    # A state dict may have a million tensors, and this runs in one step. Few of their types are to be looked at.
    others = {cls for cls in set(map(type, tree.values())) if not issubclass(cls, _PLAIN)}
    if not others:
        return []
    return [(key, value) for key, value in tree.items() if type(value) in others and is_stateful(value, is_value)]


def is_stateful(value: Any, is_value: Callable[[type], bool] = lambda cls: False) -> bool:
    """Return whether an object is what PyTorch calls ``Stateful``: it has ``state_dict`` and ``load_state_dict``.

    Raises:
        Exception: What a property of that name raises.
    """
    # Not isinstance(value, Stateful): that imports torch.distributed.checkpoint, and takes 10 us for each tensor.
    if isinstance(value, _PLAIN):
        return False
    try:
        has_both = _has_method(value, "load_state_dict") and _has_method(value, "state_dict")
    except Exception:
        if is_value(type(value)):
            return False
        raise
    return has_both and not is_value(type(value))


def _has_method(value: Any, name: str) -> bool:
    try:
        return callable(getattr(value, name, None))
    except Exception:
        # A __getattr__ may raise anything for names that it does not know, as that of PyG's HeteroData does. What a
        # property of that name raises is the caller's to know: without its state the object would be saved whole.
        if any(name in vars(cls) for cls in type(value).__mro__):
            raise
        return False
