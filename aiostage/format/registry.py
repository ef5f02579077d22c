"""Classes that say how their objects are taken apart and made again: registered, or known from common packages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, TypeVar

from aiostage.errors import shown
from aiostage.format.classes import full_name, has_plain_layout
from aiostage.format.packages import PACKAGES

__all__ = ["attributes_registered", "flattening_of", "is_value", "register", "unflatten_of"]

T = TypeVar("T")

Flatten: TypeAlias = Callable[[T], tuple[Iterable[Any], Any]]
Unflatten: TypeAlias = Callable[[list[Any], Any], T]


@dataclass(frozen=True, slots=True)
class Registered:
    """A registered class.

    Attributes:
        cls: The class.
        flatten: Takes an object apart; None for one that is made of its attributes.
        unflatten: Makes one.
    """

    cls: type
    flatten: Flatten[Any] | None
    unflatten: Unflatten[Any] | None


# By full name, as checkpoints name classes. Without a lock: each access is one operation of a dict.
_registered: dict[str, Registered] = {}


def register(cls: type[T], flatten: Flatten[T] | None = None, unflatten: Unflatten[T] | None = None) -> None:
    """Tell how objects of a class are saved in checkpoints, and made again when they are loaded.

    The two functions are those of ``torch.utils._pytree.register_pytree_node``. Registering a class also declares it
    safe: a checkpoint that names it has ``unflatten`` called with what the checkpoint says. Saves and loads call both
    functions in a worker thread, in the caller's inference mode and ``no_grad``, and with its streams in a load. What
    else belongs to a thread, such as a default device or autocast, is not the caller's there.

    Args:
        cls: The class; subclasses are registered by themselves. Registering it again replaces the functions.
        flatten: Called with an object; returns a pair of its children and of a context. Both can be anything that a
            checkpoint can carry, tensors included; what it returns must not lead back to the object.
        unflatten: Called with the list of children and the context; returns an object. With neither function, an object
            is made of its attributes and slots, and its ``__init__`` is not called.

    Raises:
        TypeError: If ``cls`` is not a class; if there is one function without the other, or something else in their
            place; or if there is none and objects of the class hold more than attributes, as those of a subclass of
            ``dict`` do.
    """
    if not isinstance(cls, type):
        raise TypeError(f"register() takes a class, not {cls!r:.80}")
    if (flatten is None) != (unflatten is None):
        raise TypeError("register() takes both flatten and unflatten, or none of the two")
    for function in (flatten, unflatten):
        if function is not None and not callable(function):
            raise TypeError(f"flatten and unflatten are functions, not {shown(function)}")
    if flatten is None and not has_plain_layout(cls):
        raise TypeError(f"objects of {full_name(cls)} hold more than attributes; pass flatten and unflatten")
    _registered[full_name(cls)] = Registered(cls, flatten, unflatten)


class ClassHandler(NamedTuple):
    """How objects of a class are taken apart.

    Attributes:
        base: Full name of the class of a known package that it is one of; None for a registered class.
        flatten: Returns children and context of an object; None for one that is made of its attributes.
    """

    base: str | None
    flatten: Flatten[Any] | None


def flattening_of(cls: type) -> ClassHandler | None:
    """Return how objects of a class are taken apart, if that is registered or known."""
    found = _registered.get(full_name(cls))
    # A class that is defined again, in a notebook say, has the same name and is not the registered one.
    if found is not None and found.cls is cls:
        return ClassHandler(None, found.flatten)
    for base in cls.__mro__:
        name = full_name(base)
        known = PACKAGES.get(name)
        if known is not None and (base is cls or known.subclasses):
            return ClassHandler(name, known.flatten)
    return None


def is_value(cls: type) -> bool:
    """Return whether objects of a class stand for themselves: it is registered or known, and not only a base of it."""
    name = full_name(cls)
    return name in PACKAGES or (name in _registered and _registered[name].cls is cls)


def unflatten_of(name: str, base: str | None, cls: type | None) -> Callable[[Sequence[Any], Any], Any] | None:
    """Return what makes an object of a class, or None if that is not known here.

    Args:
        name: Full name of the class, from the file.
        base: Full name of the class of a package that it is one of, from the file; None if it was registered.
        cls: The class, if the caller knows it.
    """
    if base is None:
        found = _registered.get(name)
        if found is None or found.unflatten is None:
            return None
        unflatten = found.unflatten
        return lambda children, context: unflatten(list(children), context)
    known = PACKAGES.get(base)
    if known is None:
        return None
    if cls is None and name == base:
        cls = _imported(base)
    # The file says which class is the base. It counts only if the class that the reader has named agrees.
    if cls is None or not any(full_name(each) == base for each in cls.__mro__):
        return None
    made_of, make = cls, known.unflatten
    return lambda children, context: make(made_of, list(children), context)


def _imported(name: str) -> type | None:
    """Return a class of a package that is known here, if the process has imported it. Nothing is imported."""
    module, _, attribute = name.rpartition(".")
    # Not by getattr(), which may import: modules of transformers are lazy.
    found = vars(sys.modules[module]).get(attribute) if module in sys.modules else None
    return found if isinstance(found, type) else None


def attributes_registered(name: str) -> type | None:
    """Return the class of a full name if it is registered as one that is made of its attributes."""
    found = _registered.get(name)
    return found.cls if found is not None and found.flatten is None else None
