"""What is asked of arguments that a type checker has not seen: flags that are bools, and numbers that are whole."""

from __future__ import annotations

import operator

from aiostage.errors import shown

__all__ = ["check_flags", "whole"]


def check_flags(**flags: object) -> None:
    """Refuse what is no bool, by name: the text ``"false"`` would count as true, and overwrite what was to be kept.

    Raises:
        TypeError: If one is not.
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, not {shown(value)}")


def whole(name: str, number: object) -> int:
    """Return a number as an int, NumPy's included.

    Raises:
        TypeError: If it is not whole, or is a bool: ``keep=True`` would keep one.
    """
    if isinstance(number, bool):
        raise TypeError(f"{name} must be a whole number, not {shown(number)}")
    try:
        return operator.index(number)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be a whole number, not {shown(number)}") from None
