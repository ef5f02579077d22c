"""What is asked of arguments that a type checker has not seen: flags that are bools, and numbers that are whole."""

from __future__ import annotations

import operator

__all__ = ["check_flags", "shown", "whole"]

SHOWN_CHARACTERS = 80
"""How much of a value a message shows."""


def shown(value: object) -> str:
    """Describe a value for a message: what it is if that is short, and its type if it is not.

    A state dict's own repr takes seconds and megabytes, so only what is small by nature is asked for one.
    """
    if value is None or isinstance(value, (bool, int, float, complex)):
        text = repr(value) if not isinstance(value, int) or value.bit_length() < 256 else "a large int"
    elif isinstance(value, (str, bytes)):
        text = repr(value[:SHOWN_CHARACTERS]) + ("..." if len(value) > SHOWN_CHARACTERS else "")
    elif isinstance(value, type):
        text = f"the class {value.__qualname__}"
    elif isinstance(value, tuple) and len(value) <= 4:
        text = f"({', '.join(map(shown, value))}{',' * (len(value) == 1)})"
    else:
        try:
            length = f" of {len(value)}" if isinstance(value, (dict, list, tuple, set, frozenset)) else ""
        except Exception:
            length = ""
        text = f"{type(value).__qualname__}{length}"
    return text if len(text) <= SHOWN_CHARACTERS + 5 else f"{text[:SHOWN_CHARACTERS]}..."


def check_flags(**flags: object) -> None:
    """Refuse what is no bool, by name: the text ``"false"`` would count as true, and overwrite what was to be kept.

    Raises:
        TypeError: If one is not.
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, not {value!r}")


def whole(name: str, number: object) -> int:
    """Return a number as an int, NumPy's included.

    Raises:
        TypeError: If it is not whole, or is a bool: ``keep=True`` would keep one.
    """
    if isinstance(number, bool):
        raise TypeError(f"{name} must be a whole number, not {number!r}")
    try:
        return operator.index(number)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be a whole number, not {number!r}") from None
